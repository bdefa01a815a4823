"""Metrics: pure functions and streamed counts from scores and labels to numbers; import from the submodules.

They know nothing of models, losses, trainers or processes. A mask is bool and True means real.
"""
