"""The table of planted biases: `python -m tests.evaluation.planted [seeds]`.

A synthetic scorer gets one bias of a known size. The table says in how many seeds its probe finds it, and how often
any other probe raises a false alarm; the last line has no bias at all.
"""

import sys

from tests.evaluation.test_probes import FEATURES, items, scorer
from trl_ext.evaluation.probes import run_probes


def table(seeds: int, effects: tuple[float, ...] = (0.4,)) -> list[tuple[str, float, int, int]]:
    """Bias, effect in standard deviations of the score, seeds in which it is found, seeds with a false alarm."""
    given, rows = items(), []
    for bias, effect in [(bias, effect) for bias in FEATURES for effect in effects] + [(None, 0.0)]:
        found = alarms = 0
        for seed in range(seeds):
            results = run_probes(scorer(seed, bias, effect), given, resamples=50, seed=seed)
            found += any(result.found for result in results if result.name == bias)
            alarms += any(result.found for result in results if result.name != bias)
        rows.append((bias or "none", effect, found, alarms))
        print(
            f"{rows[-1][0]:>18}  {effect:.1f} sd  found {found} of {seeds}  false alarms {alarms} of {seeds}",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    table(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
