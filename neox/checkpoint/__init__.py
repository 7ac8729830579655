"""Checkpoints: logical tensors under canonical names, and the formats that are readings of them."""
