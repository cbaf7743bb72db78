"""DeepSpeed: the one package that imports it."""
