r"""Losses for learning from a weaker model's labels or distributions.

[`ConfidenceLoss`] is the auxiliary confidence loss for binary labels. [`LogConfRanking`] and [`LogConfToken`] give it
the signatures of the ranking and the token losses, so that a trainer accepts it as `loss_type`. Plain cross-entropy on
soft labels (`xent`) is not in this module: it is [`bradley_terry`] with a `target`, or [`bce`] with labels between 0
and 1. [`distillation`] is for generation. The losses do not know models, trainers, processes or text.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F

from trl_ext.losses.ranking import ranking_losses
from trl_ext.losses.token import check_labels, token_losses


class ConfidenceLoss:
    r"""
    Cross-entropy to a mixture of the weak label and the student's own hardened prediction.

    $$
    L = -\big[\hat q \log \sigma(z) + (1 - \hat q) \log \sigma(-z)\big], \qquad
    \hat q = (1 - \alpha) \, q + \alpha \, [z > t]
    $$

    See *Weak-to-Strong Generalization* by C. Burns et al. (https://huggingface.co/papers/2312.09390), section 4.3 and
    appendix A.4: `alpha` rises over the first part of training, and the threshold `t` gives the student as large a
    share of positives as the weak labels have.

    The published implementation takes `t` from the micro-batch. With micro-batches of one row, every row then gets the
    same class. Its `alpha` jumps from `warmup * alpha` to `alpha` at the end of the warm-up. Here `t` comes from the
    predictions and labels of earlier optimizer steps and does not change within a step, so the size of the
    micro-batches does not matter. The ramp is continuous. `reference=True` gives the published behaviour.

    The callback of `trl_ext.trainers` calls [`~ConfidenceLoss.end_step`] after each optimizer step, and stores
    [`~ConfidenceLoss.state_dict`] with each checkpoint.

    Args:
        alpha (`float`, *optional*, defaults to `0.5`):
            Final weight of the student's own predictions, in [0, 1]. The default comes from the published code; the
            paper uses 0.75 for its largest students.
        warmup (`float`, *optional*, defaults to `0.1`):
            Share of training over which alpha rises from 0.
        window (`int`, *optional*, defaults to `512`):
            The threshold comes from at least this many examples of earlier steps (whole steps; fewer at the start).
            The default is ours.
        reference (`bool`, *optional*, defaults to `False`):
            Use the quantile of the micro-batch and the jump of `alpha`, as published.
        symmetric (`bool`, *optional*, defaults to `False`):
            The two classes are interchangeable, like the two sides of a pair. Half of all predictions are then
            positive, and the threshold is 0. `reference` overrides it.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        warmup: float = 0.1,
        window: int = 512,
        reference: bool = False,
        symmetric: bool = False,
    ):
        if not 0.0 <= alpha <= 1.0 or not 0.0 <= warmup <= 1.0:
            raise ValueError(f"alpha={alpha} and warmup={warmup} must both lie in [0, 1].")
        if window < 1:
            raise ValueError(f"window={window} examples cannot give a threshold. Needed: at least 1.")
        self.alpha, self.warmup, self.window, self.reference = alpha, warmup, window, reference
        self.symmetric = symmetric
        self.reset()

    def reset(self) -> None:
        """Forget all earlier steps, as at the start of training."""
        self.progress = 0.0
        self.threshold: float | None = 0.0 if self.symmetric else None
        self._step: list[torch.Tensor] = []
        self._earlier: deque[torch.Tensor] = deque()

    @property
    def weight(self) -> float:
        """The current weight of the student's own predictions. It is 0 at the start and without a threshold."""
        if self.reference:
            return self.alpha * (1.0 if self.progress > self.warmup else self.progress)
        if self.threshold is None:
            return 0.0
        return self.alpha * (min(1.0, self.progress / self.warmup) if self.warmup > 0 else 1.0)

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        The loss of each element.

        Args:
            logits (`torch.Tensor` of shape `(n,)`): log-odds z of the positive class.
            labels (`torch.Tensor` of shape `(n,)`): the weak label, a probability q in [0, 1].

        Returns:
            `torch.Tensor` of shape `(n,)`, fp32.
        """
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (n,)
        q = labels.to(z.dtype)  # (n,)
        own = z.detach()
        if torch.is_grad_enabled() and not self.symmetric:
            self._step.append(torch.stack([own, q.detach()], dim=1).cpu())  # (n, 2)
        # an evaluation is cross-entropy: else its loss would move with the weight alone
        weight = self.weight if torch.is_grad_enabled() else 0.0
        if weight > 0 and len(own):
            threshold = _balanced_threshold(own, q) if self.reference else self.threshold
            q = (1 - weight) * q + weight * (own > threshold).to(q.dtype)
        return -q * F.logsigmoid(z) - (1 - q) * F.logsigmoid(-z)

    def state_dict(self) -> dict[str, Any]:
        """What the loss remembers of earlier steps, as JSON values. A trainer's checkpoint stores it."""
        return {"threshold": self.threshold, "earlier": [step.tolist() for step in self._earlier]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what [`~ConfidenceLoss.state_dict`] returned."""
        self.threshold = state["threshold"]
        self._earlier = deque(torch.tensor(step) for step in state["earlier"])

    def step_values(self) -> torch.Tensor:
        """Logits and labels that this process saw in the current step, `(n, 2)`."""
        return torch.cat(self._step) if self._step else torch.zeros(0, 2)

    def end_step(self, progress: float, values: torch.Tensor | None = None) -> None:
        """
        End an optimizer step. The threshold of the next step includes its values.

        Args:
            progress (`float`): share of training that is done, in [0, 1].
            values (`torch.Tensor` of shape `(n, 2)`, *optional*):
                [`~ConfidenceLoss.step_values`] of all processes. Defaults to the values of this process.
        """
        values = self.step_values() if values is None else values
        self.progress, self._step = progress, []
        if self.symmetric or not len(values):
            return
        self._earlier.append(values)
        while sum(map(len, self._earlier)) - len(self._earlier[0]) >= self.window:
            self._earlier.popleft()
        seen = torch.cat(list(self._earlier))  # (n, 2)
        self.threshold = float(_balanced_threshold(seen[:, 0], seen[:, 1]))


def _balanced_threshold(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The logit for which the share of predictions above it equals the mean of the labels."""
    share = 1.0 - labels.double().mean()
    return torch.quantile(logits.double(), share.clamp(0.0, 1.0)).to(logits.dtype)


@ranking_losses.declare(uses_distances=False, max_candidates=2, takes_target=True)
class LogConfRanking:
    """
    [`ConfidenceLoss`] for pairs, with the signature of the ranking losses.

    The logit is the score of the better candidate minus the score of the worse one. The label is `target`, the
    probability that the better candidate wins (1 without `target`). The two sides of a pair are interchangeable, so
    the classes are balanced and the threshold is 0, except with `reference=True`.

    Pass an instance to [`RewardTrainer`] as `loss_type`. The trainer tells the loss how far training is.

    Args:
        **kwargs: the arguments of [`ConfidenceLoss`], except `symmetric`.
    """

    def __init__(self, **kwargs):
        self.confidence = ConfidenceLoss(symmetric=not kwargs.get("reference", False), **kwargs)
        self.__name__ = "logconf"

    def __call__(
        self,
        scores: torch.Tensor,
        ratings: torch.Tensor,
        mask: torch.Tensor,
        *,
        margin: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores, ratings and mask `(B, 2)`, target `(B,)` -> `(B,)`; 0 where the ratings are equal."""
        if scores.dim() != 2 or scores.shape[1] != 2:
            raise ValueError(f"`logconf` compares two candidates, found scores {tuple(scores.shape)}. Use pairs.")
        if margin is not None:
            raise ValueError("`logconf` cannot use a margin: drop the margin column.")
        gap = ratings[:, 0] - ratings[:, 1]  # (B,)
        real = mask.all(1) & (gap != 0)
        z = torch.where(gap < 0, scores[:, 1] - scores[:, 0], scores[:, 0] - scores[:, 1])[real]
        q = torch.ones_like(z) if target is None else target.to(z.dtype)[real]
        losses = self.confidence(z, q)
        return torch.zeros(len(scores), dtype=losses.dtype, device=losses.device).masked_scatter(real, losses)


@token_losses.declare(outputs="log_odds", labels="probability")
class LogConfToken:
    """
    [`ConfidenceLoss`] for labelled tokens, with the signature of the token losses, for heads with 1 or 2 outputs.

    Pass an instance to a token-level trainer as `loss_type`. The trainer tells the loss how far training is.

    Args:
        **kwargs: the arguments of [`ConfidenceLoss`].
    """

    def __init__(self, **kwargs):
        self.confidence = ConfidenceLoss(**kwargs)
        self.__name__ = "logconf"

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, *, class_weights=None
    ) -> torch.Tensor:
        """Logits `(B, T, G, C)`, labels in [0, 1] and mask `(B, T, G)` -> sums `(B,)`."""
        if class_weights is not None:
            raise ValueError("`logconf` balances the classes by its threshold: leave class_weights out.")
        if logits.shape[-1] not in (1, 2):
            raise ValueError(f"`logconf` needs right or wrong (1 or 2 outputs), found {logits.shape[-1]} outputs.")
        check_labels("logconf", labels, mask & ~((labels >= 0) & (labels <= 1)), "labels in [0, 1]")
        z = logits[..., 0] if logits.shape[-1] == 1 else logits[..., 1] - logits[..., 0]  # (B, T, G)
        losses = self.confidence(z[mask], labels[mask])  # (n,)
        where = torch.zeros(mask.shape, dtype=losses.dtype, device=losses.device).masked_scatter(mask, losses)
        return where.sum((1, 2))


def distillation(
    logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Cross-entropy to the data and the divergence from a weak teacher, per token.

    $$
    L = \sum_t -\log \mathrm{Pr}_s(y_t) + \lambda \, \mathrm{KL}(\mathrm{Pr}_w(\cdot) \,\|\, \mathrm{Pr}_s(\cdot))
    $$

    See *Foundations of Large Language Models* by T. Xiao and J. Zhu, equation 10.13. The book maximises the log
    likelihood minus lambda times the divergence; this loss is the negative of that.

    Args:
        logits (`torch.Tensor` of shape `(n, V)`): logits of the student for the token after each position.
        teacher_logits (`torch.Tensor` of shape `(n, V)`):
            Logits of the weak teacher; -inf for a token that the teacher never produces.
        labels (`torch.Tensor` of shape `(n,)`): the token after each position.
        mask (`torch.BoolTensor` of shape `(n,)`): True where the token is trained on.
        weight (`float`): lambda, at least 0. With 0 the teacher's logits are not read.

    Returns:
        Two `torch.Tensor` of shape `(n,)`, fp32, 0 where the mask is False: the cross-entropy, and lambda times the
        divergence. Their sum is the loss.

    Raises:
        ValueError: if the shapes differ, or the weight is negative.
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"Student and teacher must score the same vocabulary, found {tuple(logits.shape)} and "
            f"{tuple(teacher_logits.shape)}."
        )
    if weight < 0:
        raise ValueError(f"The weight of the divergence is {weight}. Needed: at least 0.")
    log_student = logits.float().log_softmax(-1)  # (n, V)
    chosen = labels.masked_fill(~mask, 0)
    cross_entropy = -log_student.gather(-1, chosen[:, None])[:, 0].masked_fill(~mask, 0.0)  # (n,)
    if weight == 0:
        return cross_entropy, torch.zeros_like(cross_entropy)
    log_teacher = teacher_logits.float().log_softmax(-1)  # (n, V)
    terms = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)  # (n, V)
    divergence = terms.masked_fill(log_teacher == -math.inf, 0.0).sum(-1)  # (n,); 0 log 0 is 0
    return cross_entropy, weight * divergence.masked_fill(~mask, 0.0)


def entropy_sum(logits: torch.Tensor) -> torch.Tensor:
    """
    The sum of the entropies, in nats, of n distributions that are given by their logits (n, V).

    The result is a scalar in fp32. A logit may be -inf.

    Example:

    >>> entropy_sum(torch.zeros(2, 4))  # twice log(4)
    tensor(2.7726)
    """
    return torch.special.entr(logits.float().softmax(-1)).sum()


def scheduled_weight(
    weight: float, progress: float, schedule: Literal["constant", "linear", "cosine"] = "constant"
) -> float:
    """
    Lambda at a point of training: constant, or decreasing from `weight` to 0, linearly or along half a cosine.

    Example:

    >>> scheduled_weight(2.0, 0.5, "linear"), scheduled_weight(2.0, 1.0, "cosine")
    (1.0, 0.0)
    """
    if schedule == "constant":
        return weight
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "linear":
        return weight * (1.0 - progress)
    if schedule == "cosine":
        return weight * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"schedule={schedule!r} is not known. Needed: 'constant', 'linear' or 'cosine'.")
