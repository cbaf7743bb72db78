"""What CUDA's kernels allocate besides their operators' outputs, as their sources give it."""
