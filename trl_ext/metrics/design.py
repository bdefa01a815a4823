"""Which experiments to run next: greedy designs that take the value of a whole batch into account.

Pure functions of vectors. They do not know what a row is, or where its vectors come from.
"""

import torch


def information_gain(vectors: torch.Tensor) -> torch.Tensor:
    r"""
    What each row alone says, in nats: \\( \frac{1}{2} \log \det (I + X X^\top) \\).

    Args:
        vectors (`torch.Tensor` of shape `(N, R, H)`):
            X of each row, so that \\( X^\top X \\) is its Fisher information in coordinates in which the prior has the
            precision I. Rows of zeros change nothing.

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    return _half_log_determinant(vectors @ vectors.mT)


def greedy_determinant(vectors: torch.Tensor, n: int) -> tuple[list[int], list[float]]:
    r"""
    Choose `n` rows one by one, each time the one that adds most information to those chosen before (D-optimal design).

    The information of a batch is \\( \frac{1}{2} \log \det (I + \sum_i X_i^\top X_i) \\). Similar rows share what they
    say, so the second of two alike is worth less. The gain of a row can only fall while others are chosen, and the
    greedy batch has at least 63 % of the information of the best one. See *Active Reward Modeling: Adaptive Preference
    Labeling for Large Language Model Alignment* by Y. Shen et al. (https://huggingface.co/papers/2502.04354).

    Args:
        vectors (`torch.Tensor` of shape `(N, R, H)`): as in [`information_gain`].
        n (`int`): how many rows, at most N.

    Returns:
        `(rows, gains)`: row numbers in the order in which they were chosen, and what each added. Among equal gains the
        lower row number wins.

    Example:

    ```python
    >>> rows = torch.tensor([[[2.0, 0.0]], [[1.9, 0.0]], [[0.0, 1.0]]])
    >>> greedy_determinant(rows, 2)[0]
    [0, 2]
    ```
    """
    size, rank, width = vectors.shape
    inner = vectors @ vectors.mT  # (N, R, R): X A^-1 X^T, with A the information so far
    flat = vectors.reshape(-1, width)  # (N * R, H)
    basis = vectors.new_zeros(width, 0)  # A^-1 = I - basis basis^T
    chosen: list[int] = []
    gains: list[float] = []
    for _ in range(n):
        gain = _half_log_determinant(inner)
        gain[chosen] = -torch.inf
        best = int(gain.argmax())
        chosen.append(best)
        gains.append(float(gain[best]))
        direction = vectors[best].T - basis @ (basis.T @ vectors[best].T)  # (H, R)
        scale = torch.linalg.cholesky(torch.eye(rank).to(inner) + inner[best])
        direction = torch.linalg.solve_triangular(scale, direction.T, upper=False).T
        basis = torch.cat([basis, direction], dim=1)
        shared = (flat @ direction).view(size, rank, rank)
        inner = inner - shared @ shared.mT
    return chosen, gains


def k_centre(directions: torch.Tensor, n: int, first: int = 0) -> list[int]:
    r"""
    Choose `n` rows one by one, each time the one that is farthest from all chosen before (greedy k-centre).

    The distance is \\( 1 - \cos^2 \\) of the angle between two vectors: it does not matter which completion of a pair
    comes first. See *Active Learning for Convolutional Neural Networks: A Core-Set Approach* by O. Sener and
    S. Savarese (https://huggingface.co/papers/1708.00489).

    Args:
        directions (`torch.Tensor` of shape `(N, H)`): one vector per row.
        n (`int`): how many rows, at most N.
        first (`int`, *optional*, defaults to `0`): the row to begin with.

    Returns:
        `list[int]`: row numbers in the order in which they were chosen.
    """
    unit = torch.nn.functional.normalize(directions, dim=-1)
    distance = torch.full((len(unit),), torch.inf, dtype=unit.dtype)
    chosen = [first]
    while len(chosen) < n:
        distance = torch.minimum(distance, 1 - (unit @ unit[chosen[-1]]).square())
        distance[chosen] = -torch.inf
        chosen.append(int(distance.argmax()))
    return chosen[:n]


def _half_log_determinant(inner: torch.Tensor) -> torch.Tensor:
    """Half the log determinant of I + S for S of shape (N, R, R), positive semidefinite up to rounding."""
    if inner.shape[-1] == 1:
        return inner[:, 0, 0].clamp_min(0.0).log1p() / 2
    return torch.linalg.eigvalsh(inner).clamp_min(0.0).log1p().sum(-1) / 2
