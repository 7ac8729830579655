"""What a run's processes print: on the terminal once, and in files line by line."""
