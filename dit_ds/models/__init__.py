"""Models: pure modules over tensors. They know nothing of DeepSpeed, SLURM or files of runs."""

import dit_ds.torchvision_stub  # noqa: F401  before segment_anything and transformers, which import torchvision
