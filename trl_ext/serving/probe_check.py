"""Whether a server gives the scores that a reward model had when it was saved, and if not, what is wrong with it.

`reward_model.json` holds the token ids of a few probes and their scores. This module compares numbers. It sends
nothing.
"""

import math
from collections.abc import Callable, Sequence

from trl_ext.models.sidecar import Sidecar
from trl_ext.serving.server_pool import ServerError


Outputs = Sequence[Sequence[float]]

# The largest difference from the saved scores, as a share of the largest of them (at least 1). In fp32 vLLM's scores
# differ by up to 6.4e-5, and a model that it rounds to fp16 by more than 2e-3. In bf16 other kernels round otherwise.
TOLERANCE = {"float32": 1e-3}
ROUGH_TOLERANCE = 2e-2
# In less precision also this share of the probes' standard deviation: another base moves them by 0.12 to 0.54.
ROUGH_SHARE = 0.1


def matching_columns(found: Outputs, sidecar: Sidecar, server: str, model: str) -> slice:
    """
    Which of a server's outputs are those of a model: all, or of a base with the heads of several models some.

    Args:
        found (sequence of P lists of `float`): what the server gives for the probes, at their last token.
        sidecar ([`Sidecar`]): what the model is; with probes.
        server (`str`): where the server is, for messages.
        model (`str`): the model's name there, for messages.

    Raises:
        [`ServerError`]: they are not the saved scores.
    """
    size, width = sidecar.num_labels, min(map(len, found))
    saved = [sidecar.probes["scores"][start : start + size] for start in range(0, len(found) * size, size)]
    if width < size or any(len(row) != width for row in found):
        raise ServerError(
            f"{model} at {server} has {width} outputs for a text; needed: the {size} that the model's "
            "reward_model.json describes. Serve that model, with its own labels."
        )
    candidates = [slice(start, start + size) for start in range(width - size + 1)]
    columns = min(candidates, key=lambda place: _largest_difference(found, saved, place))
    worst, allowed = _largest_difference(found, saved, columns), allowed_difference(sidecar)
    if worst > allowed:
        pairs = [(row[columns.start], own[0]) for row, own in zip(found, saved, strict=True)]
        pairs.sort(key=lambda pair: -abs(pair[0] - pair[1]))  # the worst first
        now, then = ([pair[place] for pair in pairs] for place in (0, 1))
        raise ServerError(
            f"{model} at {server} gives other scores than the saved model: the probes have {_numbers(now)} there and "
            f"had {_numbers(then)} when it was saved. The largest difference is {worst:.3g}; allowed: {allowed:.3g}. "
            f"{_cause(now, then, worst, sidecar)}"
        )
    return columns


def allowed_difference(sidecar: Sidecar) -> float:
    """The largest difference of a probe's score from the saved one, by the dtype that the model was saved in."""
    scores = sidecar.probes["scores"]
    size = max(1.0, *map(abs, scores))
    exact = sidecar.base.quantization is None and sidecar.base.dtype in TOLERANCE
    if exact:
        return TOLERANCE[sidecar.base.dtype] * size
    return max(ROUGH_TOLERANCE * size, ROUGH_SHARE * _deviation(scores))


def _largest_difference(found: Outputs, saved: Outputs, columns: slice) -> float:
    pairs = [pair for row, then in zip(found, saved, strict=True) for pair in zip(row[columns], then, strict=True)]
    differences = [abs(now - then) for now, then in pairs]
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def _cause(now: list[float], then: list[float], worst: float, sidecar: Sidecar) -> str:
    """What the numbers say is wrong, and what to do."""
    near = 0.02 * max(1e-3, _deviation(then))

    def is_like(change: Callable[[float], float]) -> bool:
        return all(abs(value - change(score)) <= near for value, score in zip(now, then, strict=True))

    if is_like(lambda score: 1 / (1 + math.exp(-max(-700.0, min(700.0, score))))):
        return "The server applies a sigmoid: it must honour use_activation=false, as vLLM 0.11 and newer do."
    own = sidecar.normalizer
    if own is not None and is_like(lambda score: (score - own["mean"]) / own["std"]):
        return "The server normalises scores, and so would this scorer: serve the model without a normaliser."
    if worst <= 0.05 * max(1.0, *map(abs, then)) and not math.isinf(worst):
        return f"It computes in less precision: start the server with --dtype {sidecar.base.dtype}."
    if _deviation(now) <= 1e-6:
        return "All probes have one score there: its head is not the trained one."
    return (
        "It is another adapter, another base, or a head that was not trained: start it with the command that "
        "`trl-ext serve-info FOLDER` prints."
    )


def _deviation(values: Sequence[float]) -> float:
    """The population standard deviation."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:3]) + (" ..." if len(values) > 3 else "")
