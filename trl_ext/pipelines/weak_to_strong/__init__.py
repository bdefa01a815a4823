"""Weak-to-strong experiments: a strong model learns from the labels of a weak model."""

from trl_ext.pipelines.weak_to_strong.experiment import weak_to_strong


__all__ = ["weak_to_strong"]
