"""This project's own checkpoints: what they say of themselves, writing, reading, and staying whole."""
