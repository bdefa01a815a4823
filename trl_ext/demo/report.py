"""What the demo found: `report.json`, a table, a plot, and whether the reward models earned their keep.

It knows the results of stages and turns them into files and text. Nothing here trains or samples.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_ext.demo.progress import clock
from trl_ext.pipelines.stages.cached_stages import Outcome


PICKS = ("random", "majority", "best_of_n", "oracle")

# What chose the rows of the stage `rejection`.
ARMS = {
    "random": "a draw: the control",
    "verifier": "the verifier",
    "orm": "the outcome model",
    "reward": "the reward model (Plackett-Luce)",
}

# How many standard errors a gain must be larger than to count (two-sided 95 %).
SAMPLING_ERROR = 1.96

# The largest change of a score by saving and reloading, as a share of the scores' standard deviation; the first bound
# is that of a base in fp32, the second that of one in 4 bits.
MAX_RELOAD_DIFFERENCE = {False: 1e-4, True: 1e-2}


def make_report(
    outcomes: Mapping[str, Outcome], *, seed: int, smoke: bool, seconds: float, wandb_dir: str | None
) -> dict[str, Any]:
    """
    The content of `report.json`.

    Args:
        outcomes (`Mapping[str, Outcome]`):
            By name, those of [`~trl_ext.demo.plan.plan`].
        seed (`int`):
            The seed of the run.
        smoke (`bool`):
            Whether it was a smoke run, whose figures mean nothing and give no verdict.
        seconds (`float`):
            How long this run took, without the stages that were there already.
        wandb_dir (`str`, *optional*):
            Where the offline runs of Weights & Biases are, if there are any.

    Returns:
        `dict`: `random`, `majority`, `best_of_n`, `oracle` (of the stage `reward`, each with `mean` and
        `standard_error`), `greedy`, `passed` (`None` for a smoke run), `failures`, `seconds`, `wandb_dir`, and
        `stages`: by name the `title`, the result, `seconds` when it ran, and `cached`.
    """
    failures = [] if smoke else find_failures(outcomes)
    main = outcomes["reward"].result
    return {
        "seed": seed,
        "smoke": smoke,
        "passed": None if smoke else not failures,
        "failures": failures,
        "greedy": outcomes["samples"].result["greedy"],
        **{name: main[name] for name in PICKS},
        "seconds": seconds,
        "wandb_dir": wandb_dir,
        "stages": {
            name: {
                "title": outcome.title,
                **outcome.result,
                "seconds": outcome.seconds,
                "cached": outcome.cached,
            }
            for name, outcome in outcomes.items()
        },
    }


def find_failures(outcomes: Mapping[str, Outcome]) -> list[str]:
    """
    One sentence for each reward model that does not beat a random pick, or scores otherwise after a reload, and if
    fine-tuning on what the verifier chose is no better than on what was drawn at random.
    """
    failures = []
    for name, outcome in _with_picks(outcomes).items():
        gain = outcome.result["best_of_n_over_random"]
        bound = SAMPLING_ERROR * gain["standard_error"]
        if not gain["mean"] > bound:
            failures.append(
                f"{name}: the best of {outcome.result['n']} by the model is right {gain['mean']:+.3f} more often than "
                f"a random pick; needed: more than {bound:.3f}, the sampling error"
            )
        limit = MAX_RELOAD_DIFFERENCE[name.endswith("nf4")] * outcome.result["score_std"]
        if not outcome.result["reload_difference"] <= limit:
            failures.append(
                f"{name}: scores moved by up to {outcome.result['reload_difference']:.2g} when the checkpoint was "
                f"reloaded; allowed: {limit:.2g}"
            )
    gain = outcomes["rejection"].result["arms"]["verifier"]["over_random"]
    bound = SAMPLING_ERROR * gain["standard_error"]
    if not gain["mean"] > bound:
        failures.append(
            f"rejection: trained on the verifier's choice the policy is right {gain['mean']:+.3f} more often than "
            f"trained on a random one; needed: more than {bound:.3f}, the sampling error"
        )
    return failures


def format_table(report: Mapping[str, Any]) -> str:
    """The report for people: picks with their standard errors, then stages with their times."""
    samples = report["stages"]["samples"]
    models = _models(report["stages"])
    size = samples["samples_each"]
    lines = [
        f"Right answers on {samples['prompts']['held_out']} held-out prompts, {size} samples each (± standard error)",
        "",
        f"  {'greedy answer of the policy':<50}{report['greedy']:.3f}",
        _pick_line("random pick", report["random"]),
        _pick_line("majority vote", report["majority"]),
        *(
            _pick_line(f"best of {result['n']} by {result['title']}", result["best_of_n"])
            + f"   gain over random {_with_error(result['best_of_n_over_random'], '+')}"
            for result in models.values()
        ),
        *(
            _pick_line(f"best of {result['n']} by {result['title']}, prod", result["best_of_n_prod"])
            for result in models.values()
            if "best_of_n_prod" in result
        ),
        *(
            _pick_line(f"best of {result['n']} by {result['title']}, {name}", figure)
            for result in models.values()
            for name, figure in result.get("best_of_n_by", {}).items()
        ),
        *(_pick_line(f"vote weighted by {result['title']}", result["weighted_vote"]) for result in models.values()),
        _pick_line("oracle (any of them right)", report["oracle"]),
        "",
        *_rejection_lines(report["stages"]["rejection"]),
        "",
        *_weak_to_strong_lines(report["stages"]["weak_to_strong"]),
        "",
        f"  {'stage':<50}{'time':>6}",
    ]
    for stage in report["stages"].values():
        note = "   (kept from an earlier run)" if stage["cached"] else ""
        lines.append(f"  {stage['title']:<50}{clock(stage['seconds']):>6}{note}")
    lines.append(f"  {'this run':<50}{clock(report['seconds']):>6}")
    return "\n".join(lines)


def save_plot(report: Mapping[str, Any], path: Path) -> bool:
    """Draws how often the pick is right against the number of samples. `False` where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    models = _models(report["stages"])
    oracle = next(iter(models.values()))["curve"]
    sizes = [point["n"] for point in oracle]
    axes.plot(sizes, [point["oracle"] for point in oracle], "--", color="black", label="oracle")
    for result in models.values():
        curve = result["curve"]
        error = SAMPLING_ERROR * result["best_of_n"]["standard_error"]
        line = axes.plot(sizes, [point["best_of_n"] for point in curve], "o-", label=f"best of n by {result['title']}")
        axes.errorbar(sizes[-1], curve[-1]["best_of_n"], yerr=error, color=line[0].get_color(), capsize=3)
        axes.plot(1.06 * sizes[-1], result["weighted_vote"]["mean"], "x", color=line[0].get_color())
    axes.plot([], [], "x", color="black", label=f"vote of {sizes[-1]}, weighted by that model")
    for name, style in (("majority", "-."), ("random", ":")):
        axes.axhline(report[name]["mean"], linestyle=style, color="grey", label=f"{name} (of {sizes[-1]})")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(xlabel="samples n", ylabel="right answers on held-out prompts")
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def save_report(report: Mapping[str, Any], path: Path) -> None:
    """Writes `report.json`; a number that is not finite is an error."""
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _with_picks(outcomes: Mapping[str, Outcome]) -> dict[str, Outcome]:
    return {name: outcome for name, outcome in outcomes.items() if "best_of_n" in outcome.result}


