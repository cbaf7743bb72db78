"""Metrics, evaluation and inference."""
