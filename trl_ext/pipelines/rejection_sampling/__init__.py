"""Rejection sampling: generate N completions a prompt, score them, keep the best, and fine-tune on them in rounds."""

from trl_ext.pipelines.rejection_sampling.sampler import RejectionSampler, rejection_sample


__all__ = ["RejectionSampler", "rejection_sample"]
