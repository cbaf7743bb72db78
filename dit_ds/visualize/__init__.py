"""Pictures: predictions, attention, contact sheets."""
