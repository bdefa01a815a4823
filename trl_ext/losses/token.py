"""Token losses: from the outputs of a token head and the labels of some positions to one sum per sequence.

Every loss has the signature ``loss(logits, labels, mask, *, class_weights=None, **loss_kwargs)``. The logits are
`(B, T, G, C)`: G categories with C outputs each (C = 1 for [`bce`], [`mse`] and [`hinge`], 2 or 3 for [`ce`]). Labels
and mask are `(B, T, G)`. In the mask, True means *annotated*; a real token without a label is False, as padding is.
The result `(B,)` is the *sum* over the annotated positions of a sequence. The divisor of this sum depends on the whole
accumulation window, which one batch does not know: see [`average`].

All losses follow these rules. A sequence without an annotated position has a loss of exactly 0 and a zero gradient.
Values at positions that are not annotated change nothing, not even NaN. A NaN among annotated logits makes the loss of
that sequence NaN, so that a check of the losses can name the sequence. A label out of range raises an error.

This module does not know which token belongs to which span or step. It knows nothing of text, models or configs.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from trl_ext.losses.properties import TokenLossProperties
from trl_ext.registry import Registry


token_losses = Registry("token loss", "trl_ext.token_losses", TokenLossProperties)


def _prepare(
    loss: str, logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, outputs: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the shapes; return logits in fp32 or more, with 0 where nothing is annotated, and labels in that dtype."""
    if logits.dim() != 4 or mask.shape != logits.shape[:3]:
        raise ValueError(
            f"`{loss}` needs logits of the shape (B, T, G, C) and a mask (B, T, G), found {tuple(logits.shape)} and "
            f"{tuple(mask.shape)}: a head of one category gives `logits[:, :, None, :]`."
        )
    if logits.shape[3] not in outputs:
        wanted = " or ".join(str(count) for count in outputs)
        raise ValueError(
            f"`{loss}` needs {wanted} output(s) per category, found {logits.shape[3]}: change the number of labels of "
            "the head, or the loss."
        )
    soft = loss == "ce" and labels.shape == logits.shape
    if labels.shape != mask.shape and not soft:
        wanted = f"{tuple(mask.shape)} or {tuple(logits.shape)}" if loss == "ce" else f"{tuple(mask.shape)}"
        raise ValueError(f"`{loss}` needs labels of the shape {wanted}, found {tuple(labels.shape)}.")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool with True where a label is given, found {mask.dtype}: use `mask.bool()`.")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(~mask[..., None], 0.0)
    return logits, labels.to(logits.dtype)


def check_labels(loss: str, labels: torch.Tensor, wrong: torch.Tensor, wanted: str) -> None:
    """Raise `ValueError` for the first label that is out of range; `wrong` (B, T, G) is True for such labels."""
    if wrong.any():
        sequence, token, category = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"`{loss}` needs {wanted}, found {labels[sequence, token, category].tolist()} in sequence {sequence} of "
            f"the batch, token {token}, category {category}. Map the labels, or mask what is not annotated."
        )


def _class_weights(
    loss: str, weights: Sequence[float] | torch.Tensor | None, classes: int, like: torch.Tensor
) -> torch.Tensor:
    """The weights as a tensor (C,) with the dtype and device of `like`; ones if there are none."""
    if weights is None:
        return like.new_ones(classes)
    weights = torch.as_tensor(weights, dtype=like.dtype, device=like.device)
    if weights.shape != (classes,) or not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError(
            f"`{loss}` needs {classes} finite class weights of at least 0, one per class, found {weights.tolist()}."
        )
    return weights


