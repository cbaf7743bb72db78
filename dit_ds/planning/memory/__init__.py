"""GPU memory: predicted, tracked, measured."""
