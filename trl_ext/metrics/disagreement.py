"""How much the members of an ensemble disagree, and whether they disagree where the ensemble is wrong.

Pure functions of scores. Disagreement is always a population standard deviation over the members (divided by M). This
module knows nothing of models or reducers.
"""

import torch


def member_disagreement(scores: torch.Tensor) -> torch.Tensor:
    """
    The disagreement of the members about each item: the population standard deviation of their scores.

    Args:
        scores (`torch.Tensor` of shape `(M, ...)`): scores of the members, all on one scale.

    Returns:
        `torch.Tensor` of shape `(...)`, 0 for one member.
    """
    return scores.std(dim=0, correction=0) if len(scores) > 1 else torch.zeros_like(scores[0])


def group_disagreement(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    The disagreement of the members about the candidates of each group, without differences of level.

    From each score the member's mean score of the group is subtracted. The result is the [`member_disagreement`] of
    these values, averaged over the candidates. (Losses of comparisons do not fix a member's level.)

    Args:
        scores (`torch.Tensor` of shape `(M, B, K)`): scores of the members.
        mask (`torch.BoolTensor` of shape `(B, K)`): True for a real candidate.

    Returns:
        `torch.Tensor` of shape `(B,)`, fp32.

    Example:

    ```python
    >>> scores = torch.tensor([[[1.0, -1.0]], [[5.0, 1.0]]])  # level 0 and 3, differences 2 and 4
    >>> group_disagreement(scores, torch.ones(1, 2, dtype=torch.bool))
    tensor([0.5000])
    ```
    """
    scores = scores.float().masked_fill(~mask, 0.0)
    count = mask.sum(-1)  # (B,)
    level = scores.sum(-1) / count  # (M, B)
    spread = member_disagreement(scores - level[..., None])  # (B, K)
    return (spread * mask).sum(-1) / count


def pair_disagreement(differences: torch.Tensor) -> torch.Tensor:
    """
    The disagreement of the members about a pair: the population standard deviation of their score differences.

    Args:
        differences (`torch.Tensor` of shape `(P, M)`):
            Each member's score of the better text minus that of the worse text, all on one scale.

    Returns:
        `torch.Tensor` of shape `(P,)`, 0 for one member.
    """
    return member_disagreement(differences.T)


def relative_disagreement(differences: torch.Tensor) -> torch.Tensor:
    """
    [`pair_disagreement`] divided by the absolute mean difference: how unsure the members are which text is better.

    The standard deviation alone grows with the difference. Pairs of very different texts are the easiest and can have
    the largest standard deviation.

    Returns:
        `torch.Tensor` of shape `(P,)`, infinite where the mean difference is 0.
    """
    size = differences.mean(dim=1).abs()
    return torch.where(size > 0, pair_disagreement(differences) / size, torch.inf)


def error_by_disagreement(margins: torch.Tensor, disagreement: torch.Tensor, bins: int = 10) -> list[dict[str, float]]:
    """
    The share of wrongly ordered pairs, from the pairs that members agree on most to those they agree on least.

    Disagreement is useful if the error rate rises with it.

    Args:
        margins (`torch.Tensor` of shape `(P,)`):
            The ensemble's score of the better text minus that of the worse text. A pair with a margin of at most 0 is
            wrong, as in [`~trl_ext.metrics.ranking.pair_accuracy`].
        disagreement (`torch.Tensor` of shape `(P,)`):
            Disagreement about each pair, see [`pair_disagreement`].
        bins (`int`, *optional*, defaults to `10`):
            Number of bins; 10 gives deciles. Their sizes differ by at most one pair.

    Returns:
        `list[dict]`: for each bin `pairs`, `disagreement` (mean) and `error` (share of pairs). Pairs with equal
        disagreement that do not fit into one bin are divided in their order.

    Raises:
        ValueError: fewer pairs than bins.

    Example:

    ```python
    >>> error_by_disagreement(torch.tensor([1.0, -1.0, 2.0, 0.5]), torch.tensor([0.25, 1.0, 0.5, 0.75]), bins=2)
    [{'pairs': 2, 'disagreement': 0.375, 'error': 0.0}, {'pairs': 2, 'disagreement': 0.875, 'error': 0.5}]
    ```
    """
    size = len(margins)
    if disagreement.shape != margins.shape or margins.dim() != 1:
        raise ValueError(
            f"Found margins of shape {tuple(margins.shape)} and disagreement of shape {tuple(disagreement.shape)}; "
            "needed: one of each per pair."
        )
    if not 1 <= bins <= size:
        raise ValueError(f"{size} pairs cannot fill bins={bins} bins; needed: at least one pair for each.")
    table = _by_bin((margins <= 0).double(), disagreement.double(), bins)
    return [{"pairs": count, "disagreement": spread, "error": error} for _, count, spread, error in table]


def error_by_decile(groups: list[tuple[float, float]]) -> list[list[float]]:
    """
    [`error_by_disagreement`] for groups that each have a disagreement and an error rate.

    Args:
        groups (`list[tuple[float, float]]`): disagreement and error rate; groups whose error is NaN are ignored.

    Returns:
        `list[list[float]]`: rows of decile (from 1), number of groups, mean disagreement, mean error rate. With fewer
        than ten groups some deciles have no row.

    Example:

    ```python
    >>> error_by_decile([(0.1, 0.0), (0.4, 1.0)])[-1]
    [10, 1, 0.4, 1.0]
    ```
    """
    known = torch.tensor([group for group in groups if group[1] == group[1]], dtype=torch.float64).view(-1, 2)
    return _by_bin(known[:, 1], known[:, 0], bins=10)


def _by_bin(errors: torch.Tensor, disagreement: torch.Tensor, bins: int) -> list[list[float]]:
    """A row for each bin that is not empty: bin (from 1), number of items, mean disagreement and mean error."""
    order, size = disagreement.argsort(stable=True), len(errors)
    rows = []
    for number in range(bins):
        part = order[number * size // bins : (number + 1) * size // bins]
        if len(part):
            rows.append([number + 1, len(part), disagreement[part].mean().item(), errors[part].mean().item()])
    return rows


def error_auc(margins: torch.Tensor, disagreement: torch.Tensor) -> float | None:
    """
    The chance that a wrongly ordered pair has more disagreement than a rightly ordered one; ties count half.

    It is 0.5 if disagreement says nothing about errors, and 1 if it separates wrong from right pairs. `None` if all
    pairs are right or all are wrong.

    Arguments as in [`error_by_disagreement`].
    """
    wrong, right = disagreement[margins <= 0].double(), disagreement[margins > 0].double()
    if not len(wrong) or not len(right):
        return None
    above = torch.searchsorted(right.sort().values, wrong, side="left")
    not_below = torch.searchsorted(right.sort().values, wrong, side="right")
    return ((above + not_below).double().mean() / (2 * len(right))).item()
