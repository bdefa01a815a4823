"""Metrics: pure functions and streamed counts of scores and labels. Import them from the submodules.

They know nothing of models, losses, trainers or processes. A mask is bool and True means real.
"""
