"""Work in several stages that survives a crash: rejection sampling, weak to strong, selection, generation backends.

The pipelines use scorers only as TRL reward functions, and models only by their paths.
"""