def _sum(terms: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum (B, T, G) over annotated positions, to (B,). The other positions may hold NaN, so this is no product."""
    return torch.where(mask, terms, 0.0).sum((1, 2))


@token_losses.register("bce", outputs="log_odds", labels="probability")
def bce(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    *,
    class_weights: Sequence[float] | torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Binary cross-entropy between the probability σ(z) of each annotated token and its label.

    $$
    L = \sum_{t, g} -w_1 \, q \log \sigma(z) - w_0 \, (1 - q) \log \sigma(-z)
    $$

    With the label of the whole solution on all of its tokens, this loss trains the token-level verifier of *Training
    Verifiers to Solve Math Word Problems* by K. Cobbe et al. (https://huggingface.co/papers/2110.14168). The paper
    uses [`mse`] and reports no notable difference from cross-entropy. Its additional language model loss is not part
    of this function.

    Args:
        logits (`torch.Tensor` of shape `(B, T, G, 1)`):
            Log-odds z of *right*.
        labels (`torch.Tensor` of shape `(B, T, G)`):
            Probability q in [0, 1] of *right*, usually 0 or 1.
        mask (`torch.BoolTensor` of shape `(B, T, G)`):
            True where a label is given.
        class_weights (sequence of two `float`, *optional*):
            w_0 for *wrong* and w_1 for *right*, at least 0. They multiply the terms, and the loss is not divided by
            their sum. So they change the size of the loss, unless they average to 1 over the labels, as
            N / (2 · N_class) do.

    Returns:
        `torch.Tensor` of shape `(B,)`, sums over the annotated positions.

    Raises:
        ValueError: on a wrong shape, a label outside [0, 1], or bad class weights.

    Example:

    ```python
    >>> logits, labels = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1), torch.tensor([1.0, 0.5]).view(1, 2, 1)
    >>> bce(logits, labels, torch.ones(1, 2, 1, dtype=torch.bool))  # softplus(-2) + log 2
    tensor([0.8201])
    ```
    """
    logits, labels = _prepare("bce", logits, labels, mask, outputs=(1,))
    check_labels("bce", labels, mask & ~((labels >= 0) & (labels <= 1)), "labels in [0, 1]")
    wrong, right = _class_weights("bce", class_weights, 2, logits)
    z, q = logits[..., 0], labels.masked_fill(~mask, 0.0)  # (B, T, G)
    return _sum(-right * q * F.logsigmoid(z) - wrong * (1 - q) * F.logsigmoid(-z), mask)


@token_losses.register("ce", outputs="log_odds", labels="probability")
def ce(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    *,
    class_weights: Sequence[float] | torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Cross-entropy over two or three classes per annotated token.

    $$
    L = \sum_{t, g} \sum_c -w_c \, q_c \log \text{softmax}(z)_c
    $$

    Three classes are the step labels of *Let's Verify Step by Step* by H. Lightman et al.
    (https://huggingface.co/papers/2305.20050): negative, neutral, positive. With two classes and hard labels on one
    token of each step, this is the loss of TRL's former `PRMTrainer`, summed instead of averaged. With two classes it
    equals [`bce`] of z_1 - z_0.

    Args:
        logits (`torch.Tensor` of shape `(B, T, G, C)`):
            C = 2 (wrong, right) or 3 (negative, neutral, positive) logits z.
        labels (`torch.Tensor` of shape `(B, T, G)` or `(B, T, G, C)`):
            `(B, T, G)`: for C = 2 the probability of *right* in [0, 1], usually 0 or 1; for C = 3 the step label -1, 0
            or 1 (the class is label + 1). `(B, T, G, C)`: the probability q of each class; they sum to 1.
        mask (`torch.BoolTensor` of shape `(B, T, G)`):
            True where a label is given.
        class_weights (sequence of C `float`, *optional*):
            w_c >= 0. As in [`bce`], the loss is not divided by their sum. (`torch.nn.functional.cross_entropy` with
            `reduction="mean"` does divide by the weights of the labels.)

    Returns:
        `torch.Tensor` of shape `(B,)`, sums over the annotated positions.

    Raises:
        ValueError: on a wrong shape, a label out of range, or bad class weights.

    Example:

    ```python
    >>> logits, labels = torch.tensor([0.0, 0.0, 2.0]).view(1, 1, 1, 3), torch.tensor([1.0]).view(1, 1, 1)
    >>> ce(logits, labels, torch.ones(1, 1, 1, dtype=torch.bool))  # log(1 + 2 / e²)
    tensor([0.2395])
    ```
    """
    logits, labels = _prepare("ce", logits, labels, mask, outputs=(2, 3))
    classes = logits.shape[3]
    if labels.dim() == 4:
        inside = ((labels >= 0) & (labels <= 1)).all(-1) & ((labels.sum(-1) - 1).abs() <= 1e-3)  # (B, T, G)
        check_labels("ce", labels, mask & ~inside, f"{classes} probabilities of sum 1 a label")
        targets = labels  # (B, T, G, C)
    elif classes == 2:
        check_labels("ce", labels, mask & ~((labels >= 0) & (labels <= 1)), "labels in [0, 1] for 2 classes")
        targets = torch.stack([1 - labels, labels], dim=-1)  # (B, T, G, C)
    else:
        steps = labels.new_tensor([-1.0, 0.0, 1.0])
        targets = (labels[..., None] == steps).to(labels.dtype)  # (B, T, G, C)
        check_labels("ce", labels, mask & (targets.sum(-1) == 0), "labels -1, 0 or 1 for 3 classes")
    weights = _class_weights("ce", class_weights, classes, logits)  # (C,)
    targets = targets.masked_fill(~mask[..., None], 0.0)
    return _sum(-(weights * targets * logits.log_softmax(-1)).sum(-1), mask)


@token_losses.register("mse", outputs="label", labels="any")
def mse(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    *,
    class_weights: Sequence[float] | torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Squared difference of the score of each annotated position and its label.

    $$
    L = \sum_{t, g} (z - label)^2
    $$

    See *Natural Language Processing: Neural Networks and Large Language Models* by T. Xiao and J. Zhu
    (https://github.com/NiuTrans/NLPBook), equation 10.70. The minus sign before the square there is a slip: training
    minimises the square.

    Args:
        logits (`torch.Tensor` of shape `(B, T, G, 1)`):
            Scores z, on the scale of the labels.
        labels (`torch.Tensor` of shape `(B, T, G)`):
            Any finite number.
        mask (`torch.BoolTensor` of shape `(B, T, G)`):
            True where a label is given.
        class_weights (*optional*):
            Not supported: a number has no class.

    Returns:
        `torch.Tensor` of shape `(B,)`, sums over the annotated positions.

    Raises:
        ValueError: on a wrong shape, a label that is not finite, or class weights.

    Example:

    ```python
    >>> logits, labels = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1), torch.tensor([1.0, 0.5]).view(1, 2, 1)
    >>> mse(logits, labels, torch.ones(1, 2, 1, dtype=torch.bool))
    tensor([1.2500])
    ```
    """
    if class_weights is not None:
        raise ValueError(f"`mse` cannot use class weights, found {class_weights}: drop them, or use `bce` or `hinge`.")
    logits, labels = _prepare("mse", logits, labels, mask, outputs=(1,))
    check_labels("mse", labels, mask & ~labels.isfinite(), "finite labels")
    return _sum((logits[..., 0] - labels.masked_fill(~mask, 0.0)).square(), mask)


@token_losses.register("hinge", outputs="sign", labels="sign")
def hinge(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    *,
    class_weights: Sequence[float] | torch.Tensor | None = None,
    margin: float = 1.0,
) -> torch.Tensor:
    r"""
    Hinge loss of each annotated position: 0 once the score has the right sign and is at least a margin from 0.

    $$
    L = \sum_{t, g} w_y \max(0, m - y z), \qquad y \in \{-1, +1\}
    $$

    See *Natural Language Processing: Neural Networks and Large Language Models* by T. Xiao and J. Zhu
    (https://github.com/NiuTrans/NLPBook), equation 10.71, where m is 1.

    Args:
        logits (`torch.Tensor` of shape `(B, T, G, 1)`):
            Scores z.
        labels (`torch.Tensor` of shape `(B, T, G)`):
            +1 for good and -1 for bad, or 1 and 0. A batch with both -1 and 0 raises an error: 0 would be a third
            class, which this loss does not have (mask it). One batch cannot show whether a data set mixes both, so
            check the data set too, as the trainer does.
        mask (`torch.BoolTensor` of shape `(B, T, G)`):
            True where a label is given.
        class_weights (sequence of two `float`, *optional*):
            w for bad and for good, at least 0; as in [`bce`].
        margin (`float`, *optional*, defaults to `1.0`):
            m > 0.

    Returns:
        `torch.Tensor` of shape `(B,)`, sums over the annotated positions.

    Raises:
        ValueError: on a wrong shape, another label, bad class weights, or a margin that is not above 0.

    Example:

    ```python
    >>> logits, labels = torch.tensor([2.0, 0.5]).view(1, 2, 1, 1), torch.tensor([1.0, -1.0]).view(1, 2, 1)
    >>> hinge(logits, labels, torch.ones(1, 2, 1, dtype=torch.bool))
    tensor([1.5000])
    ```
    """
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"`hinge` needs a finite margin above 0, found {margin}.")
    logits, labels = _prepare("hinge", logits, labels, mask, outputs=(1,))
    negative, zero = mask & (labels == -1), mask & (labels == 0)
    check_labels("hinge", labels, mask & ~(negative | zero | (labels == 1)), "labels +1 and -1, or 1 and 0")
    if negative.any():
        check_labels("hinge", labels, zero, "labels +1 and -1 or 1 and 0, not -1 beside 0")
    bad, good = _class_weights("hinge", class_weights, 2, logits)
    z, is_good = logits[..., 0], labels == 1  # (B, T, G)
    return _sum(torch.where(is_good, good * (margin - z).relu(), bad * (margin + z).relu()), mask)


def averaging_items(mask: torch.Tensor, how: Literal["token", "sequence"] = "token") -> torch.Tensor:
    """
    What each sequence adds to the divisor of [`average`].

    A trainer sums these numbers over all batches and processes of an accumulation window, and passes the sum to
    [`average`] as `num_items`.

    Args:
        mask (`torch.BoolTensor` of shape `(B, T, G)`):
            True where a label is given.
        how (`str`, *optional*, defaults to `"token"`):
            `"token"`: the number of annotated positions. `"sequence"`: 1 if the sequence has any, else 0.

    Returns:
        `torch.LongTensor` of shape `(B,)`.

    Raises:
        ValueError: if `how` is neither.
    """
    if how not in ("token", "sequence"):
        raise ValueError(f"Averaging is by 'token' or by 'sequence', found {how!r}.")
    counts = mask.flatten(1).sum(1)  # (B,)
    return counts if how == "token" else counts.clamp(max=1)


def averaging_terms(
    sums: torch.Tensor, mask: torch.Tensor, how: Literal["token", "sequence"] = "token"
) -> torch.Tensor:
    """
    What each sequence adds to the numerator of [`average`]: its sum for `"token"`, its mean for `"sequence"`.

    The arguments are those of [`average`]. Returns a `torch.Tensor` of shape `(B,)`.
    """
    if sums.shape != mask.shape[:1]:
        raise ValueError(f"sums must have the shape ({len(mask)},), found {tuple(sums.shape)}.")
    return sums / mask.flatten(1).sum(1).clamp(min=1) if how == "sequence" else sums


def average(
    sums: torch.Tensor,
    mask: torch.Tensor,
    how: Literal["token", "sequence"] = "token",
    num_items: torch.Tensor | float | None = None,
) -> torch.Tensor:
    r"""
    What one batch contributes to the mean loss, from the sums that a token loss returns.

    $$
    L_{token} = \frac{\sum_b L_b}{\sum_b n_b}, \qquad
    L_{sequence} = \frac{1}{|\{b : n_b > 0\}|} \sum_{b : n_b > 0} \frac{L_b}{n_b}
    $$

    where n_b is the number of annotated positions in sequence b, over all of its categories. With `"token"`, a
    completion weighs as much as it has labels. With `"sequence"`, each completion with a label weighs the same. Both
    sums run over the whole accumulation window. If `num_items` is the window's total of [`averaging_items`], the
    contributions of its batches add up to the loss of one large batch, however the labels are spread. (DDP averages
    gradients, so multiply by the number of processes.)

    Args:
        sums (`torch.Tensor` of shape `(B,)`):
            What the loss returned.
        mask (`torch.BoolTensor` of shape `(B, T, G)`):
            The mask it was given.
        how (`str`, *optional*, defaults to `"token"`):
            `"token"` or `"sequence"`.
        num_items (`torch.Tensor` or `float`, *optional*):
            Total of [`averaging_items`] over the window. Defaults to the total of this batch.

    Returns:
        `torch.Tensor` of shape `()`; 0 if nothing is annotated.

    Raises:
        ValueError: on an unknown `how`, or sums that are not `(B,)`.

    Example:

    ```python
    >>> sums, mask = torch.tensor([3.0, 5.0]), torch.tensor([[True, True, True], [True, False, False]])[..., None]
    >>> average(sums, mask), average(sums, mask, "sequence")  # 8 / 4 and (3 / 3 + 5 / 1) / 2
    (tensor(2.), tensor(3.))
    ```
    """
    items = averaging_items(mask, how)  # (B,)
    total = torch.as_tensor(items.sum() if num_items is None else num_items, device=sums.device)
    return averaging_terms(sums, mask, how).sum() / total.clamp(min=1)
