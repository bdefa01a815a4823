"""`trl-ext bench fit`: does a training config fit on a card, what takes the memory, and what would change that.

The estimate needs neither a GPU nor weights (`trl_ext.models.memory_estimate`). Beside it, real steps of the config's
trainer are run on random weights: on a GPU capped at `--gpu_memory`, on a CPU only where the model is tiny, to see how
far off the estimate is. Knows commands and their configs. Nothing is downloaded.
"""

import argparse
import copy
import importlib.util
import statistics
import tempfile
from pathlib import Path
from typing import Any

from .bench_tools import CountTokens, circumstances, differences, forget_peak, formatted, peak, step_clock
from .fit_changes import advise, changes
from .fit_config import TRAINERS, Parsed, changed, parse, sizes_of, training_step
from .fit_rows import SEPARATOR, Sizes, rows_for, write_random_model


GIB = 2**30
MOST_FLOPS_ON_CPU = 2e12
"""Of a micro-batch: more than that is not run without a GPU."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `trl-ext bench fit`."""
    parser.add_argument("--config", required=True, help="YAML file of trl-ext reward, ensemble, orm, prm or segment")
    parser.add_argument("--trainer", choices=TRAINERS, default=None, help="default: the name of the config's folder")
    parser.add_argument("--override", nargs="*", default=[], metavar="NAME=VALUE", help="e.g. max_length=512")
    parser.add_argument("--gpu_memory", type=float, default=24.0, help="GiB of the card")
    parser.add_argument(
        "--reserve", type=float, default=1.5, help="GiB of it that the estimate leaves to CUDA and the allocator"
    )
    parser.add_argument("--estimate", action="store_true", help="run nothing")
    parser.add_argument("--no_changes", action="store_true", help="do not estimate what single changes would do")
    parser.add_argument("--prompt_length", type=int, default=None, help="tokens; default: half of max_length")
    parser.add_argument("--completion_length", type=int, default=None, help="tokens; default: the rest of max_length")
    parser.add_argument(
        "--candidates", type=int, default=None, help="of a group; default: 2 for bradley_terry, 4 for other losses"
    )
    parser.add_argument("--steps", type=int, default=3, help="timed optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="outputs/bench_fit", help="where bench.json and bench.png go")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """
    Estimate, and measure where that can be done.

    Returns:
        `dict` with the `batch`, the `estimate` (GiB of each part and of the whole, operations), `fits`, `dominates`,
        `changes`, `advice`, `measured` (`None`, and why under `not_measured`) with the estimate's `error`, and the
        circumstances.
    """
    import torch
    import transformers

    from trl_ext.models.known_shapes import config_of

    if args.steps < 1:
        raise ValueError("--steps must be at least 1.")
    if args.gpu_memory <= 0 or args.reserve < 0:
        raise ValueError("--gpu_memory must be positive, and --reserve not negative.")
    transformers.utils.logging.disable_progress_bar()
    if not Path(args.config).is_file():
        raise ValueError(f"{args.config} is no file. Needed: the YAML file of a command that trains.")
    command = args.trainer or Path(args.config).resolve().parent.name
    if command not in TRAINERS:
        raise ValueError(f"The folder {command!r} does not say whose config it is. Give --trainer: {list(TRAINERS)}.")
    parsed = parse(command, args)
    wanted, longest = (args.prompt_length or 0) + (args.completion_length or 0), parsed.training.max_length
    if longest is not None and wanted > longest:
        raise ValueError(
            f"--prompt_length and --completion_length are {wanted} tokens, and the config's max_length is {longest}: "
            f"the trainer would drop or cut such rows. Add --override max_length={wanted}."
        )
    config, source = config_of(parsed.model.model_name_or_path)
    sizes = sizes_of(command, parsed, config, args)
    found = _case(command, parsed, config, sizes, args)
    estimate = found.pop("estimate")
    report = {
        "command": command,
        "config": args.config,
        "model": parsed.model.model_name_or_path,
        "shape": source,
        "batch": {**vars(sizes), "model_tokens": estimate.model_tokens},
        "estimate": {
            "gib": {name: size / GIB for name, size in estimate.parts().items()},
            "total_gib": estimate.peak / GIB,
            "saved_for_backward_gib": estimate.saved / GIB,
            "flops": estimate.flops,
            "trained_parameters": estimate.trained_parameters,
        },
        "gpu_memory": args.gpu_memory,
        "reserve": args.reserve,
        "fits": found["fits"],
        "dominates": dominates(estimate.parts()),
        "changes": [],
        "advice": None,
        "measured": None,
        "not_measured": "--estimate" if args.estimate else None,
    }
    if not args.no_changes:
        for change in changes(command, parsed.training, parsed.model):
            case = change._asdict()
            try:
                new = changed(parsed, change.values)
                own = sizes_of(command, new, config, args)
                case |= _case(command, new, config, own, args)
            except ValueError:  # what the change leads to cannot be trained or estimated
                continue
            del case["estimate"]
            report["changes"].append(case)
        report["advice"] = advise(report["changes"], found)
    if not args.estimate:
        on_gpu = torch.cuda.is_available()
        if not on_gpu and estimate.flops > MOST_FLOPS_ON_CPU:
            report["not_measured"] = f"no GPU, and {estimate.flops:.1e} operations in a micro-batch are too many here"
        else:
            report["measured"] = _measured(command, args, config, sizes, on_gpu)
    for name in ("dtype", "attn_implementation"):  # what `circumstances` says of a run
        vars(args)[name] = vars(parsed.model)[name]
    return {**report, **circumstances(args)}


def _case(command: str, parsed: Parsed, config: Any, sizes: Sizes, args: argparse.Namespace) -> dict[str, Any]:
    from trl_ext.models.memory_estimate import estimate

    found = estimate(training_step(command, parsed, config, sizes))
    gib = found.peak / GIB
    return {
        "estimate": found,
        "gib": gib,
        "fits": gib + args.reserve <= args.gpu_memory,
        "flops_per_row": found.flops / sizes.rows,
    }


def dominates(parts: dict[str, int]) -> str:
    """The largest of weights, gradients, optimizer, activations and logits."""
    sums: dict[str, int] = {}
    for name, size in parts.items():
        kind = name.split(":")[0]
        sums[kind] = sums.get(kind, 0) + size
    return max(sums, key=lambda kind: sums[kind])


def _measured(command: str, args: argparse.Namespace, config: Any, sizes: Sizes, on_gpu: bool) -> dict[str, Any]:
    """Real steps of the trainer on random weights; on a CPU once more to count tensors, and the estimate's error."""
    import torch

    from trl_ext.models.memory_estimate import estimate

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        parsed = parse(command, args)
        step = training_step(command, parsed, config, sizes, on_gpu)
        write_random_model(model, copy.deepcopy(config), step.dtype, sizes.words, args.seed)
        if on_gpu:
            whole = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, args.gpu_memory * GIB / whole))
        try:
            found = _run(command, args, model, sizes, False)
            if not on_gpu:
                found |= {
                    name: value for name, value in _run(command, args, model, sizes, True).items() if "gib" in name
                }
        except torch.OutOfMemoryError as error:
            return {"fits": False, "out_of_memory": str(error).splitlines()[0]}
        finally:
            if on_gpu:
                torch.cuda.set_per_process_memory_fraction(1.0)
    own = estimate(step)
    found["fits"] = True if on_gpu else None
    found["estimated_activations_gib"] = own.activations / GIB
    found["error"] = own.activations / GIB / found["activations_gib"] - 1.0
    return found


