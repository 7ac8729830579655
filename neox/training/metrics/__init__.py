"""What a run reports: figures, where they go, timers and profiles."""
