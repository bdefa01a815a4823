"""Learns a weight for each member of an ensemble from preferences that no member was trained on.

It knows arrays of score differences, and scikit-learn. It knows nothing of models or texts.
"""

import math
from typing import Literal

import numpy as np


FusionMethod = Literal["logistic", "bma"]


def fit_fusion_weights(differences: np.ndarray, method: FusionMethod = "logistic", l2: float = 1.0) -> list[float]:
    r"""
    Learn weights of the members such that the weighted sum of their scores is a Bradley-Terry score.

    Let $\Delta_{im}$ be the score of the chosen minus that of the rejected text of pair i by member m.

    - `"logistic"`: the w that minimise $\sum_i -\log \sigma(\sum_m w_m \Delta_{im}) + \frac{l2}{2} |w|^2$. Members
      with equal scores share their weight. A member that adds nothing to the others gets a weight near 0, which may be
      negative.
    - `"bma"`: Bayesian model averaging with equal prior weights. The formula above, with one member alone, first gives
      each member a scale $a_m$. Its posterior is $p_m \propto \prod_i \sigma(a_m \Delta_{im})$, and its weight is
      $p_m a_m$. Scores are averaged, not probabilities. The more pairs there are, the more weight the best member
      gets: use it to find one good member, rarely to combine several similar ones.

    Args:
        differences (`numpy.ndarray` of shape `(P, M)`):
            Score of the chosen minus score of the rejected text, for P pairs that no member was trained on.
        method (`str`, *optional*, defaults to `"logistic"`):
            `"logistic"` or `"bma"`.
        l2 (`float`, *optional*, defaults to `1.0`):
            Strength of the penalty, above 0; scikit-learn's default.

    Returns:
        `list[float]`: M weights.

    Raises:
        `ValueError`: there are fewer than two pairs, a difference is not finite, or the method is unknown.
        `ImportError`: scikit-learn is not installed.
    """
    differences = np.asarray(differences, dtype=np.float64)
    if differences.ndim != 2 or len(differences) < 2 or differences.shape[1] < 1:
        raise ValueError(f"Found differences of shape {differences.shape}; needed: (pairs, members), 2 pairs or more.")
    if not np.isfinite(differences).all():
        raise ValueError("A score difference is not finite; needed: finite numbers. Check the members' scores.")
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
            "Fitting a fusion needs scikit-learn, which is not installed: pip install 'trl-ext[fusion]'. Fitted "
            "weights work without it."
        ) from error
    # each pair enters in both orders with half the weight; without this an intercept would learn the order
    both = np.concatenate([differences, -differences])
    labels = np.repeat([1, 0], len(differences))
    fitted = LogisticRegression(C=1 / l2, fit_intercept=False, tol=1e-8, max_iter=1000).fit(
        both, labels, sample_weight=np.full(len(both), 0.5)
    )
    return fitted.coef_[0].tolist()
