"""Two models compared: their tensors, and what they compute."""
