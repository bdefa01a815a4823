"""The comparison that the cases of trainers share: training on padded rows beside training on our rows.

It knows runs and their summaries. It does not know trainers.
"""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from trl_ext.bench.runner import Run, apart, in_turns, medians, ratios_of_turns


def padded_beside_ours(train: Mapping[str, Callable[..., Run]], repeats: int, tokens: float) -> dict[str, Any]:
    """
    Compare training on padded rows (`"padded"`) with training on our rows (`"trl_ext"`).

    Args:
        train (`Mapping`): trains a side once; `logging_steps=1` makes it log each loss.
        repeats (`int`): timed runs of each side, in turns.
        tokens (`float`): tokens of text in a step.

    Returns:
        `dict` with `sides`, `speedup`, `cpu_speedup`, `speedup_of_turns`, `token_bound`, `fraction_of_bound`,
        `loss_max_difference` and `losses_compared`.
    """
    losses = {side: run(logging_steps=1).losses for side, run in train.items()}
    runs = in_turns(train, repeats)
    sides = {
        side: medians(found, tokens, "_per_step")
        | {"model_tokens": found[0].model_tokens, "flat_batches": found[0].flat_batches}
        for side, found in runs.items()
    }
    bound = sides["padded"]["model_tokens"] / sides["trl_ext"]["model_tokens"]
    turns = ratios_of_turns(runs["padded"], runs["trl_ext"])
    cpu_speedup = statistics.median(turns["cpu"])
    return {
        "sides": sides,
        "speedup": statistics.median(turns["wall"]),
        "cpu_speedup": cpu_speedup,
        "speedup_of_turns": turns,
        "token_bound": bound,
        "fraction_of_bound": cpu_speedup / bound,
        "loss_max_difference": apart(losses["padded"], losses["trl_ext"]),
        "losses_compared": len(losses["padded"]),
    }
