"""`trl-ext bench fit` for configs of pipelines: every phase estimated and measured by itself, and the largest named.

Knows phases and numbers. Knows no models and none of the pipelines.
"""

import argparse
import importlib.util
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from trl_ext.bench.runner import formatted
from trl_ext.fit.changes import advise
from trl_ext.fit.config import attention_note, check_attention
from trl_ext.fit.phases import Phase
from trl_ext.fit.pipelines import PIPELINES
from trl_ext.fit.runs import GIB, measured, too_much_here


def measure_phases(command: str, args: argparse.Namespace) -> dict[str, Any]:
    """
    Estimate each phase, and measure where that can be done.

    Args:
        command (`str`): the folder of the pipeline's configs.
        args (`argparse.Namespace`): of `trl-ext bench fit`.

    Returns:
        `dict` with the `phases`, the name of the `largest`, whether all that is estimated `fits`, `not_estimated`, and
        `changes` and `advice` for `changed`: the largest of the phases that the config can change, and of these first
        one that does not fit.
    """
    phases = PIPELINES[command](args)
    if not args.estimate:
        for phase in phases:
            if phase.config is not None:
                check_attention(phase.config, phase.attention)
    found: dict[str, dict[str, Any]] = {}
    for phase in phases:
        same = found.get(phase.same_as)
        found[phase.name] = _found(phase, args) if same is None else _as_before(phase, same)
    known = {name: case for name, case in found.items() if case["estimate"] is not None}
    report: dict[str, Any] = {
        "command": command,
        "config": args.config,
        "gpu_memory": args.gpu_memory,
        "reserve": args.reserve,
        "phases": list(found.values()),
        "largest": None,
        "fits": None,
        "not_estimated": [name for name in found if name not in known],
        "changed": None,
        "changes": [],
        "advice": None,
    }
    if not known:
        return report
    largest = max(known, key=lambda name: known[name]["estimate"]["total_gib"])
    report |= {"largest": largest, "fits": all(case["fits"] for case in known.values())}
    able = [phase for phase in phases if phase.changes and phase.name in known]
    if able and not args.no_changes:
        phase = max(able, key=lambda p: (not known[p.name]["fits"], known[p.name]["estimate"]["total_gib"]))
        tight = [p.name for p in phases if p.same_as is None and p.name in known and not known[p.name]["fits"]]
        report |= {"changed": phase.name, "changes": _changes(command, phase, tight, args)}
        now = {"fits": report["fits"], "flops_per_row": known[phase.name]["estimate"]["flops"] / phase.rows}
        report["advice"] = advise(report["changes"], now)
    return report


def _found(phase: Phase, args: argparse.Namespace) -> dict[str, Any]:
    """A phase's part of the report."""
    import torch

    notes = [note for note in (phase.note, attention_note(phase.attention)) if note]
    case: dict[str, Any] = {
        "phase": phase.name,
        "model": phase.model,
        "batch": phase.batch,
        "note": ". ".join(notes) or None,
        "estimate": None,
        "fits": None,
        "dominates": None,
        "measured": None,
        "not_measured": "--estimate" if args.estimate else None,
    }
    if phase.estimate is None:
        return case | {"not_measured": "not estimated"}
    estimate = phase.estimate(True)
    case |= {"estimate": in_gib(estimate), "fits": _fits(phase, estimate, args)}
    case["dominates"] = dominates(estimate.parts())
    if case["fits"] and estimate.peak / GIB > args.gpu_memory - args.reserve:
        case["note"] = ". ".join([*notes, "a batch that does not fit is run in halves"])
    if args.estimate:
        return case
    if phase.run is None:
        case["not_measured"] = "no run of this kind of model here"
    else:
        case["not_measured"] = too_much_here(estimate.flops)
    if case["not_measured"] is None:
        with tempfile.TemporaryDirectory() as folder:
            run = partial(phase.run, Path(folder))
            case["measured"] = measured(run, args.gpu_memory, phase.estimate(torch.cuda.is_available()).activations)
    return case


def _fits(phase: Phase, estimate: Any, args: argparse.Namespace) -> bool:
    """Whether a phase fits on the card, in halves of its batch if it can be run so."""
    least = sum(estimate.weights.values()) if phase.halves else estimate.peak
    return least / GIB + args.reserve <= args.gpu_memory


def _as_before(phase: Phase, same: dict[str, Any]) -> dict[str, Any]:
    return same | {
        "phase": phase.name,
        "note": f"as {same['phase']}",
        "measured": None,
        "not_measured": "--estimate" if same["not_measured"] == "--estimate" else "as above",
    }


