"""The table of planted biases: `python -m tests.evaluation.planted [seeds] [file]`.

A synthetic scorer gets one bias of a known size. The table says in how many seeds its probe finds it, and in how many
another probe raises a false alarm; the last line has no bias at all. With a file, the table is written as a result of
the documentation.
"""

import datetime
import json
import sys
from pathlib import Path

from tests.evaluation.test_probes import FEATURES, items, scorer
from trl_ext.evaluation.probes import run_probes


def count(bias: str | None, effect: float, seeds: int) -> tuple[int, int]:
    """In how many seeds the bias is found, and in how many any other probe says that it found one."""
    given, found, alarms = items(), 0, 0
    for seed in range(seeds):
        results = run_probes(scorer(seed, bias, effect), given, resamples=50, seed=seed)
        found += any(result.found for result in results if result.name == bias)
        alarms += any(result.found for result in results if result.name != bias)
    return found, alarms


def table(seeds: int, effect: float = 0.4) -> list[list[str]]:
    """Rows of bias, its effect, seeds in which it is found, and seeds with a false alarm; printed as they come."""
    rows = []
    for bias in [*FEATURES, None]:
        found, alarms = count(bias, effect, seeds)
        rows.append(
            [
                bias or "none",
                f"{effect:g} sd" if bias else "",
                f"{found} of {seeds}" if bias else "",
                f"{alarms} of {seeds}",
            ]
        )
        print("  ".join(cell.rjust(18) for cell in rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    rows = table(seeds)
    if len(sys.argv) > 2:
        result = {
            "title": "Planted biases and the probes that find them",
            "date": datetime.date.today().isoformat(),
            "machine": "any: nothing is timed",
            "command": [f"python -m tests.evaluation.planted {seeds} {sys.argv[2]}"],
            "note": "A synthetic scorer with one bias scores 60 completions with noise of 0.3 standard deviations for "
            "each change. A false alarm is a bias that another of the 13 probes reports.",
            "columns": ["planted bias", "effect", "found", "false alarms"],
            "rows": rows,
        }
        Path(sys.argv[2]).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
