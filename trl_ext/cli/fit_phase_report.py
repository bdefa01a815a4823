"""`trl-ext bench fit` for configs of pipelines: every phase estimated and measured by itself, and the largest named.

Knows phases and numbers. Knows no models and none of the pipelines.
"""

import argparse
import importlib.util
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from .bench_tools import formatted
from .fit_changes import advise
from .fit_config import attention_note, check_attention
from .fit_phases import Phase
from .fit_pipelines import PIPELINES
from .fit_runs import GIB, measured


def measure_phases(command: str, args: argparse.Namespace, most_flops: float) -> dict[str, Any]:
    """
    Estimate each phase, and measure where that can be done.

    Args:
        command (`str`): the folder of the pipeline's configs.
        args (`argparse.Namespace`): of `trl-ext bench fit`.
        most_flops (`float`): of a batch: more than that is not run without a GPU.

    Returns:
        `dict` with the `phases`, the name of the `largest`, whether all that is estimated `fits`, `not_estimated`, and
        `changes` and `advice` for the largest.
    """
    phases = PIPELINES[command](args)
    if not args.estimate:
        for phase in phases:
            if phase.config is not None:
                check_attention(phase.config, phase.attention)
    found: dict[str, dict[str, Any]] = {}
    for phase in phases:
        same = found.get(phase.same_as)
        found[phase.name] = _found(phase, args, most_flops) if same is None else _as_before(phase, same)
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
        "changes": [],
        "advice": None,
    }
    if not known:
        return report
    largest = max(known, key=lambda name: known[name]["estimate"]["total_gib"])
    report |= {"largest": largest, "fits": all(case["fits"] for case in known.values())}
    if not args.no_changes and any(phase.changes for phase in phases if phase.name == largest):
        others = all(case["fits"] for name, case in known.items() if name != largest)
        report["changes"] = _changes(command, next(phase for phase in phases if phase.name == largest), others, args)
        now = known[largest]
        rows = next(phase.rows for phase in phases if phase.name == largest)
        report["advice"] = advise(
            report["changes"], {"fits": report["fits"], "flops_per_row": now["estimate"]["flops"] / rows}
        )
    return report


def _found(phase: Phase, args: argparse.Namespace, most_flops: float) -> dict[str, Any]:
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
    total = estimate.peak / GIB
    case["estimate"] = {
        "gib": {name: size / GIB for name, size in estimate.parts().items()},
        "total_gib": total,
        "saved_for_backward_gib": estimate.saved / GIB,
        "flops": estimate.flops,
        "trained_parameters": estimate.trained_parameters,
    }
    free = args.gpu_memory - args.reserve
    case |= {"fits": total <= free, "dominates": dominates(estimate.parts())}
    if phase.halves and not case["fits"] and sum(estimate.weights.values()) / GIB < free:
        case["fits"] = True
        case["note"] = ". ".join([*notes, "a batch that does not fit is run in halves"])
    if args.estimate:
        return case
    on_gpu = torch.cuda.is_available()
    if phase.run is None:
        case["not_measured"] = "no run of this kind of model here"
    elif not on_gpu and estimate.flops > most_flops:
        case["not_measured"] = f"no GPU, and {estimate.flops:.1e} operations in a batch are too many here"
    else:
        with tempfile.TemporaryDirectory() as folder:
            run = partial(phase.run, Path(folder))
            case["measured"] = measured(run, args.gpu_memory, phase.estimate(on_gpu).activations)
    return case


def _as_before(phase: Phase, same: dict[str, Any]) -> dict[str, Any]:
    return same | {
        "phase": phase.name,
        "note": f"as {same['phase']}",
        "measured": None,
        "not_measured": "--estimate" if same["not_measured"] == "--estimate" else "as above",
    }


def _changes(command: str, largest: Phase, others_fit: bool, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the largest phase would take after each change of the config."""
    found = []
    for change in largest.changes:
        given = argparse.Namespace(**vars(args))
        given.override = [*args.override, *(f"{name}={_yaml(value)}" for name, value in change.values.items())]
        try:
            phase = next(phase for phase in PIPELINES[command](given) if phase.name == largest.name)
            estimate = phase.estimate(True)
        except ValueError:  # what the change leads to cannot be trained or estimated
            continue
        gib = estimate.peak / GIB
        fits = others_fit and gib + args.reserve <= args.gpu_memory
        case = {"gib": gib, "fits": fits, "flops_per_row": estimate.flops / phase.rows}
        found.append(change._asdict() | case)
    return found


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


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
        verdict = "fits" if report["fits"] else "does not fit"
        but = f" (but for {', '.join(report['not_estimated'])})" if report["not_estimated"] else ""
        parts.append(
            f"{report['command']} {report['config']}: the phases take turns on the GPU. The largest is "
            f"{report['largest']}, {case['estimate']['total_gib']:.2f} GiB, most of it {case['dominates']}.\nBy the "
            f"estimate it {verdict}{but} in {report['gpu_memory']:g} GiB, of which {report['reserve']:g} are left to "
            "CUDA and the allocator (not estimated)."
        )
    if report["changes"]:
        rows = [["change", f"GiB of {report['largest']}", "fits", "learns the same"]]
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
    cases = [case for case in report["phases"] if case["estimate"] is not None]
    if importlib.util.find_spec("matplotlib") is None or not cases:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for case in cases for name in case["estimate"]["gib"]))
    figure = Figure(figsize=(8.0, 1.5 + 0.5 * len(cases)), layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(cases)
    for name in names:
        sizes = [case["estimate"]["gib"].get(name, 0.0) for case in cases]
        axes.barh(range(len(cases)), sizes, left=left, label=name)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axes.text(total, place, f" {total:.1f}", va="center", fontsize=7)
    axes.axvline(report["gpu_memory"], color="black", linewidth=0.8)
    axes.axvline(report["gpu_memory"] - report["reserve"], color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(cases)), [case["phase"] for case in cases], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("GiB (estimate)")
    axes.set_title(report["config"], fontsize=9)
    axes.legend(fontsize=7)
    FigureCanvasAgg(figure).print_png(path)
    return True
