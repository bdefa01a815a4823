r"""Losses for learning from a weaker model's labels or distributions.

[`ConfidenceLoss`] is the auxiliary confidence loss for binary labels. [`LogConfRanking`] and [`LogConfToken`] give it
the signatures of the ranking and the token losses, so that a trainer takes it as its `loss_type`. Plain cross-entropy
on soft labels (`xent`) needs no loss of its own: it is [`bradley_terry`] with a `target`, and [`bce`] with labels
between 0 and 1. [`distillation`] is for generation. The losses do not know models, trainers, processes or text.
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

    The published implementation takes `t` from the micro-batch, so that at micro-batch 1 every row gets one class, and
    its `alpha` jumps from `warmup * alpha` to `alpha` at the end of the warm-up. Here `t` comes from the predictions
    and labels of earlier optimizer steps and is frozen within a step, so that it does not matter how a step is cut
    into micro-batches. The ramp is continuous. `reference=True` gives the published behaviour, with its jump.

    The callback of `trl_ext.trainers` calls [`~ConfidenceLoss.end_step`] after each optimizer step, and stores
    [`~ConfidenceLoss.state_dict`] with each checkpoint.

    Args:
        alpha (`float`, *optional*, defaults to `0.5`):
            Final weight of the student's own predictions, in [0, 1]. The default is that of the published code; the
            paper uses 0.75 for its largest students.
        warmup (`float`, *optional*, defaults to `0.1`):
            Share of training over which alpha rises from 0.
        window (`int`, *optional*, defaults to `512`):
            The threshold comes from at least so many examples of earlier steps (whole steps; fewer at the start). The
            default is ours.
        reference (`bool`, *optional*, defaults to `False`):
            The published batch quantile and jump.
        symmetric (`bool`, *optional*, defaults to `False`):
            The two classes are interchangeable, as the two sides of a pair are: half of all predictions are positive
            and the threshold is 0. `reference` overrides it.

    Raises:
        ValueError: a value out of its range.
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
        """Forget all steps, as at the start of training."""
        self.progress = 0.0
        self.threshold: float | None = 0.0 if self.symmetric else None
        self._step: list[torch.Tensor] = []
        self._earlier: deque[torch.Tensor] = deque()

    @property
    def weight(self) -> float:
        """The weight of the student's own predictions now: 0 at the start, and while there is no threshold."""
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
        weight = self.weight
        if weight > 0 and len(own):
            threshold = _balanced_threshold(own, q) if self.reference else self.threshold
            q = (1 - weight) * q + weight * (own > threshold).to(q.dtype)
        return -q * F.logsigmoid(z) - (1 - q) * F.logsigmoid(-z)

    def state_dict(self) -> dict[str, Any]:
        """What the loss remembers of earlier steps, as JSON values: part of a trainer's checkpoint."""
        return {"threshold": self.threshold, "earlier": [step.tolist() for step in self._earlier]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what [`~ConfidenceLoss.state_dict`] gave."""
        self.threshold = state["threshold"]
        self._earlier = deque(torch.tensor(step) for step in state["earlier"])

    def step_values(self) -> torch.Tensor:
        """What this process saw in the current step, `(n, 2)`: logits and labels."""
        return torch.cat(self._step) if self._step else torch.zeros(0, 2)

    def end_step(self, progress: float, values: torch.Tensor | None = None) -> None:
        """
        Close an optimizer step: from now on the threshold includes it.

        Args:
            progress (`float`): share of training that is done, in [0, 1].
            values (`torch.Tensor` of shape `(n, 2)`, *optional*):
                [`~ConfidenceLoss.step_values`] of all processes. Defaults to those of this one.
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
    """The logit above which as large a share of the predictions lies as the labels' mean."""
    share = 1.0 - labels.double().mean()
    return torch.quantile(logits.double(), share.clamp(0.0, 1.0)).to(logits.dtype)


@ranking_losses.declare(uses_distances=False, max_candidates=2, takes_target=True)
class LogConfRanking:
    """
    [`ConfidenceLoss`] of pairs, with the signature of the ranking losses.

    The logit is the better minus the worse candidate's score. The label is `target`, the probability that the better
    one wins (1 without `target`). A pair has no orientation, so the classes are balanced and the threshold is 0,
    except with `reference=True`. Pass it to [`RewardTrainer`] as `loss_type`; the trainer tells it where training
    stands.

    Args:
        **kwargs: those of [`ConfidenceLoss`], except `symmetric`.
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
    [`ConfidenceLoss`] of labelled tokens, with the signature of the token losses, for heads of 1 or 2 outputs. Pass it
    to a token-level trainer as `loss_type`; the trainer tells it where training stands.

    Args:
        **kwargs: those of [`ConfidenceLoss`].
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

    *Foundations of Large Language Models* by T. Xiao and J. Zhu, equation 10.13, which maximises the log likelihood
    minus lambda times the divergence: this is its negative.

    Args:
        logits (`torch.Tensor` of shape `(n, V)`): the student's, of the token that follows each position.
        teacher_logits (`torch.Tensor` of shape `(n, V)`):
            the weak teacher's; -inf where the teacher never gives a token.
        labels (`torch.Tensor` of shape `(n,)`): the token that follows.
        mask (`torch.BoolTensor` of shape `(n,)`): True where the token is trained on.
        weight (`float`): lambda, at least 0. With 0 the teacher's logits are not read.

    Returns:
        two `torch.Tensor` of shape `(n,)`, fp32, 0 where the mask is False: cross-entropy, and lambda times the
        divergence. Their sum is the loss.

    Raises:
        ValueError: shapes that differ, or a negative weight.
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
    The sum of the entropies, in nats, of the distributions that logits (n, V) stand for: a scalar in fp32. A logit may
    be -inf.

    Example:

    >>> entropy_sum(torch.zeros(2, 4))  # twice log(4)
    tensor(2.7726)
    """
    return torch.special.entr(logits.float().softmax(-1)).sum()


def scheduled_weight(
    weight: float, progress: float, schedule: Literal["constant", "linear", "cosine"] = "constant"
) -> float:
    """
    Lambda at a point of training: constant, or falling from `weight` to 0 linearly or along half a cosine.

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
