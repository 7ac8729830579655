"""Training: the engines, the optimizer, the loop, and what is logged and saved on the way."""
