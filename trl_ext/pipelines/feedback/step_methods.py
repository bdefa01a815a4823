"""Decides which prefixes of a solution get more rollouts, and turns the counts of rollouts into labels of steps.

A prefix is the text of the first steps of a solution. Its tally counts how many rollouts from there the verifier calls
right. This module knows tallies. It does not know texts, models or verifiers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


Method = Literal["full", "binary", "adaptive"]
METHODS = ("full", "binary", "adaptive")
Labels = Literal["soft", "hard"]


@dataclass(slots=True)
class Tally:
    """
    The rollouts of one prefix.

    Args:
        right, wrong (`int`): rollouts that the verifier calls right or wrong.
        unscored (`int`): rollouts for which the verifier returned `None`.
    """

    right: int = 0
    wrong: int = 0
    unscored: int = 0

    @property
    def seen(self) -> int:
        """All rollouts."""
        return self.right + self.wrong + self.unscored

    @property
    def share(self) -> float | None:
        """Right rollouts divided by scored rollouts; `None` if none was scored."""
        scored = self.right + self.wrong
        return self.right / scored if scored else None

    def add(self, right: bool | None) -> None:
        """Count one rollout. `None`: the verifier could not score it."""
        if right is None:
            self.unscored += 1
        elif right:
            self.right += 1
        else:
            self.wrong += 1


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """
    How steps are labelled; [`~trl_ext.label_steps`] explains the fields.

    Raises:
        ValueError: a value is out of its range, or two values exclude each other.
    """

    method: Method = "full"
    num_rollouts: int = 8
    labels: Labels | None = None
    threshold: float = 0.0
    error: float = 0.1
    reuse: bool = True
    denoise: bool = False
    min_confidence: float = 0.0
    tolerance: int = 2

    def __post_init__(self) -> None:
        checks = {
            "method": (self.method in METHODS, f"one of {', '.join(METHODS)}"),
            "num_rollouts": (self.num_rollouts >= 1, "a number of rollouts >= 1"),
            "labels": (self.labels in (None, "soft", "hard"), "'soft', 'hard' or None"),
            "threshold": (0 <= self.threshold < 1, "a share from 0 (any right rollout) to below 1"),
            "error": (0 < self.error < 1, "a probability between 0 and 1"),
            "min_confidence": (0 <= self.min_confidence < 1, "a share from 0 to below 1"),
            "tolerance": (self.tolerance >= 0, "a number of steps >= 0"),
        }
        for name, (fine, needed) in checks.items():
            if not fine:
                raise ValueError(f"{name}={getattr(self, name)!r}; needed: {needed}.")
        if self.labels == "soft" and self.method != "full":
            raise ValueError(
                f"labels='soft' with method={self.method!r}: a search does not estimate the share of every step. Use "
                "method='full', or labels='hard'."
            )

    @property
    def soft(self) -> bool:
        """Whether labels are shares."""
        return self.labels == "soft" or (self.labels is None and self.method == "full")

    @property
    def by_existence(self) -> bool:
        """Whether one right rollout makes a prefix right, and with it every earlier prefix of the solution."""
        return not self.soft and self.threshold == 0 and (self.reuse or self.method != "full")


def excludes(tally: Tally, threshold: float, error: float) -> bool:
    """
    Whether a confidence sequence for the rate of right rollouts excludes a threshold.

    With `s` right and `f` wrong rollouts the ratio `B(1 + s, 1 + f) / (p^s (1 - p)^f)` is a martingale if `p` is the
    true rate. It exceeds `1 / error` at any time with a probability of at most `error`, so you may look after every
    rollout. This is the prior-posterior ratio with a uniform prior; see *Confidence sequences for sampling without
    replacement* by I. Waudby-Smith and A. Ramdas (https://huggingface.co/papers/2006.04347).

    Args:
        tally ([`Tally`]): the rollouts.
        threshold (`float`): the rate `p`, between 0 and 1.
        error (`float`): probability that the sequence ever excludes the true rate, between 0 and 1.

    Example:

    ```python
    >>> excludes(Tally(right=6, wrong=0), 0.5, 0.1), excludes(Tally(right=7, wrong=0), 0.5, 0.1)
    (False, True)
    ```
    """
    s, f = tally.right, tally.wrong
    log_beta = math.lgamma(1 + s) + math.lgamma(1 + f) - math.lgamma(2 + s + f)
    return log_beta - s * math.log(threshold) - f * math.log1p(-threshold) >= -math.log(error)


def decide(tally: Tally, settings: StepSettings) -> bool | None:
    """
    Whether a prefix is right; `None` if that is not known yet, or if no rollout could be scored.

    With `threshold=0` one right rollout decides, and the prefix is wrong if all `num_rollouts` are wrong. With a
    positive threshold, the share of right rollouts decides at `num_rollouts`; `method="adaptive"` decides earlier if
    [`excludes`] does.
    """
    share = tally.share
    if share is None:
        return None
    if settings.threshold == 0 and tally.right:
        return True
    early = settings.method == "adaptive" and settings.threshold > 0
    if tally.seen >= settings.num_rollouts or (early and excludes(tally, settings.threshold, settings.error)):
        return share > settings.threshold
    return None


def first_error(tallies: Sequence[Tally], settings: StepSettings) -> tuple[int, int | None]:
    """
    Binary search for the first wrong prefix of a wrong solution, as in OmegaPRM (*Improve Mathematical Reasoning in
    Language Models by Automated Process Supervision* by L. Luo et al., https://huggingface.co/papers/2406.06592).

    The search assumes that no prefix after a wrong one is right.

    Args:
        tallies (sequence of [`Tally`]): the prefixes before the whole solution, from the shortest to the longest.

    Returns:
        `tuple[int, int | None]`: place of the first wrong prefix (`len(tallies)` is the whole solution), and the
        place that must be tested next; the first number is final only if the second is `None`.
    """
    decided = [decide(tally, settings) for tally in tallies]
    last_right = max((place for place, right in enumerate(decided) if right), default=-1)
    wrong = next((place for place in range(last_right + 1, len(tallies)) if decided[place] is False), len(tallies))
    if wrong - last_right == 1:
        return wrong, None
    return wrong, (last_right + wrong) // 2


def wanted(tallies: Sequence[Tally], right: bool, settings: StepSettings) -> dict[int, int]:
    """
    How many further rollouts each prefix needs now; empty if the labels are known.

    Args:
        tallies (sequence of [`Tally`]): the prefixes before the whole solution, from the shortest to the longest.
        right (`bool`): whether the whole solution is right.
        settings ([`StepSettings`]): how steps are labelled.
    """
    most = settings.num_rollouts
    if settings.method == "full":
        if right and (settings.denoise or settings.by_existence):
            return {}
        known = _last_right(tallies) if settings.by_existence else -1
        missing = {p: most - t.seen for p, t in enumerate(tallies) if p > known and t.seen < most}
        # rollouts from a short prefix may pass through longer ones, which then need fewer
        return dict(list(missing.items())[:1]) if settings.reuse else missing
    if right:
        return {}
    _, place = first_error(tallies, settings)
    if place is None:
        return {}
    seen = tallies[place].seen
    number = most - seen if settings.method == "binary" else min(max(1, seen), most - seen)
    return {place: number} if number > 0 else {}


def labels_of(
    tallies: Sequence[Tally], right: bool, settings: StepSettings, confidence: float | None = None
) -> list[float | None] | None:
    """
    The labels of the steps, when [`wanted`] is empty.

    Args:
        tallies, right, settings: as for [`wanted`].
        confidence (`float`, *optional*): share of right solutions of this prompt; needed with `denoise`.

    Returns:
        `list[float | None]`: a label for each prefix and for the whole solution. `None` in it: no rollout of this
        prefix could be scored. `None` in place of the list: a search could not decide a prefix for this reason.
    """
    if settings.method == "full" and not settings.denoise:
        if settings.soft:
            return [*(tally.share for tally in tallies), float(right)]
        known = len(tallies) if right else _last_right(tallies)
        found: list[float | None] = []
        for place, tally in enumerate(tallies):
            if settings.by_existence and place <= known:
                found.append(1.0)
            else:
                found.append(None if tally.share is None else float(tally.share > settings.threshold))
        return [*found, float(right)]
    if right:
        return [1.0] * (len(tallies) + 1)
    if settings.method == "full":
        if any(tally.share is None for tally in tallies):
            return None
        wrong = next((p for p, tally in enumerate(tallies) if tally.share <= settings.threshold), len(tallies))
    else:
        wrong, place = first_error(tallies, settings)
        if place is not None:
            return None
    found = [1.0] * wrong + [0.0] * (len(tallies) + 1 - wrong)
    if settings.denoise:
        for place in range(max(0, wrong - settings.tolerance), wrong):
            if tallies[place].share is not None:  # a search does not test every prefix
                found[place] = min(tallies[place].share / confidence, 1.0)
    return found


def _last_right(tallies: Sequence[Tally]) -> int:
    """The place of the longest prefix with a right rollout; -1 if there is none."""
    return max((place for place, tally in enumerate(tallies) if tally.right), default=-1)
