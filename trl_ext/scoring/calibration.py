r"""Calibration: from scores to probabilities that can be believed, fitted on held-out rows and stored with the model.

A score difference d of two completions is read as log-odds: \\( P = \\sigma(d) \\) is how sure the model is. A
temperature T makes that \\( \\sigma(d / T) \\); an isotonic map puts any rising curve in place of the sigmoid. Neither
changes which of two completions wins. See *On Calibration of Modern Neural Networks* by C. Guo et al.
(https://huggingface.co/papers/1706.04599). It knows numbers and the field of `reward_model.json`, and no models.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.optimize import isotonic_regression, minimize_scalar
from scipy.special import expit, logit

from trl_ext.models.sidecar import read_sidecar


Method = Literal["temperature", "isotonic"]
METHODS = ("temperature", "isotonic")
# The temperatures that are tried. One at an end of the range means that the rows do not determine it.
COLDEST, HOTTEST = 1e-3, 1e3
# Probabilities of an isotonic map stay so far from 0 and 1, so that their log-odds are finite.
EDGE = 1e-3


def fit_calibration(
    margins: Sequence[float],
    labels: Sequence[float] | None = None,
    method: Method = "temperature",
    normalizer: dict[str, float] | None = None,
    probabilities: bool = False,
) -> dict[str, Any]:
    """
    Fit a calibration on held-out rows.

    Args:
        margins (`Sequence[float]` of length `N`):
            For pairs, the score of the better less that of the worse completion; for outcomes, the score as log-odds.
        labels (`Sequence[float]` of length `N`, *optional*): for outcomes, 1 (right) and 0 (wrong). Pairs have none.
        method (`str`, *optional*, defaults to `"temperature"`): or `"isotonic"`, which wants some hundreds of rows.
        normalizer (`dict`, *optional*): what the scores were normalised by; the calibration is valid for it alone.
        probabilities (`bool`, *optional*, defaults to `False`):
            Whether the model gives outcomes as probabilities, whose log-odds are the margins.

    Returns:
        `dict`: what `reward_model.json` holds as `calibration`: `method`, `of` (`"pairs"` or `"outcomes"`), `rows`,
        `normalizer`, `probabilities`, and `temperature`, or the knots `x` and `y` of the map.

    Raises:
        `ValueError`: an unknown method, fewer than ten rows, or rows that do not determine a temperature because all
            of them are ordered right, or no better than by chance.

    Example:

    >>> margins = [2.0, 2.0, 2.0, -2.0] * 10  # 75 % are ordered right: log-odds of 1.1, not of 2
    >>> round(fit_calibration(margins)["temperature"], 2)
    1.82
    """
    if method not in METHODS:
        raise ValueError(f"The calibration method is {method!r}; needed: one of {', '.join(METHODS)}.")
    x = np.asarray(margins, dtype=float)
    y = np.ones(len(x)) if labels is None else (np.asarray(labels, dtype=float) > 0.5).astype(float)
    if len(x) != len(y):
        raise ValueError(f"Found {len(x)} margins and {len(y)} labels; needed: one for each.")
    x, y = x[np.isfinite(x)], y[np.isfinite(x)]
    if len(x) < 10:
        raise ValueError(f"{len(x)} rows have a finite score; a calibration needs at least 10, better some hundreds.")
    about = {"method": method, "of": "pairs" if labels is None else "outcomes", "rows": len(x)}
    about |= {"normalizer": None if normalizer is None else dict(normalizer), "probabilities": probabilities}
    if method == "isotonic":
        if labels is None:  # a pair is a pair from either side
            x, y = np.r_[x, -x], np.r_[y, 1 - y]
        places, which, sizes = np.unique(x, return_inverse=True, return_counts=True)
        rising = isotonic_regression(np.bincount(which, y) / sizes, weights=sizes).x
        inner = np.r_[True, (np.diff(rising[:-1]) != 0) | (np.diff(rising[1:]) != 0), True]  # ends of each step
        inner = inner if len(inner) == len(places) else np.ones(len(places), dtype=bool)
        return about | {"x": places[inner].tolist(), "y": np.clip(rising[inner], EDGE, 1 - EDGE).tolist()}
    signed = x * (2 * y - 1)
    found = minimize_scalar(
        lambda log: float(np.logaddexp(0.0, -signed / math.exp(log)).mean()),
        bounds=(math.log(COLDEST), math.log(HOTTEST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    temperature = math.exp(found.x)
    if not 1.01 * COLDEST < temperature < 0.99 * HOTTEST:
        right = float((signed > 0).mean())
        raise ValueError(
            f"{right:.0%} of the {len(x)} rows are ordered right, which determines no temperature; needed: rows of "
            "which the model gets some, but not all, right."
        )
    return about | {"temperature": temperature}


def calibrated_margins(margins: Sequence[float], calibration: dict[str, Any]) -> np.ndarray:
    """The margins as calibrated log-odds, `(N,)`: their sigmoid is the probability."""
    margins = np.asarray(margins, dtype=float)
    if calibration["method"] == "temperature":
        return margins / calibration["temperature"]
    return logit(np.interp(margins, calibration["x"], calibration["y"]))


def calibrated_scores(scores: Sequence[float | None], calibration: dict[str, Any]) -> list[float | None]:
    """Single scores as calibrated log-odds; `None` stays `None`."""
    there = np.array([score for score in scores if score is not None], dtype=float)
    there = as_log_odds(there) if calibration["probabilities"] else there
    found = iter(calibrated_margins(there, calibration).tolist())
    return [None if score is None else next(found) for score in scores]


def as_log_odds(probabilities: np.ndarray) -> np.ndarray:
    """Log-odds of probabilities, which are kept off 0 and 1."""
    return logit(np.clip(probabilities, EDGE, 1 - EDGE))


def preference_probabilities(margins: Sequence[float], calibration: dict[str, Any] | None) -> list[float]:
    """P(the first of two completions is better) for each score difference."""
    margins = np.asarray(margins, dtype=float)
    return expit(margins if calibration is None else calibrated_margins(margins, calibration)).tolist()


def check_usable(calibration: dict[str, Any] | None, normalizer: dict[str, float] | None, name: str) -> None:
    """Raise `ValueError` unless single scores can be calibrated: there is one, for them, and for this normaliser."""
    if calibration is None:
        raise ValueError(
            f"{name} is to give calibrated scores, but none is stored with the model. Fit one: "
            "`scorer.fit_calibration(...)`, or `trl-ext evaluate --model FOLDER --calibrate temperature`."
        )
    if calibration["method"] == "isotonic" and calibration["of"] == "pairs":
        raise ValueError(
            f"The stored calibration of {name} is an isotonic map of pairs, which a single score cannot go through. "
            "Call `scorer.preference_probabilities(...)`, or fit a temperature."
        )
    check_normalizer(calibration, normalizer, name)


def check_normalizer(calibration: dict[str, Any], normalizer: dict[str, float] | None, name: str) -> None:
    """Raise `ValueError` unless the calibration was fitted on scores with this normaliser."""
    if calibration["normalizer"] != normalizer:
        raise ValueError(
            f"The stored calibration of {name} was fitted on scores with another normaliser "
            f"({calibration['normalizer']}; now {normalizer}). Fit the calibration again."
        )


def store_calibration(folder: str | Path, calibration: dict[str, Any]) -> None:
    """Write a calibration into a folder's `reward_model.json`. Raises `ValueError` where there is none."""
    sidecar = read_sidecar(folder)
    if sidecar is None:
        raise ValueError(f"{folder} has no reward_model.json to hold a calibration; needed: a model saved by trl_ext.")
    sidecar.calibration = calibration
    sidecar.save(folder)
