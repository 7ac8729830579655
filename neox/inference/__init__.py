"""Text from a trained model: cache, sampling, batched generation, and the modes of `generate.py`."""
