"""Whether an ensemble knows what it does not know: its error rate where its members agree and where they do not.

Pure functions of the members' score differences of preference pairs. It knows nothing of models or reducers.
"""

import torch


def pair_disagreement(differences: torch.Tensor) -> torch.Tensor:
    """
    How much members differ about a pair: the population standard deviation of their score differences.

    Args:
        differences (`torch.Tensor` of shape `(P, M)`):
            Score of the better less that of the worse text, by each member, all on one scale.

    Returns:
        `torch.Tensor` of shape `(P,)`, 0 for one member.
    """
    return differences.std(dim=1, correction=0)


def relative_disagreement(differences: torch.Tensor) -> torch.Tensor:
    """
    [`pair_disagreement`] over the size of the mean difference: how sure members are of which text is better.

    The standard deviation alone grows with the difference itself, so that pairs of very different texts, which are the
    easiest, can have the most of it.

    Returns:
        `torch.Tensor` of shape `(P,)`, infinite where the mean difference is 0.
    """
    size = differences.mean(dim=1).abs()
    return torch.where(size > 0, pair_disagreement(differences) / size, torch.inf)


def error_by_disagreement(margins: torch.Tensor, disagreement: torch.Tensor, bins: int = 10) -> list[dict[str, float]]:
    """
    The share of wrongly ordered pairs, from the pairs that members agree on most to those they agree on least.

    Disagreement is of use if the error rate rises with it.

    Args:
        margins (`torch.Tensor` of shape `(P,)`):
            Ensemble score of the better less that of the worse text. At most 0 is wrong, as in
            [`~trl_ext.metrics.ranking.pair_accuracy`].
        disagreement (`torch.Tensor` of shape `(P,)`):
            Of each pair, larger is more; see [`pair_disagreement`].
        bins (`int`, *optional*, defaults to `10`):
            Bins of equal size (by up to one pair): deciles.

    Returns:
        `list[dict]`: for each bin `pairs`, `disagreement` (mean) and `error` (share of pairs). Pairs of equal
        disagreement that do not fit into one bin are cut apart in their order.

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
    order = disagreement.double().argsort(stable=True)
    wrong = (margins <= 0).double()
    edges = [round(size * edge / bins) for edge in range(bins + 1)]
    parts = [order[start:end] for start, end in zip(edges[:-1], edges[1:], strict=True)]
    return [
        {
            "pairs": len(part),
            "disagreement": disagreement[part].double().mean().item(),
            "error": wrong[part].mean().item(),
        }
        for part in parts
    ]


def error_auc(margins: torch.Tensor, disagreement: torch.Tensor) -> float | None:
    """
    The chance that a wrongly ordered pair has more disagreement than a rightly ordered one, ties counting half: 0.5 if
    disagreement says nothing, 1 if it says all. `None` if all pairs are right or all are wrong.

    Arguments as in [`error_by_disagreement`].
    """
    wrong, right = disagreement[margins <= 0].double(), disagreement[margins > 0].double()
    if not len(wrong) or not len(right):
        return None
    above = torch.searchsorted(right.sort().values, wrong, side="left")
    not_below = torch.searchsorted(right.sort().values, wrong, side="right")
    return ((above + not_below).double().mean() / (2 * len(right))).item()
