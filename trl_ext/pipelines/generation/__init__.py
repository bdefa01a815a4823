"""Generating completions: sampling settings, the transformers backend, and servers."""
