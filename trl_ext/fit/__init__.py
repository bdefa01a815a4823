"""How much memory a training config takes: an estimate without a GPU, and a measurement."""
