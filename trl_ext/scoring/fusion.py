"""Learning how much each member of an ensemble counts, from preferences that no member was trained on.

Knows arrays of score differences, and scikit-learn. Knows nothing of models or texts.
"""

import math
from typing import Literal

import numpy as np


FusionMethod = Literal["logistic", "bma"]


def fit_fusion_weights(differences: np.ndarray, method: FusionMethod = "logistic", l2: float = 1.0) -> list[float]:
    r"""
    Weights of the members, such that the weighted sum of scores is as a Bradley-Terry score.

    With $\Delta_{im}$ the score of the chosen less that of the rejected text of pair i by member m:

    - `"logistic"`: the w that minimise $\sum_i -\log \sigma(\sum_m w_m \Delta_{im}) + \frac{l2}{2} |w|^2$. Members
      that say the same share their weight; one that is worth nothing beside the others gets about 0 and may get less.
    - `"bma"`: Bayesian model averaging with equal prior weights. Each member first gets a scale $a_m$ of its own, by
      the formula above with that member alone; $p_m \propto \prod_i \sigma(a_m \Delta_{im})$ is its posterior, and its
      weight is $p_m a_m$. Scores are averaged, not probabilities. With more pairs the best member takes all: it is
      the way to find one good member, and rarely to combine several that are alike.

    Args:
        differences (`numpy.ndarray` of shape `(P, M)`):
            Chosen less rejected, of P pairs that no member was trained on.
        method (`str`, *optional*, defaults to `"logistic"`):
            One of the above.
        l2 (`float`, *optional*, defaults to `1.0`):
            Strength of the penalty, above 0; scikit-learn's default.

    Returns:
        `list[float]`: M weights.

    Raises:
        `ValueError`: fewer than two pairs, differences that are not finite, or another method.
        `ImportError`: scikit-learn is not installed.
    """
    differences = np.asarray(differences, dtype=np.float64)
    if differences.ndim != 2 or len(differences) < 2 or differences.shape[1] < 1:
        raise ValueError(f"Found differences of shape {differences.shape}; needed: (pairs, members), 2 pairs or more.")
    if not np.isfinite(differences).all():
        raise ValueError("A score difference is not finite: check what the members say of each text.")
    if not l2 > 0:
        raise ValueError(f"l2={l2}; needed: a number above 0, else separable pairs have no finite weights.")
    if method == "logistic":
        return _logistic(differences, l2)
    if method != "bma":
        raise ValueError(f"method={method!r}; needed: 'logistic' or 'bma'.")
    scales = [_logistic(column[:, None], l2)[0] for column in differences.T]
    fits = [-np.logaddexp(0, -scale * column).sum() for scale, column in zip(scales, differences.T, strict=True)]
    odds = [math.exp(fit - max(fits)) for fit in fits]
    return [float(scale * own / math.fsum(odds)) for scale, own in zip(scales, odds, strict=True)]


def _logistic(differences: np.ndarray, l2: float) -> list[float]:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            "Fitting a fusion needs scikit-learn, which is not installed: pip install 'trl-ext[fusion]'. Weights that "
            "were fitted before work without it."
        ) from error
    # every pair is seen from both sides, with half the weight: an intercept could learn nothing but which came first
    both = np.concatenate([differences, -differences])
    labels = np.repeat([1, 0], len(differences))
    fitted = LogisticRegression(C=1 / l2, fit_intercept=False, tol=1e-8, max_iter=1000).fit(
        both, labels, sample_weight=np.full(len(both), 0.5)
    )
    return fitted.coef_[0].tolist()
