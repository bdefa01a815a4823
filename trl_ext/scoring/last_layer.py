r"""The posterior of a reward model's last layer: a Gaussian over the weight of its head, from comparisons or outcomes.

A score is linear in the head's features, \\( s = w \\cdot \\phi \\). With the loss as the negative log likelihood and
a Gaussian prior, the Laplace approximation is

$$
p(w \mid D) \approx N(\hat w, \Lambda^{-1}), \qquad
\Lambda = \lambda I + \sum_i F_i^\top \frac{\partial^2 L_i}{\partial s_i \partial s_i^\top} F_i
$$

where \\( F_i \\) holds the features of the candidates of row i. See *Laplace Redux: Effortless Bayesian Deep Learning*
by E. Daxberger et al. (https://huggingface.co/papers/2106.14806).

This module knows features, scores and the posterior's file. It knows no text, and not how a model runs.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.optimize import brentq

from trl_ext.losses import plackett_luce
from trl_ext.models.sidecar import POSTERIOR_FILE


# The logarithms of the prior precisions among which the marginal likelihood chooses.
SMALLEST, LARGEST = math.log(1e-8), math.log(1e12)
STEP = 1e-4  # of a score, for the second derivatives of losses


class PosteriorError(ValueError):
    """There is no posterior, its file is damaged, or it belongs to another model."""


@dataclass
class LastLayerPosterior:
    """
    A Gaussian over the weight of the last layer.

    Args:
        weight (`torch.Tensor` of shape `(H,)`): the mean: the trained weight, with the bias last if there is one.
        factor (`torch.Tensor` of shape `(H, H)`): lower Cholesky factor of the precision.
        reference (`torch.Tensor` of shape `(H,)`):
            The features that standard deviations refer to: the mean of the completions it was fitted on, or zeros
            where a score has an absolute meaning (outcomes).
        prior_precision (`float`): lambda, above 0.
        chosen_by (`str`): `"marginal_likelihood"` or `"given"`.
        kind (`str`): kind of the reward model.
        rows (`int`): comparisons, rankings or outcomes that it was fitted on.
        data (`str`, *optional*): the cache key of these rows and of the model, if the caller gave one.
    """

    weight: torch.Tensor
    factor: torch.Tensor
    reference: torch.Tensor
    prior_precision: float
    chosen_by: str
    kind: str
    rows: int
    data: str | None = None

    def whiten(self, directions: torch.Tensor) -> torch.Tensor:
        """
        Coordinates in which the posterior has unit variance in every direction: the squared length of a result is the
        variance of the score difference that belongs to it.

        Args:
            directions (`torch.Tensor` of shape `(..., H)`): differences of features.

        Returns:
            `torch.Tensor` of shape `(..., H)`, fp32.
        """
        flat = directions.reshape(-1, directions.shape[-1]).float()
        solved = torch.linalg.solve_triangular(self.factor.float(), flat.T, upper=False)
        return solved.T.reshape(directions.shape)

    def std(self, features: torch.Tensor) -> torch.Tensor:
        """
        The standard deviation of each score's difference to the score of the reference.

        Args:
            features (`torch.Tensor` of shape `(N, H)`): features of completions.

        Returns:
            `torch.Tensor` of shape `(N,)`, fp32.
        """
        return self.whiten(features - self.reference).norm(dim=-1)

    def fits(self, weight: torch.Tensor) -> bool:
        """Whether a model's last layer is the one that the posterior was fitted on."""
        return weight.shape == self.weight.shape and torch.allclose(weight, self.weight, rtol=1e-5, atol=1e-7)

    def check_weight(self, weight: torch.Tensor, whose: str) -> None:
        """Raise [`PosteriorError`] unless a model's last layer is the one that the posterior was fitted on."""
        if not self.fits(weight):
            raise PosteriorError(
                f"The stored uncertainty of {whose} belongs to another model, or the model was trained further: its "
                "last layer differs. Call `scorer.fit_uncertainty(dataset)` again."
            )

    def digest(self) -> str:
        """A hash of the mean, the precision and the reference: what standard deviations depend on."""
        tensors = (self.weight, self.factor, self.reference)
        return hashlib.sha256(b"".join(tensor.float().numpy().tobytes() for tensor in tensors)).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `uncertainty/last_layer.safetensors` into the folder of a model."""
        path = Path(folder, POSTERIOR_FILE)
        path.parent.mkdir(exist_ok=True)
        about = {name: getattr(self, name) for name in ("prior_precision", "chosen_by", "kind", "rows", "data")}
        tensors = {name: getattr(self, name).float().contiguous() for name in ("weight", "factor", "reference")}
        save_file(tensors, path, metadata={"posterior": json.dumps(about)})


def read_posterior(folder: str | Path) -> LastLayerPosterior | None:
    """The posterior in a model's folder; `None` where there is none. Raises [`PosteriorError`] for a damaged file."""
    path = Path(folder, POSTERIOR_FILE)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("weight", "factor", "reference")}
            return LastLayerPosterior(**tensors, **json.loads(file.metadata()["posterior"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise PosteriorError(f"{path} cannot be read ({error}). Delete it, and fit the uncertainty again.") from error


# ------------------------------------------------------------------------------------------------------------- fitting
class Information:
    """
    Sums what rows say about the weight, batch by batch, and makes the posterior of it. Memory does not grow with rows.

    Args:
        size (`int`): number of features H.
    """

    def __init__(self, size: int):
        self.matrix = torch.zeros(size, size, dtype=torch.float64)
        self._sum = torch.zeros(size, dtype=torch.float64)
        self._completions = 0
        self.rows = 0

    def add(self, features: torch.Tensor, curvature: torch.Tensor, mask: torch.Tensor) -> None:
        """
        Add a batch of rows.

        Args:
            features (`torch.Tensor` of shape `(B, K, H)`): features of the candidates, 0 where there is none.
            curvature (`torch.Tensor` of shape `(B, K, K)`): second derivatives of each row's loss by its scores.
            mask (`torch.BoolTensor` of shape `(B, K)`): True for a real candidate.
        """
        parts = information_vectors(features.double(), curvature.double()).flatten(0, 1)  # (B * (K - 1 or 1), H)
        self.matrix += parts.T @ parts
        self._sum += features.double()[mask].sum(0)
        self._completions += int(mask.sum())
        self.rows += len(features)

    def posterior(
        self, weight: torch.Tensor, kind: str, prior_precision: float | None = None, data: str | None = None
    ) -> LastLayerPosterior:
        """
        The posterior around a trained weight (H,). Without a prior precision, that of the largest marginal likelihood.

        Raises:
            `ValueError`: there are no rows, the rows say nothing (all candidates alike), or the precision is not
                positive.
        """
        if not self.rows:
            raise ValueError("There are no rows to fit the uncertainty on; needed: the rows of training.")
        chosen_by = "marginal_likelihood" if prior_precision is None else "given"
        if prior_precision is None:
            prior_precision = best_prior_precision(torch.linalg.eigvalsh(self.matrix), weight.double())
        if not 0 < prior_precision < math.inf:
            raise ValueError(f"prior_precision={prior_precision}; needed: a number above 0.")
        precision = self.matrix + prior_precision * torch.eye(len(weight), dtype=torch.float64)
        mean = self._sum / self._completions
        return LastLayerPosterior(
            weight=weight.float().clone(),
            factor=torch.linalg.cholesky(precision).float(),
            reference=(torch.zeros_like(mean) if kind == "outcome" else mean).float(),
            prior_precision=float(prior_precision),
            chosen_by=chosen_by,
            kind=kind,
            rows=self.rows,
            data=data,
        )


def best_prior_precision(eigenvalues: torch.Tensor, weight: torch.Tensor) -> float:
    r"""
    The prior precision with the largest marginal likelihood of the Laplace approximation.

    It solves \\( \lambda \lVert w \rVert^2 = \sum_j e_j / (e_j + \lambda) \\): the left side grows with lambda and the
    right side, the number of well-determined parameters, falls. See *Bayesian Interpolation* by D. MacKay
    (https://doi.org/10.1162/neco.1992.4.3.415).

    Args:
        eigenvalues (`torch.Tensor` of shape `(H,)`): of the summed information.
        weight (`torch.Tensor` of shape `(H,)`): the trained weight.

    Raises:
        `ValueError`: the information or the weight is 0.
    """
    eigenvalues, size = eigenvalues.clamp_min(0.0), float(weight.square().sum())
    if not size > 0 or not eigenvalues.sum() > 0:
        raise ValueError(
            f"The marginal likelihood determines no prior precision: the squared weight of the head is {size:.3g}, "
            f"and the information of the rows {float(eigenvalues.sum()):.3g}. Train the head, give rows whose "
            "candidates differ, or pass `prior_precision`."
        )

    def slope(log: float) -> float:
        precision = math.exp(log)
        return precision * size - float((eigenvalues / (eigenvalues + precision)).sum())

    if slope(SMALLEST) >= 0 or slope(LARGEST) <= 0:
        return math.exp(SMALLEST if slope(SMALLEST) >= 0 else LARGEST)
    return math.exp(brentq(slope, SMALLEST, LARGEST, xtol=1e-10))


# ----------------------------------------------------------------------------------------------------------- curvature
def loss_curvature(
    scores: torch.Tensor, mask: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """
    The second derivatives of the loss of each row by its scores.

    Args:
        scores (`torch.Tensor` of shape `(B, K)`): scores of the candidates.
        mask (`torch.BoolTensor` of shape `(B, K)`): True for a real candidate.
        loss (`Callable`): takes the scores (fp64) and returns a loss for each row, (B,).

    Returns:
        `torch.Tensor` of shape `(B, K, K)`, fp64: symmetric, and 0 for padding.
    """
    scores = scores.detach().double()

    def slope(values: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            values = values.clone().requires_grad_()
            return torch.autograd.grad(loss(values).sum(), values)[0]  # (B, K)

    # differences of exact gradients, good to 1e-8 here: the second derivative of tied blocks by autograd is NaN
    steps = STEP * torch.eye(scores.shape[1], dtype=torch.float64)
    columns = [(slope(scores + step) - slope(scores - step)) / (2 * STEP) for step in steps]
    curvature = torch.stack(columns, dim=-1).masked_fill(~(mask[:, None] & mask[:, :, None]), 0.0)
    return (curvature + curvature.mT) / 2


def expected_curvature(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    The curvature of rows that nobody has ranked yet, as if the annotator agreed with the scores: (B, K, K), fp64.

    The curvature of a pair, p (1 - p), does not depend on which candidate wins, so for pairs this is the Fisher
    information. For more candidates that of the most probable order stands for the mean over all orders.
    """
    # places in place of scores: equal scores must not become a tie, which would say nothing
    places = scores.masked_fill(~mask, -math.inf).argsort(dim=1, stable=True).argsort(dim=1).double()
    return loss_curvature(scores, mask, lambda values: plackett_luce(values, places, mask))


def information_vectors(features: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
    r"""
    Vectors X of each row with \\( X^\top X = F^\top C F \\), the row's information about the weight.

    The curvature of comparisons does not change if all scores rise together, so it has rank K - 1 at most. The
    likelihood of tied ranks is not convex everywhere; negative eigenvalues count as 0.

    Args:
        features (`torch.Tensor` of shape `(B, K, H)`): F, 0 for padding.
        curvature (`torch.Tensor` of shape `(B, K, K)`): C.

    Returns:
        `torch.Tensor` of shape `(B, R, H)`: R is K - 1, or 1 for a single candidate. For a pair it is the difference
        of the features times the square root of p (1 - p).
    """
    values, vectors = torch.linalg.eigh(curvature.double())  # rising
    first = min(1, curvature.shape[1] - 1)  # the smallest is 0 for comparisons
    roots = values[:, first:].clamp_min(0.0).sqrt()[:, :, None] * vectors[:, :, first:].mT  # (B, R, K)
    return roots.to(features.dtype) @ features
