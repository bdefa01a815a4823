"""`trl-ext bench fit`: does a training config fit on a card, what takes the memory, and what still fits.

The estimate needs neither a GPU nor weights (`trl_ext.fit.memory_estimate`). To show how far off the estimate is, the
config's trainer also runs real steps on random weights: on a GPU under a cap of `--gpu_memory`, on a CPU only if the
model is tiny. Nothing is downloaded. This module knows configs and reports. It does not know how memory is counted.
"""

import argparse
import copy
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from trl_ext.bench.runner import circumstances, formatted
from trl_ext.fit.changes import advise, changes, policy_changes
from trl_ext.fit.config import (
    POLICIES,
    TRAINERS,
    Parsed,
    changed,
    check_attention,
    dtype_of,
    estimate_of,
    notes,
    parse,
    sizes_of,
    values_of,
)
from trl_ext.fit.limits import Knob, knobs, largest, policy_knobs, sentence
from trl_ext.fit.policy_runs import run_policy
from trl_ext.fit.rows import Sizes, write_random_model
from trl_ext.fit.runs import GIB, measured, run_training, too_much_here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `trl-ext bench fit`."""
    parser.add_argument("--config", required=True, help="YAML file of a command that trains reward models or policies")
    parser.add_argument(
        "--trainer",
        type=lambda name: name.replace("-", "_"),
        choices=list(TRAINERS),
        default=None,
        help="default: the name of the config's folder",
    )
    parser.add_argument("--override", nargs="*", default=[], metavar="NAME=VALUE", help="e.g. max_length=512")
    parser.add_argument("--gpu_memory", type=float, default=24.0, help="GiB of the card")
    parser.add_argument(
        "--reserve", type=float, default=1.5, help="GiB of it that the estimate leaves to CUDA and the allocator"
    )
    parser.add_argument("--estimate", action="store_true", help="run nothing")
    parser.add_argument(
        "--no_changes", action="store_true", help="do not estimate what single changes would do, and what still fits"
    )
    parser.add_argument(
        "--prompt_length", type=int, default=None, help="tokens; default: half of max_length, and 256 for a policy"
    )
    parser.add_argument(
        "--completion_length",
        type=int,
        default=None,
        help="tokens; default: the rest of max_length, and max_completion_length for a policy",
    )
    parser.add_argument(
        "--candidates", type=int, default=None, help="of a group; default: 2 for bradley_terry, 4 for other losses"
    )
    parser.add_argument("--steps", type=int, default=3, help="timed optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="outputs/bench_fit", help="where bench.json and bench.png go")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """
    Estimate the memory, and measure it where that is possible.

    Returns:
        `dict` with the `batch`, the `estimate` (GiB of each part and of the whole, for a policy also of each phase;
        operations), `fits`, `dominates`, `changes`, `advice`, `limits` (the largest batch, length, group and rank that
        fit), `measured` (`None`, and why under `not_measured`) with the estimate's `error`, and the circumstances.
    """
    import transformers

    from trl_ext.fit.known_shapes import config_of

    if args.steps < 1:
        raise ValueError("--steps must be at least 1.")
    if args.gpu_memory <= 0 or args.reserve < 0:
        raise ValueError("--gpu_memory must be positive, and --reserve not negative.")
    transformers.utils.logging.disable_progress_bar()
    if not Path(args.config).is_file():
        raise ValueError(f"{args.config} is no file. Needed: the YAML file of a command that trains.")
    command = args.trainer or Path(args.config).resolve().parent.name
    if "distributed_type" in values_of(args):
        raise ValueError(
            f"{args.config} says how processes are launched (`accelerate launch --config_file`) and names no model. "
            "Give the config of the training command that is launched."
        )
    if command not in TRAINERS:
        raise ValueError(
            f"The folder {command!r} does not name a trainer of reward models or of policies by rewards, and only "
            f"their memory is estimated. Give --trainer: {', '.join(TRAINERS)}."
        )
    parsed = parse(command, args)
    config, source = config_of(parsed.model.model_name_or_path)
    attention = parsed.model.attn_implementation
    if not args.estimate:
        check_attention(config, attention)
    sizes = sizes_of(command, parsed, config, args)
    found = _case(command, parsed, config, sizes, args)
    estimate = found.pop("estimate")
    report = {
        "command": command,
        "config": args.config,
        "model": parsed.model.model_name_or_path,
        "shape": source,
        "batch": {**vars(sizes), "model_tokens": estimate.model_tokens},
        "estimate": in_gib(estimate),
        "gpu_memory": args.gpu_memory,
        "reserve": args.reserve,
        "fits": found["fits"],
        "dominates": dominates(estimate.parts()),
        "note": notes(command, parsed),
        "changes": [],
        "advice": None,
        "limits": [],
        "measured": None,
        "not_measured": "--estimate" if args.estimate else None,
    }
    if not args.no_changes:
        minutes = "Estimating what other settings would take and the largest that fit (minutes for a large model; "
        print(f"{minutes}--no_changes leaves it out) ...", file=sys.stderr)
        options = policy_changes if command in POLICIES else partial(changes, command)
        for change in options(parsed.training, parsed.model):
            case = change._asdict()
            try:
                new = changed(parsed, change.values)
                own = sizes_of(command, new, config, args)
                case |= _case(command, new, config, own, args)
            except ValueError:  # the changed config cannot be trained or estimated
                continue
            del case["estimate"]
            report["changes"].append(case)
        report["advice"] = advise(report["changes"], found)
        report["limits"] = list(_limits(command, parsed, config, sizes, args))
    if not args.estimate:
        report["not_measured"] = too_much_here(estimate.flops)
        if report["not_measured"] is None:
            report["measured"] = _measured(command, parsed, args, config, sizes)
    for name in ("dtype", "attn_implementation"):  # `circumstances` reports them
        vars(args)[name] = vars(parsed.model)[name]
    return {**report, **circumstances(args)}


def _case(command: str, parsed: Parsed, config: Any, sizes: Sizes, args: argparse.Namespace) -> dict[str, Any]:
    found = estimate_of(command, parsed, config, sizes, args)
    gib = found.peak / GIB
    return {
        "estimate": found,
        "gib": gib,
        "fits": gib + args.reserve <= args.gpu_memory,
        "flops_per_row": found.flops / sizes.rows,
    }


def _limits(
    command: str, parsed: Parsed, config: Any, sizes: Sizes, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The largest value that fits, for each argument that can be enlarged."""
    options = policy_knobs(parsed, sizes) if command in POLICIES else knobs(command, parsed, sizes, config)
    for knob in options:

        def gib(value: int, knob: Knob = knob) -> float:
            new, larger = knob.set(value)
            return _case(command, new, config, larger, args)["gib"]

        yield largest(gib, knob, args.gpu_memory - args.reserve)


