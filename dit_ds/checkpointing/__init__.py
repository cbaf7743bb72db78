"""Checkpoints: read, written, and models from them."""
