"""Models: pure modules over tensors. They know nothing of DeepSpeed, SLURM or files of runs."""
