"""GPT-NeoX's checkpoints, of every layout and age: read, taken up mid-run, written."""
