"""Rejection sampling: generate N completions per prompt, score them, keep the best, and fine-tune in rounds.

The names are resolved when they are first used, because `trl-ext plugins` needs only the selectors of this package.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl_ext.pipelines.rejection_sampling.sampler import RejectionSampler, rejection_sample

__all__ = ["RejectionSampler", "rejection_sample"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.sampler"), name)
