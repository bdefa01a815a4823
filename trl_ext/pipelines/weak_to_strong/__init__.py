"""Weak-to-strong experiments: a weak model labels what a strong model learns from."""

from trl_ext.pipelines.weak_to_strong.experiment import weak_to_strong


__all__ = ["weak_to_strong"]