def _changes(command: str, phase: Phase, tight: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """What a phase would take after each change of the config, and whether all that are too `tight` now then fit."""
    found = []
    for change in phase.changes:
        given = argparse.Namespace(**vars(args))
        given.override = [*args.override, *(f"{name}={_yaml(value)}" for name, value in change.values.items())]
        try:
            new = {other.name: other for other in PIPELINES[command](given)}
            estimates = {name: new[name].estimate(True) for name in {phase.name, *tight}}
        except ValueError:  # what the change leads to cannot be trained or estimated
            continue
        own, fits = estimates[phase.name], all(_fits(new[name], one, args) for name, one in estimates.items())
        case = {"gib": own.peak / GIB, "fits": fits, "flops_per_row": own.flops / new[phase.name].rows}
        found.append(change._asdict() | case)
    return found


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def in_gib(estimate: Any) -> dict[str, Any]:
    """An `Estimate` as it is reported."""
    return {
        "gib": {name: size / GIB for name, size in estimate.parts().items()},
        "total_gib": estimate.peak / GIB,
        "saved_for_backward_gib": estimate.saved / GIB,
        "flops": estimate.flops,
        "trained_parameters": estimate.trained_parameters,
    }


def dominates(parts: dict[str, int]) -> str:
    """The largest of weights, gradients, optimizer, cache, activations and logits."""
    sums: dict[str, int] = {}
    for name, size in parts.items():
        kind = name.split(":")[0]
        sums[kind] = sums.get(kind, 0) + size
    return max(sums, key=lambda kind: sums[kind])


def phases_table(report: dict[str, Any]) -> str:
    """The report as a table for the terminal."""
    rows = [
        ["phase", "model", "rows x tokens", "weights", "training", "cache", "logits", "activations", "GiB", "fits"]
    ]
    for case in report["phases"]:
        if case["estimate"] is None:
            rows.append([case["phase"], Path(case["model"]).name, case["batch"], *["-"] * 7])
            continue
        gib = case["estimate"]["gib"]
        weights = sum(size for name, size in gib.items() if name.startswith("weights"))
        cells = [weights, gib["gradients"] + gib["optimizer"], gib.get("KV cache", 0.0), gib["logits"]]
        cells += [gib["activations"], case["estimate"]["total_gib"]]
        fits = "yes" if case["fits"] else "no"
        rows.append([case["phase"], Path(case["model"]).name, case["batch"], *(f"{c:.2f}" for c in cells), fits])
    parts = [formatted(rows)]
    notes = [f"{case['phase']}: {case['note']}." for case in report["phases"] if case["note"]]
    if notes:
        parts.append("\n".join(notes))
    if report["largest"] is None:
        parts.append("No phase could be estimated.")
    else:
        case = next(case for case in report["phases"] if case["phase"] == report["largest"])
        tight = ", ".join(case["phase"] for case in report["phases"] if case["fits"] is False)
        verdict = f"does not fit ({tight})" if tight else "fits"
        but = f" (but for {', '.join(report['not_estimated'])})" if report["not_estimated"] else ""
        parts.append(
            f"{report['command']} {report['config']}: the phases take turns on the GPU. The largest is "
            f"{report['largest']}, {case['estimate']['total_gib']:.2f} GiB, most of it {case['dominates']}.\nBy the "
            f"estimate it {verdict}{but} in {report['gpu_memory']:g} GiB, of which {report['reserve']:g} are left to "
            "CUDA and the allocator (not estimated)."
        )
    if report["changes"]:
        rows = [["change", f"GiB of {report['changed']}", "fits", "learns the same"]]
        for case in report["changes"]:
            words = ["yes" if case[name] else "no" for name in ("fits", "same_result")]
            rows.append([case["name"], f"{case['gib']:.2f}", *words])
        parts.append(formatted(rows))
    if report["advice"]:
        parts.append(report["advice"])
    return "\n\n".join([*parts, _runs(report["phases"])]) + f"\n{report['machine']}"


def _runs(cases: list[dict[str, Any]]) -> str:
    rows = [["measured", "activations, GiB", "estimate", "off", "tokens/s"]]
    words = []
    for case in cases:
        found = case["measured"]
        if found is None and case["not_measured"] == "--estimate":
            words = ["Not measured: --estimate."]
        elif found is None:
            words.append(f"Not measured, {case['phase']}: {case['not_measured']}.")
        elif "out_of_memory" in found:
            words.append(f"Measured, {case['phase']}: {found['out_of_memory']}")
        else:
            cells = [f"{found[name]:.4f}" for name in ("activations_gib", "estimated_activations_gib")]
            rows.append([case["phase"], *cells, f"{found['error']:+.1%}", f"{found['text_tokens_per_second']:,.0f}"])
    return "\n".join(([formatted(rows)] if len(rows) > 1 else []) + words)


def plot_phases(report: dict[str, Any], path: Path) -> bool:
    """What each phase takes, as bars; `False` where matplotlib is not installed."""
    bars = {case["phase"]: case["estimate"]["gib"] for case in report["phases"] if case["estimate"] is not None}
    return plot_memory(bars, report, report["config"], path)


def plot_memory(bars: dict[str, dict[str, float]], report: dict[str, Any], title: str, path: Path) -> bool:
    """Bars of the GiB of parts, beside the card; `False` where matplotlib is not installed, or there is no bar."""
    if importlib.util.find_spec("matplotlib") is None or not bars:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 1.5 + 0.4 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(bars)
    for part in dict.fromkeys(part for parts in bars.values() for part in parts):
        sizes = [parts.get(part, 0.0) for parts in bars.values()]
        axes.barh(range(len(bars)), sizes, left=left, label=part)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axes.text(total, place, f" {total:.1f}", va="center", fontsize=7)
    axes.axvline(report["gpu_memory"], color="black", linewidth=0.8)
    axes.axvline(report["gpu_memory"] - report["reserve"], color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(bars)), list(bars), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("GiB (estimate)")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    FigureCanvasAgg(figure).print_png(path)
    return True
