"""Benchmarks of training, scoring and sampling against TRL's way of doing the same; each file is one case."""
