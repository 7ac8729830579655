"""Bad steps: seen before the update, left out, gone back over, or the end of the run; `guard.py` puts it together."""
