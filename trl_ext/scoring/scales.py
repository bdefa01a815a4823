"""The scales of a scorer: raw scores normalised and calibrated, and the probability that one completion is better.

It fits what puts scores on a scale, stores it with the model, and applies it. It knows a scorer's raw scores, and not
where they come from.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from trl_ext.data.tokenization import Completion, Prompt
from trl_ext.models.sidecar import read_sidecar, set_sidecar
from trl_ext.scoring.calibration import (
    Method,
    calibrated_scores,
    check_normalizer,
    check_usable,
    fit_calibration,
    preference_probabilities,
)
from trl_ext.scoring.normalizer import mean_and_std
from trl_ext.scoring.raw_scorer import check_lengths
from trl_ext.scoring.remote import RemoteModel


logger = logging.getLogger(__name__)


def changing_options(options: Mapping[str, Any]) -> list[str]:
    """Those of a scorer's options, or attributes, that give other scores than its model and its normaliser."""
    defaults = {"calibrated": False, "reference": None, "std_coefficient": 0.0}
    return [name for name, default in defaults.items() if options.get(name, default) != default]


def changing_readings(options: Mapping[str, Any]) -> list[str]:
    """Those of a scorer's options that make another number of the model's outputs than a scorer of its folder does."""
    return [name for name in ("aggregation", "segmenter") if options.get(name) is not None]


class Scales:
    """
    What `RewardScorer` inherits. It has `raw`, `choices`, `normalizer`, `calibration`, `calibrated`, `folder` and
    `model`.
    """

    def fit_normalizer(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], **columns: Any
    ) -> dict[str, float]:
        """
        Fit a normaliser, so that the scores of these rows get mean 0 and (population) standard deviation 1.

        Rankings do not change. If the scorer was made from a local folder with a `reward_model.json`, the normaliser
        is written there, and every scorer that is made from the folder later applies it. Else only this object has it,
        and so it does if the scorer has an `aggregation` or `segmenter`, because a normaliser holds for them alone. It
        replaces an existing normaliser. Arguments as in a call.

        Returns:
            `dict[str, float]`: `mean` and `std` of the raw scores.

        Raises:
            `ValueError`: fewer than two rows have a score, or all scores are equal.
        """
        self.normalizer = mean_and_std(self.raw.scores(prompts, completions, columns))
        self._store("normaliser", normalizer=dict(self.normalizer))
        return dict(self.normalizer)

    def preference_probabilities(
        self,
        prompts: Sequence[Prompt] | None,
        chosen: Sequence[Completion],
        rejected: Sequence[Completion],
        **columns: Any,
    ) -> list[float]:
        """
        P(the first completion is better than the second) of each row, by the stored calibration if there is one.

        A calibration of pairs is applied to the score difference. One of outcomes is applied to each score; the
        difference of the two log-odds then says which completion is right if one of them is.

        Raises:
            `ValueError`: a completion has no score, or the calibration was fitted with another normaliser.
        """
        better, worse = self._both(prompts, chosen, rejected, columns)
        calibration = self.calibration
        if calibration is not None:
            check_normalizer(calibration, self.normalizer, self.__name__)
            if calibration["of"] == "outcomes":
                better, worse = (calibrated_scores(scores, calibration) for scores in (better, worse))
                calibration = None
        return preference_probabilities(_margins(better, worse), calibration)

    def fit_calibration(
        self,
        prompts: Sequence[Prompt] | None,
        chosen: Sequence[Completion],
        rejected: Sequence[Completion],
        method: Method = "temperature",
        **columns: Any,
    ) -> dict[str, Any]:
        """
        Fit on held-out pairs how sure a score difference is, and store it with the model as `fit_normalizer` does.

        Args:
            prompts, chosen, rejected, **columns: pairs; rows that the model was not trained on.
            method (`str`, *optional*, defaults to `"temperature"`):
                Or `"isotonic"`, a rising curve, which only `preference_probabilities` can apply.

        Returns:
            `dict`: see [`~trl_ext.scoring.calibration.fit_calibration`], which also says what raises.
        """
        margins = _margins(*self._both(prompts, chosen, rejected, columns))
        self.calibration = fit_calibration(margins, method=method, normalizer=self.normalizer)
        self._store("calibration", calibration=self.calibration)
        return dict(self.calibration)

    def _store(self, what: str, **fitted: Any) -> None:
        """Write what was fitted into the folder's `reward_model.json`, if a scorer of the folder has these scores."""
        readings = changing_readings(self.choices)
        if readings:
            logger.warning(
                f"{self.__name__}: the {what} is not saved, because it holds only for scores with this "
                f"{' and '.join(readings)}. Fit it again wherever you make the scorer."
            )
            return
        sidecar = None if self.folder is None else read_sidecar(self.folder)
        if sidecar is None:
            logger.info(f"{self.__name__}: the {what} is not saved, because there is no local reward_model.json.")
            return
        vars(sidecar).update(fitted)
        sidecar.save(self.folder)
        if not isinstance(self.model, RemoteModel):
            set_sidecar(self.model, sidecar)

    def _both(self, prompts: Any, chosen: Any, rejected: Any, columns: Mapping[str, Any]) -> list[list[float]]:
        """The scores of the chosen and those of the rejected completions."""
        pairs = []
        for completions in (chosen, rejected):
            scores = self._uncalibrated(prompts, completions, columns)
            missing = next((row for row, score in enumerate(scores) if score is None), None)
            if missing is not None:
                raise ValueError(f"Row {missing} has a completion without a score. Remove the row.")
            pairs.append(scores)
        check_lengths(len(pairs[0]), {"rejected": pairs[1]})
        return pairs

    def _normalized(self, scores: list[float | None]) -> list[float | None]:
        if self.normalizer is None:
            return scores
        mean, std = self.normalizer["mean"], self.normalizer["std"]
        return [None if score is None else (score - mean) / std for score in scores]

    def _uncalibrated(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], columns: Mapping[str, Any]
    ) -> list[float | None]:
        return self._normalized(self.raw.scores(prompts, completions, columns))

    def _scaled(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], columns: Mapping[str, Any]
    ) -> list[float | None]:
        """Normalised and, where that was asked for, calibrated scores."""
        scores = self._uncalibrated(prompts, completions, columns)
        if not self.calibrated:
            return scores
        check_usable(self.calibration, self.normalizer, self.__name__)
        return calibrated_scores(scores, self.calibration)


def _margins(better: Sequence[float], worse: Sequence[float]) -> list[float]:
    """Score of the chosen less that of the rejected completion, of each row."""
    return [first - second for first, second in zip(better, worse, strict=True)]