def _measured(command: str, parsed: Parsed, args: argparse.Namespace, config: Any, sizes: Sizes) -> dict[str, Any]:
    """Measure real steps of the trainer on random weights, and compare them with the estimate."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        found = estimate_of(command, parsed, config, sizes, args, torch.cuda.is_available())
        dtype = dtype_of(parsed, config)
        write_random_model(model, copy.deepcopy(config), dtype, sizes.words, args.seed, command in POLICIES)
        train = run_policy if command in POLICIES else run_training
        run = partial(train, command, parsed, model, sizes, args)
        gradients = found.gradients if command in POLICIES else 0  # a policy's largest phase may have none
        report = measured(run, args.gpu_memory, found.activations + gradients)
    weights = sum(found.weights.values())
    if "phases_gib" in report:
        report["estimated_phases_gib"] = {name: (size - weights) / GIB for name, size in found.phases.items()}
    return report


def table(report: dict[str, Any]) -> str:
    """The report as a table for the terminal."""
    estimate, batch = report["estimate"], report["batch"]
    rows = [["estimate", "GiB"], *([name, f"{gib:,.3f}"] for name, gib in estimate["gib"].items())]
    rows.append(["the most at one time", f"{estimate['total_gib']:,.3f}"])
    parts = [formatted(rows)]
    verdict = "fits" if report["fits"] else "does not fit"
    if estimate["phases_gib"]:
        phases = [[name, f"{gib:,.3f}"] for name, gib in estimate["phases_gib"].items()]
        parts.append(formatted([["while it is in the phase", "GiB"], *phases]))
    lengths = f"{batch['prompt']} + {batch['completion']}"
    batches = f"{batch['rows']} row(s) of {batch['candidates']} x ({lengths}) tokens"
    if "generated" in batch:
        batches = f"{batch['rows']} completion(s) of {lengths} tokens, {batch['generated']} generated at a time"
    parts.append(
        f"{report['command']} {report['config']}: {report['model']} ({report['shape']}), {batches}, "
        f"{batch['model_tokens']:,} through the model.\n"
        f"By the estimate it {verdict} in {report['gpu_memory']:g} GiB, of which "
        f"{report['reserve']:g} are left to CUDA and the allocator (not estimated). Most of it: {report['dominates']}."
    )
    if report["note"]:
        parts.append(report["note"])
    if report["changes"]:
        rows = [["change", "GiB", "fits", "operations a row", "learns the same"]]
        base = estimate["flops"] / batch["rows"]
        for case in report["changes"]:
            words = ["yes" if case[name] else "no" for name in ("fits", "same_result")]
            rows.append(
                [case["name"], f"{case['gib']:.2f}", words[0], f"{case['flops_per_row'] / base:.0%}", words[1]]
            )
        parts += [formatted(rows), report["advice"]]
    if report["limits"]:
        parts.append(sentence(report["limits"], report["gpu_memory"] - report["reserve"]))
    found = report["measured"]
    if found is None:
        parts.append(f"Not measured: {report['not_measured']}.")
    elif "out_of_memory" in found:
        parts.append(f"Measured: {found['out_of_memory']}")
    else:
        numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
        rows = [["measured", ""], *([name, _cell(value)] for name, value in numbers.items())]
        parts.append(formatted(rows))
        parts.append(f"The estimate of the activations is {found['error']:+.1%} off.")
        for name, gib in found.get("phases_gib", {}).items():
            expected = found["estimated_phases_gib"][name]
            parts.append(f"{name}: counted {gib:.4f} GiB beside the weights, estimated {expected:.4f}.")
    return "\n\n".join(parts) + f"\n{report['machine']}"


def _cell(value: float | bool) -> str:
    return str(value) if isinstance(value, bool) else f"{value:,.4f}" if abs(value) < 100 else f"{value:,.0f}"


def in_gib(estimate: Any) -> dict[str, Any]:
    """An `Estimate` in the form of the report, in GiB."""
    return {
        "gib": {name: size / GIB for name, size in estimate.parts().items()},
        "total_gib": estimate.peak / GIB,
        "phases_gib": {name: size / GIB for name, size in estimate.phases.items()},
        "saved_for_backward_gib": estimate.saved / GIB,
        "flops": estimate.flops,
        "trained_parameters": estimate.trained_parameters,
    }


def dominates(parts: dict[str, int]) -> str:
    """The largest of weights, gradients, optimizer, activations and logits."""
    sums: dict[str, int] = {}
    for name, size in parts.items():
        kind = name.split(":")[0]
        sums[kind] = sums.get(kind, 0) + size
    return max(sums, key=lambda kind: sums[kind])


def plot(report: dict[str, Any], path: Path) -> bool:
    """Draw the parts of the memory, and each change, against the card. `False` if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = {"as it is": report["estimate"]["gib"]}
    bars |= {case["name"]: {"after a change": case["gib"]} for case in report["changes"]}
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
    axes.set_title(f"{report['config']}: {report['model']}", fontsize=9)
    axes.legend(fontsize=7)
    FigureCanvasAgg(figure).print_png(path)
    return True
