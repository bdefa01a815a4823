"""The largest batch, length, group and rank that still fit on a card, each changed alone.

It knows the arguments that set these, and finds the largest value with a few estimates. Memory grows almost linearly
with each of them, so the next guess is the value at which the line through two estimates reaches the card's memory.
It does not know how an estimate is made.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from trl_ext.fit.config import Parsed, changed
from trl_ext.fit.rows import PolicySizes, Sizes


ESTIMATES = 6
"""The search for each value makes at most this many estimates."""
GROUP_LIMIT = 64
RANK_LIMIT = 1024


class Knob(NamedTuple):
    """
    A value of a config that can be enlarged.

    Args:
        name (`str`): its name in the table.
        now (`int`): its value in the config.
        step (`int`): tried values are multiples of it.
        most (`int`): larger values are not tried.
        set (`Callable`): returns the arguments and sizes with a given value.
    """

    name: str
    now: int
    step: int
    most: int
    set: Callable[[int], tuple[Parsed, Sizes]]


def knobs(command: str, parsed: Parsed, sizes: Sizes, config: Any) -> Iterator[Knob]:
    """What can be enlarged in a config."""
    training = parsed.training
    if training.max_tokens_per_batch is None:

        def rows(value: int) -> tuple[Parsed, Sizes]:
            return changed(parsed, {"per_device_train_batch_size": value}), replace(sizes, rows=value)

        together = 1 if command in ("reward", "ensemble") else sizes.candidates
        yield Knob("rows in a batch", sizes.rows, together, 4096 * together, rows)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)  # not every family has a limit

    def length(value: int) -> tuple[Parsed, Sizes]:
        prompt = max(1, round(value * sizes.prompt / sizes.length))
        longer = replace(sizes, prompt=prompt, completion=value - prompt)
        return changed(parsed, {"max_length": max(value, training.max_length or 0)}), longer

    if training.max_tokens_per_batch is None:
        yield Knob("tokens of a sequence", sizes.length, 16, positions or 2**20, length)
    if command in ("reward", "ensemble") and training.loss_type != "bradley_terry":
        yield Knob(
            "candidates of a group", sizes.candidates, 1, GROUP_LIMIT,
            lambda value: (parsed, replace(sizes, candidates=value)),
        )  # fmt: skip
    if parsed.model.use_peft:
        yield Knob(
            "rank of LoRA", parsed.model.lora_r, 8, RANK_LIMIT,
            lambda value: (changed(parsed, {"lora_r": value}), sizes),
        )  # fmt: skip


def policy_knobs(parsed: Parsed, sizes: PolicySizes) -> Iterator[Knob]:
    """What can be enlarged in the config of a policy."""
    training = parsed.training

    def generated(value: int) -> tuple[Parsed, PolicySizes]:
        return changed(parsed, {"steps_per_generation": value // sizes.rows}), replace(sizes, generated=value)

    def length(value: int) -> tuple[Parsed, PolicySizes]:
        longer = {"max_completion_length": max(value, training.max_completion_length)}
        return changed(parsed, longer), replace(sizes, completion=value)

    whole = math.lcm(sizes.rows, sizes.candidates)  # whole micro-batches and whole prompts
    yield Knob("completions generated at a time", sizes.generated, whole, 64 * sizes.generated, generated)
    yield Knob("tokens of a completion", sizes.completion, 16, 2**20, length)


def largest(gib: Callable[[int], float], knob: Knob, room: float) -> dict[str, Any]:
    """
    The largest value that fits.

    Args:
        gib (`Callable`): returns the estimate in GiB for a value.
        knob ([`Knob`]): the value to enlarge.
        room (`float`): GiB that may be used.

    Returns:
        `dict` with `name`, `now`, `largest` (`None` if not even the smallest value fits), its `gib`, and `bound`:
        `"card"` if the next larger value does not fit, `"limit"` if it is the largest value that was tried, and
        `"at least"` if the search used all of its estimates.
    """
    step, most = knob.step, max(knob.now, knob.most)

    def rounded(value: float) -> int:
        return max(step, min(int(value) // step * step, most))

    known = {knob.now: gib(knob.now)}
    while len(known) < ESTIMATES:
        fits = [value for value, size in known.items() if size <= room]
        fails = [value for value, size in known.items() if size > room]
        low, high = max(fits, default=0), min(fails, default=most + step)
        if high - low <= step or low == most:
            break
        if len(known) == 1:
            guess = 2 * knob.now if fits else knob.now / 2
        else:
            (a, at_a), (b, at_b) = sorted(known.items())[-2:] if not fails else _around(known, low, high)
            slope = (at_b - at_a) / (b - a)
            guess = a + (room - at_a) / slope if slope > 0 else most
        value = rounded(guess)
        if value == low:  # check whether the next larger value still fits
            value = low + step
        elif not low < value < high:
            value = max(low + step, rounded((low + high) / 2))
        if value in known:
            break
        known[value] = gib(value)
    fits = [value for value, size in known.items() if size <= room]
    fails = [value for value, size in known.items() if size > room]
    best = max(fits, default=None)
    found = {"name": knob.name, "now": knob.now, "largest": best, "gib": known.get(best), "bound": "at least"}
    if best == most:
        found["bound"] = "limit"
    elif fails and min(fails) - (best or 0) <= step:
        found["bound"] = "card"
    return found


def _around(known: dict[int, float], low: int, high: int) -> list[tuple[int, float]]:
    """Two estimates for the line: the nearest ones that fit and do not fit, or the two smallest that do not fit."""
    if low in known:
        return [(low, known[low]), (high, known[high])]
    return sorted(known.items())[:2]


def sentence(found: list[dict[str, Any]], room: float) -> str:
    """What still fits, in words."""
    words = []
    for case in found:
        if case["largest"] is None:
            words.append(f"{case['name']}: none")
        else:
            more = "at least " if case["bound"] == "at least" else ""
            tried = ", the most that was tried" if case["bound"] == "limit" else ""
            words.append(f"{case['name']}: {more}{case['largest']:,} (now {case['now']:,}{tried})")
    return f"The largest that fits in {room:g} GiB, each changed alone: {'; '.join(words)}."
