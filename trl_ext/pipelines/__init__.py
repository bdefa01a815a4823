"""Work in several stages that survives a crash: rejection sampling, selection, generation backends.

Knows scorers only as TRL reward functions, and models only by their paths.
"""
