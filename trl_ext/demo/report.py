"""The demo's report: `report.json`, a table, a plot, and a check that the reward models beat a random pick.

It knows the results of the stages and turns them into files and text. It does not train or sample.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_ext.pipelines.stages.cached_stages import Outcome
from trl_ext.pipelines.stages.progress import clock


PICKS = ("random", "majority", "best_of_n", "oracle")

# What selects the rows for each arm of the stage `rejection`.
ARMS = {
    "random": "a random draw (the control)",
    "verifier": "the verifier",
    "orm": "the outcome model",
    "reward": "the reward model (Plackett-Luce)",
}

# What rewards each arm of the stage `dense`.
DENSE_ARMS = {"outcome": "the outcome alone", "shaped": "the outcome, shaped by the process model"}

# A gain counts if it is larger than this many standard errors (two-sided 95 %).
SAMPLING_ERROR = 1.96

# The largest allowed change of a score after saving and reloading, as a share of the scores' standard deviation.
# `False` is the limit for a base in fp32, `True` that for a base in 4 bits.
MAX_RELOAD_DIFFERENCE = {False: 1e-4, True: 1e-2}


def make_report(
    outcomes: Mapping[str, Outcome], *, seed: int, smoke: bool, seconds: float, wandb_dir: str | None
) -> dict[str, Any]:
    """
    The content of `report.json`.

    Args:
        outcomes (`Mapping[str, Outcome]`):
            The outcome of each stage of [`~trl_ext.demo.plan.plan`], by name.
        seed (`int`):
            The seed of the run.
        smoke (`bool`):
            Whether it was a smoke run. Its figures mean nothing, so it neither passes nor fails.
        seconds (`float`):
            How long this run took, without the stages that an earlier run had finished.
        wandb_dir (`str`, *optional*):
            The folder with the offline runs of Weights & Biases; `None` if there are none.

    Returns:
        `dict`: `random`, `majority`, `best_of_n`, `oracle` (of the stage `reward`, each with `mean` and
        `standard_error`), `greedy`, `passed` (`None` for a smoke run), `failures`, `seconds`, `wandb_dir`, and
        `stages`, which maps each name to the stage's `title`, its result, the `seconds` it took and `cached`.
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
    Describes each failure in one sentence. A reward model fails if it does not beat a random pick, or if its scores
    change when it is reloaded. Rejection sampling fails if the verifier's selection is no better than a random one.
    """
    failures = []
    for name, outcome in _with_picks(outcomes).items():
        gain = outcome.result["best_of_n_over_random"]
        bound = SAMPLING_ERROR * gain["standard_error"]
        if not gain["mean"] > bound:
            failures.append(
                f"{name}: best of {outcome.result['n']} by this model gains {gain['mean']:+.3f} over a random pick; "
                f"needed: more than {bound:.3f}, the sampling error"
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
            f"rejection: training on the verifier's selection gains {gain['mean']:+.3f} over training on a random "
            f"selection; needed: more than {bound:.3f}, the sampling error"
        )
    return failures


def format_table(report: Mapping[str, Any]) -> str:
    """The report as a table for people: the picks with their standard errors, then the stages with their times."""
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
        *_dense_lines(report["stages"]["dense"]),
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
    """
    Draws four panels: best of n by each reward model against the number of samples, the policy before and after
    fine-tuning on its samples, the same for GRPO, and weak to strong. Returns `False` if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(16, 5.2), layout="constrained", facecolor="white")
    curves, arms, dense, models = figure.subplots(1, 4, width_ratios=(5, 4, 3, 3))
    run = "smoke run, figures mean nothing" if report["smoke"] else f"seed {report['seed']}"
    figure.suptitle(f"trl-ext demo: sorting digits with a mediocre policy ({run}; bars: 95 % intervals)")
    _plot_picks(curves, report)
    labels = {"orm": "outcome\nmodel", "reward": "reward\nmodel", "random": "random\nchoice"}
    _plot_arms(arms, report["stages"]["rejection"], labels, "Fine-tuned on its own samples, chosen by")
    labels = {"outcome": "outcome\nalone", "shaped": "shaped by\nprocess model"}
    _plot_arms(dense, report["stages"]["dense"], labels, "GRPO with rewards from")
    _plot_weak_to_strong(models, report["stages"]["weak_to_strong"])
    for axes in (curves, arms, dense, models):
        axes.set_ylim(0, min(1.02, max(0.1, 1.05 * axes.get_ylim()[1])))
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)
    return True


def _plot_picks(axes: Any, report: Mapping[str, Any]) -> None:
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
    axes.set(xlabel="samples n", ylabel="right answers on held-out prompts", title="Which answer is picked")


def _plot_arms(axes: Any, result: Mapping[str, Any], labels: Mapping[str, str], title: str) -> None:
    figures = {"before": result["before"], **{name: arm["exact_match"] for name, arm in result["arms"].items()}}
    means = [figure["mean"] for figure in figures.values()]
    errors = [SAMPLING_ERROR * figure["standard_error"] for figure in figures.values()]
    colors = ["#9aa5b1" if name in ("before", "random", "outcome") else "#3b7dd8" for name in figures]
    axes.bar(range(len(figures)), means, yerr=errors, capsize=3, color=colors)
    axes.set_xticks(range(len(figures)), [labels.get(name, name) for name in figures])
    axes.set(ylabel="right samples of the policy", title=title)


def _plot_weak_to_strong(axes: Any, result: Mapping[str, Any]) -> None:
    names = {"weak": "weak\nsupervisor", "student": "strong\nstudent", "ceiling": "strong\nceiling"}
    values = [result[name] for name in names]
    bounds = result["intervals"] or dict(zip(names, zip(values, values, strict=True), strict=True))
    low = [max(0.0, value - bounds[name][0]) for name, value in zip(names, values, strict=True)]
    high = [max(0.0, bounds[name][1] - value) for name, value in zip(names, values, strict=True)]
    axes.bar(range(3), values, yerr=[low, high], capsize=3, color=["#9aa5b1", "#3b7dd8", "#2f9e6e"])
    axes.set_xticks(range(3), names.values())
    pgr = "undefined" if result["pgr"] is None else f"{result['pgr']:.2f}"
    axes.set(ylabel="right greedy answers", title=f"Weak to strong, PGR {pgr}")


def save_report(report: Mapping[str, Any], path: Path) -> None:
    """Writes `report.json`. Raises `ValueError` if a number is not finite."""
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


def _dense_lines(result: Mapping[str, Any]) -> list[str]:
    lines = [
        f"Right samples of the policy on the same prompts, after GRPO on {result['samples']} samples, rewarded by"
    ]
    lines += ["", _pick_line("nothing yet: before", result["before"])]
    for name, arm in result["arms"].items():
        line = _pick_line(DENSE_ARMS[name], arm["exact_match"])
        if "over_outcome" in arm:
            line += f"   gain over the outcome alone {_with_error(arm['over_outcome'], '+')}"
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
