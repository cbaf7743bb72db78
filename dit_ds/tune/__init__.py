"""Which settings train a configuration fastest on given GPUs: predicted, tried, written down."""