def _run(command: str, args: argparse.Namespace, model: Path, sizes: Sizes, count_tensors: bool) -> dict[str, Any]:
    """Train some steps: time, peak memory, and what of it were activations."""
    import torch
    from transformers import PrinterCallback

    import trl_ext
    from trl_ext.models.live_bytes import LiveBytes

    from ._train import build_trainer

    parsed = parse(command, args)
    training, warmup = parsed.training, 1
    steps = min(2, training.gradient_accumulation_steps)  # where gradients of an earlier micro-batch are there or not
    new = {
        "output_dir": str(model.parent / "run"),
        "gradient_accumulation_steps": steps,
        "max_steps": warmup + args.steps,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "logging_steps": 10_000,
        "report_to": [],
        "disable_tqdm": True,
        "push_to_hub": False,
    }
    if command == "prm":
        new["step_separator"] = SEPARATOR
    vars(training).update(new)
    parsed.model.model_name_or_path = str(model)
    parsed.model.model_revision = "main"
    members = training.num_members if command == "ensemble" and training.data_strategy.startswith("column") else 0
    rows = rows_for(
        command, sizes, sizes.rows * steps * (warmup + args.steps), vars(training).get("categories"), args.seed
    )
    if members:
        name = training.data_strategy.partition(":")[2]
        rows = rows.add_column(name, [number % members for number in range(len(rows))])
    trainer = build_trainer(trl_ext.__getattr__(TRAINERS[command]), training, parsed.model, rows)
    trainer.remove_callback(PrinterCallback)
    trainer.data_collator = counter = CountTokens(trainer.data_collator)
    clock = step_clock()
    trainer.add_callback(clock)
    forget_peak()
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    live = None
    if count_tensors:
        with LiveBytes(tensors) as live:
            trainer.train()
    else:
        trainer.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    states = [t for state in trainer.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    optimizer = sum(t.numel() * t.element_size() for t in states)
    found: dict[str, Any] = {"optimizer_gib": optimizer / GIB, "gradients_gib": gradients / GIB}
    seconds = statistics.median(differences(clock.wall))
    found["seconds_per_step"] = seconds
    found["model_tokens_per_second"] = counter.tokens / (warmup + args.steps) / seconds
    found["text_tokens_per_second"] = _text_tokens(command, sizes) * steps / seconds
    found["flat_batches"] = counter.flat / (steps * (warmup + args.steps))
    if torch.cuda.is_available():
        weights = sum(t.numel() * t.element_size() for t in tensors)
        found["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        found["activations_gib"] = (torch.cuda.max_memory_allocated() - weights - optimizer - gradients) / GIB
    else:
        found["peak_rss_gib"] = None if peak() is None else peak() / 1024
        if live is not None:
            found["activations_gib"] = (live.peak - optimizer - gradients) / GIB
    return found


def _text_tokens(command: str, sizes: Sizes) -> int:
    """Tokens of the sequences in a micro-batch, a shared prompt in each."""
    return sizes.rows * sizes.length * (sizes.candidates if command in ("reward", "ensemble") else 1)


def table(report: dict[str, Any]) -> str:
    """The report as a table for the terminal."""
    estimate, batch = report["estimate"], report["batch"]
    rows = [["estimate", "GiB"], *([name, f"{gib:,.3f}"] for name, gib in estimate["gib"].items())]
    rows.append(["the most at one time", f"{estimate['total_gib']:,.3f}"])
    parts = [formatted(rows)]
    verdict = "fits" if report["fits"] else "does not fit"
    parts.append(
        f"{report['command']} {report['config']}: {report['model']} ({report['shape']}), {batch['rows']} row(s) of "
        f"{batch['candidates']} x ({batch['prompt']} + {batch['completion']}) tokens, {batch['model_tokens']:,} "
        f"through the model.\nBy the estimate it {verdict} in {report['gpu_memory']:g} GiB, of which "
        f"{report['reserve']:g} are left to CUDA and the allocator (not estimated). Most of it: {report['dominates']}."
    )
    if report["changes"]:
        rows = [["change", "GiB", "fits", "operations a row", "learns the same"]]
        base = estimate["flops"] / batch["rows"]
        for case in report["changes"]:
            words = ["yes" if case[name] else "no" for name in ("fits", "same_result")]
            rows.append(
                [case["name"], f"{case['gib']:.2f}", words[0], f"{case['flops_per_row'] / base:.0%}", words[1]]
            )
        parts += [formatted(rows), report["advice"]]
    measured = report["measured"]
    if measured is None:
        parts.append(f"Not measured: {report['not_measured']}.")
    elif "out_of_memory" in measured:
        parts.append(f"Measured: {measured['out_of_memory']}")
    else:
        rows = [["measured", ""], *([name, _cell(value)] for name, value in measured.items() if value is not None)]
        parts.append(formatted(rows))
        parts.append(f"The estimate of the activations is {measured['error']:+.1%} off.")
    return "\n\n".join(parts) + f"\n{report['machine']}"


def _cell(value: float | bool) -> str:
    return str(value) if isinstance(value, bool) else f"{value:,.4f}" if abs(value) < 100 else f"{value:,.0f}"


def plot(report: dict[str, Any], path: Path) -> bool:
    """What the memory is made of, and each change, beside the card; `False` where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = ["as it is", *(case["name"] for case in report["changes"])]
    figure = Figure(figsize=(8.0, 1.5 + 0.4 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    left = 0.0
    for part, gib in report["estimate"]["gib"].items():
        axes.barh(0, gib, left=left, label=part)
        left += gib
    totals = [case["gib"] for case in report["changes"]]
    axes.barh(range(1, len(names)), totals, color="lightgrey")
    for place, gib in enumerate([left, *totals]):
        axes.text(gib, place, f" {gib:.1f}", va="center", fontsize=7)
    axes.axvline(report["gpu_memory"], color="black", linewidth=0.8)
    axes.axvline(report["gpu_memory"] - report["reserve"], color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("GiB (estimate)")
    axes.set_title(f"{report['config']}: {report['model']}", fontsize=9)
    axes.legend(fontsize=7)
    FigureCanvasAgg(figure).print_png(path)
    return True
