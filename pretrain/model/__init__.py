"""The CoLA model from Megatron-core parts."""
