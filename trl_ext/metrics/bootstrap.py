"""The bootstrap: units that belong to one group are drawn together, with replacement.

All bootstrap intervals of the package draw here. This module knows numbers and groups. It does not know what they
measure.
"""

from collections.abc import Hashable, Iterator, Sequence

import torch


# Numbers that are drawn at a time, so that many groups and resamples fit into memory.
_AT_ONCE = 500_000


def group_numbers(names: Sequence[Hashable]) -> tuple[torch.Tensor, int]:
    """
    Number the groups in the order in which they appear.

    Args:
        names (`Sequence[Hashable]` of length `N`): the group of each unit.

    Returns:
        `tuple[torch.Tensor, int]`: the number of each unit's group, `(N,)`, and how many groups there are.

    Example:

    >>> group_numbers(["b", "a", "b"])
    (tensor([0, 1, 0]), 2)
    """
    places: dict[Hashable, int] = {}
    numbers = [places.setdefault(name, len(places)) for name in names]
    return torch.tensor(numbers, dtype=torch.long), len(places)


def bootstrap_draws(count: int, resamples: int, seed: int) -> Iterator[torch.Tensor]:
    """
    Draw `count` of `count` groups with replacement, `resamples` times. The global random state does not change.

    Yields:
        `torch.Tensor` of shape `(r, count)`: the numbers of the drawn groups. The blocks have `resamples` rows
        together.
    """
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _AT_ONCE // count)
    for done in range(0, resamples, at_once):
        yield torch.randint(count, (min(at_once, resamples - done), count), generator=generator)


def bootstrap_means(
    values: torch.Tensor, groups: torch.Tensor, count: int, resamples: int = 2000, seed: int = 0
) -> torch.Tensor:
    """
    The mean of all drawn units, for each resample. Larger groups weigh more, as they do in the mean itself.

    Args:
        values (`torch.Tensor` of shape `(N,)` or `(N, M)`): one number for each unit, or M of them.
        groups (`torch.Tensor` of shape `(N,)`), count (`int`): as [`group_numbers`] returns them.
        resamples (`int`, *optional*, defaults to `2000`): number of means.
        seed (`int`, *optional*, defaults to `0`): seed of the draws.

    Returns:
        `torch.Tensor` of shape `(resamples,)` or `(resamples, M)`, fp64.
    """
    values = values.double()
    sums = values.new_zeros((count, *values.shape[1:])).index_add_(0, groups, values)  # (G,) or (G, M)
    sizes = torch.bincount(groups, minlength=count).double()  # (G,)
    alone = bool((sizes == 1).all())
    means = []
    for drawn in bootstrap_draws(count, resamples, seed):
        total = sums[drawn].sum(1)  # (r,) or (r, M)
        number = torch.full((len(drawn),), float(count)).double() if alone else sizes[drawn].sum(1)  # (r,)
        means.append(total / (number if values.dim() == 1 else number[:, None]))
    return torch.cat(means)
