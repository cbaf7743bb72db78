"""Training: the loop, its set-up, and what a run logs."""
