"""The three training stages, one small contract (`pretrain.stages.contract`)."""
