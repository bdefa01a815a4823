"""The comparison that the cases of trainers share: training on padded rows beside training on our rows.

It measures the two sides, and shows them: a line for a case, a table and a plot for a report. It knows runs and their
summaries. It does not know trainers.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_ext.bench.runner import Run, apart, formatted, in_turns, medians, mib, place, plot_bars, ratios_of_turns


def padded_beside_ours(
    train: Mapping[str, Callable[..., Run]], repeats: int, tokens: float | None = None
) -> dict[str, Any]:
    """
    Compare training on padded rows with training on our rows.

    Args:
        train (`Mapping`): trains a side once, first `"padded"` and then ours; `logging_steps=1` makes it log each
            loss.
        repeats (`int`): timed runs of each side, in turns.
        tokens (`float`, *optional*): tokens of text in a step, for `tokens_per_second`.

    Returns:
        `dict` with

        - `sides`: for each side the seconds and CPU seconds of a step, tokens per second, peak memory in MiB, tokens
          that the model processed, and the share of batches laid out as flat rows
        - `speedup`, `cpu_speedup`: time of the padded side over ours (above 1: ours is faster), each the median of
          `speedup_of_turns`; `speedup_interval`, `cpu_speedup_interval`: see [`interval_of_turns`]
        - `token_bound`: tokens of the padded side over our tokens; `fraction_of_bound`: `cpu_speedup` over this bound
        - `loss_max_difference`: the largest difference between the two sides' losses, of `losses_compared`
    """
    theirs, ours = train
    losses = {side: run(logging_steps=1).losses for side, run in train.items()}
    runs = in_turns(train, repeats)
    sides = {
        side: medians(found, tokens, "_per_step")
        | {"model_tokens": found[0].model_tokens, "flat_batches": found[0].flat_batches}
        for side, found in runs.items()
    }
    bound = sides[theirs]["model_tokens"] / sides[ours]["model_tokens"]
    turns = ratios_of_turns(runs[theirs], runs[ours])
    cpu_speedup = statistics.median(turns["cpu"])
    return {
        "sides": sides,
        "speedup": statistics.median(turns["wall"]),
        "speedup_interval": interval_of_turns(turns["wall"]),
        "cpu_speedup": cpu_speedup,
        "cpu_speedup_interval": interval_of_turns(turns["cpu"]),
        "speedup_of_turns": turns,
        "token_bound": bound,
        "fraction_of_bound": cpu_speedup / bound,
        "loss_max_difference": apart(losses[theirs], losses[ours]),
        "losses_compared": len(losses[theirs]),
    }


def interval_of_turns(ratios: Sequence[float]) -> list[float] | None:
    """
    The 95 % interval of a ratio from those of several turns: Student's t on their logarithms.

    Returns `None` for a single turn, which says nothing about the spread.
    """
    from scipy import stats

    if len(ratios) < 2:
        return None
    logs = [math.log(ratio) for ratio in ratios]
    half = stats.t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return [math.exp(statistics.fmean(logs) - half), math.exp(statistics.fmean(logs) + half)]


def line_of(case: Mapping[str, Any]) -> str:
    """A case in one line, for the terminal while others are measured."""
    ratios = f"{case['speedup']:.2f}x (CPU time {case['cpu_speedup']:.2f}x, bound {case['token_bound']:.2f})"
    return f"{case['name']}: {ratios}"


def table_of(
    report: Mapping[str, Any], size: tuple[str, str], names: tuple[str, str] = ("padded", "ours"), explained: str = ""
) -> str:
    """
    The report of such a comparison as a table for the terminal.

    Args:
        report (`dict`): with `cases`, each of which holds a `name` and what [`padded_beside_ours`] returns. A case may
            name its other side in `baseline`.
        size (`tuple[str, str]`): a key of the cases, the size of a batch, and its title.
        names (`tuple[str, str]`, *optional*): titles of the two sides.
        explained (`str`, *optional*): a line below the table.
    """
    key, title = size
    theirs, ours = names
    head = ["(P, C, K)", "beside", title, "flat", f"{theirs} s", f"{ours} s", "wall", "CPU", "95 %", "bound"]
    rows = [[*head, "CPU/bound", f"tokens/s {theirs}", ours, f"MiB {theirs}", ours, "loss diff"]]
    for case in report["cases"]:
        padded, flat = case["sides"].values()
        rows.append(
            [
                case["name"],
                "TRL" if case.get("baseline", "").startswith("trl.") else "padded rows",
                str(case[key]),
                f"{flat['flat_batches']:.0%}",
                f"{padded['seconds_per_step']:.3f}",
                f"{flat['seconds_per_step']:.3f}",
                f"{case['speedup']:.2f}x",
                f"{case['cpu_speedup']:.2f}x",
                interval(case["cpu_speedup_interval"]),
                f"{case['token_bound']:.2f}",
                f"{case['fraction_of_bound']:.0%}",
                f"{padded['tokens_per_second']:,.0f}",
                f"{flat['tokens_per_second']:,.0f}",
                mib(padded["peak_memory_mib"]),
                mib(flat["peak_memory_mib"]),
                f"{case['loss_max_difference']:.0e}",
            ]
        )
    said = (
        f"wall and CPU: time of {theirs} / {ours} of a whole optimizer step, the median over the turns; above 1: ours "
        "is faster. 95 %: interval of the CPU ratio over the turns."
    )
    return "\n".join(filter(None, (formatted(rows), explained, said, place(report))))


def interval(bounds: Sequence[float] | None) -> str:
    """An interval as a table cell."""
    return "-" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def plot_speedups(report: Mapping[str, Any], title: str, path: Path) -> bool:
    """Plot time ratios and token bound of every case as bars. Returns `False` if matplotlib is not installed."""
    cases = report["cases"]
    series = {
        "time ratio (wall)": [case["speedup"] for case in cases],
        "time ratio (CPU)": [case["cpu_speedup"] for case in cases],
        "token bound": [case["token_bound"] for case in cases],
    }
    title = f"{title}\n{report['machine']}, {report['dtype']}"
    return plot_bars(path, [case["name"] for case in cases], series, "times faster", title)
