"""Rejection sampling: generate N completions per prompt, score them, keep the best, and fine-tune in rounds."""

from trl_ext.pipelines.rejection_sampling.sampler import RejectionSampler, rejection_sample


__all__ = ["RejectionSampler", "rejection_sample"]
