"""Looking at checkpoints: what is in them, whether they are whole, what they compute."""
