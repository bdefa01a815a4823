"""Penalties that a trainer adds to its ranking loss: on the scores of a batch, and on hidden states.

They know tensors, and no model or trainer.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def batch_sum_to_zero(scores: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    The squared mean of all scores of a batch, so that its rewards sum to about zero.

    $$
    P = \left( \frac{\sum_{b, k} w_b \, s_{bk}}{\sum_{b, k} w_b} \right)^2
    $$

    See *On the Robustness of Reward Models for Language Model Alignment* by J. Hong et al.
    (https://huggingface.co/papers/2505.07271). [`~trl_ext.losses.center_rewards`] centres every group instead. For one
    pair in the batch P is a quarter of its penalty.

    Args:
        scores (`torch.Tensor` of shape `(..., B, K)`): scores of the candidates; each leading index is a batch.
        mask (`torch.BoolTensor` of shape `(..., B, K)`): True for a real candidate.
        weights (`torch.Tensor` of shape `(..., B)`, *optional*): how often each group counts. Defaults to once.

    Returns:
        `torch.Tensor` of shape `(...)`: 0 for a batch without candidates.

    Example:

    ```python
    >>> batch_sum_to_zero(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[True, True], [True, False]]))
    tensor(4.)
    ```
    """
    counted = mask.to(torch.promote_types(scores.dtype, torch.float32))
    if weights is not None:
        counted = counted * weights[..., None]
    total = counted.sum((-2, -1))
    summed = (scores.to(counted.dtype).masked_fill(~mask, 0.0) * counted).sum((-2, -1))
    return (summed / total.masked_fill(total == 0, 1.0)).square()


CHUNK_TOKENS = 256
"""Tokens whose logits exist at a time: 128 MiB for a vocabulary of 128,000."""


def next_token_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_tokens: int = CHUNK_TOKENS
) -> torch.Tensor:
    """
    The cross-entropy of each token under a frozen output layer, in memory that does not grow with tokens * vocabulary.

    The logits of a chunk are computed, used, dropped, and computed again in the backward pass. This is the text
    regularisation of *Regularizing Hidden States Enables Learning Generalizable Reward Model for LLMs* by R. Yang et
    al. (https://huggingface.co/papers/2406.10216), in its form as plain cross-entropy.

    Args:
        hidden (`torch.Tensor` of shape `(T, H)`): the hidden states that predict the tokens.
        weight (`torch.Tensor` of shape `(V, H)`): the output layer. It gets no gradient.
        targets (`torch.LongTensor` of shape `(T,)`): the tokens' ids.
        chunk_tokens (`int`, *optional*, defaults to `256`): tokens of a chunk.

    Returns:
        `torch.Tensor` of shape `(T,)`, fp32 (fp64 if the hidden states are fp64).
    """
    weight = weight.detach()

    def of_chunk(states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        logits = states.to(weight.dtype) @ weight.T  # (chunk, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, ids, reduction="none")

    parts = zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    found = [checkpoint(of_chunk, states, ids, use_reentrant=False) for states, ids in parts]
    return torch.cat(found)
