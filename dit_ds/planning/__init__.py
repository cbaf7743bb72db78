"""What fits and what is fastest, predicted."""
