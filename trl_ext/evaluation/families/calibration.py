"""How well a calibration works on rows that it was not fitted on, and the calibration itself.

One half of the prompts is fitted on, and the calibration error of the other half is reported before and after. It
knows margins and labels. `trl_ext.scoring.calibration` fits and applies.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from trl_ext.evaluation.measures import Measure, calibration_error, part
from trl_ext.scoring.calibration import METHODS, calibrated_margins, fit_calibration


# The share of the prompts that calibrations are fitted on.
FITTED = 0.5


class Calibrations:
    """
    Calibrations of margins by every method.

    Args:
        margins (`np.ndarray` of shape `(N,)`): as [`~trl_ext.scoring.calibration.fit_calibration`] takes them.
        labels (`np.ndarray` of shape `(N,)`, *optional*): 1 and 0 for outcomes; `None` for pairs.
        clusters (`Sequence[Hashable]` of length `N`): prompts.
        probabilities (`bool`): whether the model gives outcomes as probabilities.
    """

    def __init__(
        self,
        margins: np.ndarray,
        labels: np.ndarray | None,
        clusters: Sequence[Hashable],
        probabilities: bool = False,
    ):
        self.margins, self.labels = margins, labels
        fitted = np.array([part(cluster, "calibration ") < FITTED for cluster in clusters], dtype=bool)
        self._other = np.flatnonzero(~fitted)
        self._clusters = [clusters[place] for place in self._other]
        self.found: dict[str, dict[str, Any]] = {}
        for method in METHODS:
            try:
                self.found[method] = fit_calibration(
                    margins[fitted],
                    None if labels is None else labels[fitted],
                    method,
                    probabilities=probabilities,
                )
            except ValueError:  # too few rows, or all of them right: there is nothing to fit, and no number to report
                continue

    def measures(self) -> Iterator[Measure]:
        """`temperature`, and the calibration error of the other half before and after."""
        if not self.found or not len(self._other):
            return
        if "temperature" in self.found:
            calibration = self.found["temperature"]
            note = "fitted on one half of the prompts"
            yield Measure("temperature", values=[calibration["temperature"]], size=calibration["rows"], note=note)
        yield self._error("ece_before_calibration", self.margins)
        for method, calibration in self.found.items():
            yield self._error(f"ece_after_{method}", calibrated_margins(self.margins, calibration))

    def _error(self, name: str, log_odds: np.ndarray) -> Measure:
        other = self._other
        if self.labels is None:  # how sure the model is of the one that it prefers
            chances, right = expit(np.abs(log_odds[other])), (log_odds[other] > 0).astype(float)
        else:
            chances, right = expit(log_odds[other]), self.labels[other]
        return Measure(
            name,
            function=lambda drawn: calibration_error(chances[drawn], right[drawn]),
            size=len(other),
            clusters=self._clusters,
        )