def _models(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {name: result for name, result in stages.items() if "best_of_n" in result}


def _rejection_lines(result: Mapping[str, Any]) -> list[str]:
    lines = ["Right samples of the policy on the same prompts, fine-tuned on its own samples, chosen by", ""]
    lines.append(_pick_line("nothing yet: before", result["before"]))
    for name, arm in result["arms"].items():
        line = _pick_line(ARMS[name], arm["exact_match"]) + f"   of its {arm['rows']} rows {arm['right']:.2f} right"
        if name != "random":
            line += f"; gain over random {_with_error(arm['over_random'], '+')}"
        lines.append(line)
    return lines


def _weak_to_strong_lines(result: Mapping[str, Any]) -> list[str]:
    lines = [f"Greedy answers that are right, of {result['test_rows']} held-out prompts", ""]
    titles = {
        "weak": "a smaller model, trained on solutions",
        "student": "the policy, trained on its solutions",
        "ceiling": "the policy, trained on the right ones",
    }
    lines += [f"  {title:<50}{result[name]:.3f}" for name, title in titles.items()]
    if result["pgr"] is None:
        return [*lines, f"  performance gap recovered: undefined, {result['reason']}"]
    low, high = result["pgr_interval"]
    return [*lines, f"  {'performance gap recovered':<50}{result['pgr']:.2f} (95 %: {low:.2f} to {high:.2f})"]


def _with_error(figure: Mapping[str, float], sign: str = "") -> str:
    return f"{figure['mean']:{sign}.3f} ± {figure['standard_error']:.3f}"


def _pick_line(name: str, figure: Mapping[str, float]) -> str:
    return f"  {name:<50}{_with_error(figure)}"
