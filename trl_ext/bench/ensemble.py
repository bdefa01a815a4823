"""`trl-ext bench ensemble`: M members in one pass beside single members, in training and in scoring.

Every side trains (or scores) the same rows in turns in one process: one member with adapters on all layers, one with
adapters above the branch only, and M members of either sort through the trainer of ensembles. M separate runs are M
times one run of the same sort. That the losses of branched members are those of M separate runs is measured beside.
Knows trainers and scores, and nothing of how members are stacked.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.bench.tools import (
    add_model_arguments,
    check_counts,
    circumstances,
    differences,
    dtype_of,
    forget_peak,
    formatted,
    keep_freed_memory,
    labelled_rows,
    peak,
    plot_bars,
    save_model,
    step_clock,
    synthetic_groups,
    words_tokenizer,
)
from trl_ext.cli.ensemble import KINDS


if TYPE_CHECKING:
    from datasets import Dataset

# name -> (what it is, several members, branched, data strategy of the members)
SIDES = {
    "one_full": ("1 member, all layers", False, False, None),
    "one_branched": ("1 member, branched", False, True, None),
    "stacked_full": ("{M} members, all layers", True, False, "shared"),
    "stacked_branched": ("{M} members, branched", True, True, "shared"),
    "stacked_own": ("{M} members, branched, own batches", True, True, "shuffle"),
}
RATIOS = {
    "branched / one full": ("stacked_branched", "one_full", 1),
    "branched / M separate full": ("stacked_branched", "one_full", None),
    "branched / M separate branched": ("stacked_branched", "one_branched", None),
    "full / M separate full": ("stacked_full", "one_full", None),
    "own batches / M separate branched": ("stacked_own", "one_branched", None),
}
# kind of the members -> how the names of the trainer and config of one begin, and outputs of its head
ONE = {"reward": ("Reward", 1), "orm": ("ORM", 1), "prm": ("PRM", 2), "segment": ("SegmentReward", 1)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `trl-ext bench ensemble`."""
    parser.add_argument("--kind", choices=KINDS, default="reward", help="what members are, as of `trl-ext ensemble`")
    parser.add_argument(
        "--shapes",
        nargs="*",
        default=["0,16,2,4", "0,128,2,4"],
        help="P,C,K,groups: tokens of prompt, completion; completions of a prompt, prompts in a batch",
    )
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--branch_at", type=float, default=0.75, help="share of the layers below the branch")
    parser.add_argument("--lora_r", type=int, default=16, help="rank of LoRA on all linear layers")
    parser.add_argument("--load_in_4bit", action="store_true", help="NF4 base (QLoRA)")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=2, help="timed optimizer steps of a run")
    parser.add_argument("--warmup", type=int, default=1, help="steps at the start of a run that are not timed")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side, in turns")
    parser.add_argument("--output_dir", default="outputs/bench_ensemble", help="where bench.json and bench.png go")
    add_model_arguments(parser)
    parser.set_defaults(num_layers=8)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure every shape.

    Returns:
        `dict` with `cases` and the circumstances. A case has `tokens` (of a batch, as one member sees it), `training`
        and `scoring` (of token-level members, of every token); each of these `sides` (seconds and CPU seconds of a
        step or pass, peak memory in MiB of a training) and `ratios`, of CPU time (wall time on a GPU); the training
        also `loss_max_difference` of branched members and separate runs, over `losses_compared` losses.
    """
    import datasets
    import transformers

    check_counts(args, warmup=1, steps=1, repeats=1, members=2)
    keep_freed_memory()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    cases = []
    for shape in args.shapes:
        try:
            p, c, k, groups = map(int, shape.split(","))
        except ValueError as error:
            raise ValueError(f"{shape!r} is no shape. Needed: P,C,K,groups, e.g. 0,128,2,4.") from error
        if min(c - (args.kind == "orm"), k, groups) < 1 or p < 0:
            raise ValueError(f"{shape!r} is no shape. Needed: C, K and groups of 1 or more (C of 2 for outcomes).")
        number = groups * (args.warmup + args.steps)
        groups_of_ids = synthetic_groups(number, p, c, k, args.seed)
        rows, batch = groups_of_ids, groups
        if args.kind != "reward":
            rows, batch = labelled_rows(args.kind, number, p, c, k, args.seed), groups * k
        ids = [ids for group in groups_of_ids["candidate_ids"][:groups] for ids in group]
        with tempfile.TemporaryDirectory() as folder:
            save_model(folder, args, p + c, words_tokenizer())
            training, scoring = _training(rows, batch, folder, args), _scoring(ids, folder, args)
        cases.append(
            {"name": f"({p}, {c}, {k}) x {groups}", "tokens": groups * k * (p + c), "training": training}
            | {"scoring": scoring}
        )
        print(_line(cases[-1]), flush=True)
    return {"cases": cases, **circumstances(args)}


def _training(rows: "Dataset", batch: int, model: str, args: argparse.Namespace) -> dict[str, Any]:
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    for repeat in range(args.repeats):
        for side in SIDES if repeat % 2 == 0 else reversed(SIDES):  # none is always first
            runs[side].append(_timed(side, rows, batch, model, args))
    sides = {}
    for side, measured in runs.items():
        peaks = [run["peak"] for run in measured if run["peak"] is not None]
        sides[side] = {
            "seconds": statistics.median(second for run in measured for second in run["wall"]),
            "cpu_seconds": statistics.median(second for run in measured for second in run["cpu"]),
            "peak_memory_mib": statistics.median(peaks) if peaks else None,
        }
    return {"sides": sides, "ratios": _ratios(sides, args.members), **_compare_losses(rows, batch, model, args)}


def _compare_losses(rows: "Dataset", batch: int, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Each loss of branched members beside that of the separate run with the member's seed."""

    how = {"logging_steps": 1, "learning_rate": 1e-3}  # a step must show in the next loss
    history = _trained("stacked_branched", rows, batch, model, args, **how).state.log_history
    apart = []
    for member in range(args.members):
        alone = _trained("one_branched", rows, batch, model, args, seed=args.seed + member, **how)
        losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
        own = [entry[name] for entry in history if (name := f"loss_member_{member}") in entry]
        apart += [abs(a - b) for a, b in zip(own, losses, strict=True)]
    return {"loss_max_difference": max(apart), "losses_compared": len(apart)}


def _timed(side: str, rows: "Dataset", batch: int, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train once: seconds and CPU seconds of each timed step, and peak memory."""
    clock = step_clock()
    _trained(side, rows, batch, model, args, clock)
    skip = args.warmup - 1  # the first difference of two stamps belongs to the second step
    return {"wall": differences(clock.wall)[skip:], "cpu": differences(clock.cpu)[skip:], "peak": peak()}


def _trained(
    side: str, rows: "Dataset", batch: int, model: str, args: argparse.Namespace, clock: Any = None, **more: Any
) -> Any:
    """The trainer of a side after its training; `more` are arguments of its config."""
    from peft import LoraConfig
    from transformers import PrinterCallback

    import trl_ext

    _, several, branched, strategy = SIDES[side]
    dtype = dtype_of(args)
    common = {
        "output_dir": f"{model}/{side}",
        "per_device_train_batch_size": batch,
        "max_steps": args.warmup + args.steps,
        "gradient_checkpointing": args.gradient_checkpointing,
        "bf16": dtype == "bfloat16",
        "model_init_kwargs": {"dtype": dtype, "attn_implementation": args.attn_implementation},
        "max_length": None,
        "min_survival": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": args.seed,
    }
    if args.kind == "reward":
        common["loss_type"] = "plackett_luce"
    peft_config = LoraConfig(r=args.lora_r, target_modules="all-linear")
    if several:
        name = f"{KINDS[args.kind]}Ensemble"
        common |= {
            "num_members": args.members,
            "data_strategy": strategy,
            "branch_at": args.branch_at if branched else None,
        }
    else:
        name, _ = ONE[args.kind]
        common["data_seed"] = args.seed  # whatever the seed of the head and the adapter
        if branched:
            peft_config = _branched(peft_config, model, args)
    trainer = getattr(trl_ext, f"{name}Trainer")(
        model=model,
        args=getattr(trl_ext, f"{name}Config")(**common | more),
        train_dataset=rows,
        quantization_config=_quantization(args),
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    if clock is not None:
        trainer.add_callback(clock)
    forget_peak()
    trainer.train()
    return trainer


def _scoring(ids: list[list[int]], model: str, args: argparse.Namespace) -> dict[str, Any]:
    """One batch, scored by one member and by all; by token-level ones every token."""
    import torch
    from peft import LoraConfig

    from trl_ext.models.building import add_adapter, build_reward_model
    from trl_ext.models.ensemble.member_config import branch_at
    from trl_ext.models.ensemble.stacked_model import StackedRewardModel, member_scores, member_token_logits
    from trl_ext.models.heads import candidate_scores, run_with_head_output

    def token_logits(*batch: Any) -> torch.Tensor:
        return run_with_head_output(*batch)[1]

    per_token = args.kind != "reward"
    functions = (token_logits, member_token_logits) if per_token else (candidate_scores, member_scores)
    calls: dict[str, Callable] = {}
    for side, (_, several, branched, strategy) in SIDES.items():
        if strategy == "shuffle":
            continue
        base, head = build_reward_model(
            model,
            num_labels=ONE[args.kind][1],
            head="per_token" if per_token else "sequence",
            quantization_config=_quantization(args),
            dtype=dtype_of(args),
            attn_implementation=args.attn_implementation,
        )
        config = LoraConfig(r=args.lora_r, target_modules="all-linear")
        if several:
            config = branch_at(base, config, args.branch_at) if branched else config
            scorer = StackedRewardModel(base, config, head, args.members, range(args.members)).eval()
        else:
            scorer = add_adapter(base, _branched(config, model, args) if branched else config, head).eval()
        batch = torch.tensor(ids, device=scorer.device)
        calls[side] = lambda f=functions[several], m=scorer, b=batch: f(m, b, torch.ones_like(b))
    stamps: dict[str, list[tuple[float, float]]] = {side: [] for side in calls}
    with torch.no_grad():
        for repeat in range(-1, 2 * args.repeats):  # the first is the warm-up
            for side in calls if repeat % 2 == 0 else reversed(calls):
                wall, cpu = time.perf_counter(), time.process_time()
                calls[side]().sum().item()  # waits for the GPU
                if repeat >= 0:
                    stamps[side].append((time.perf_counter() - wall, time.process_time() - cpu))
    sides = {}
    for side, measured in stamps.items():
        wall, cpu = (statistics.median(values) for values in zip(*measured, strict=True))
        sides[side] = {"seconds": wall, "cpu_seconds": cpu}
    return {"sides": sides, "ratios": _ratios(sides, args.members)}


def _branched(peft_config: Any, model: str, args: argparse.Namespace) -> Any:
    """The config of one member with adapters above the branch only, in PEFT's own fields."""
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(model).num_hidden_layers
    peft_config.target_modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    peft_config.layers_to_transform = list(range(min(int(args.branch_at * layers), layers - 1), layers))
    return peft_config


def _quantization(args: argparse.Namespace) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if not args.load_in_4bit:
        return None
    compute = torch.__dict__[dtype_of(args)]
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _ratios(sides: dict[str, dict[str, Any]], members: int) -> dict[str, float]:
    import torch

    name = "seconds" if torch.cuda.is_available() else "cpu_seconds"
    return {
        ratio: sides[ours][name] / ((times or members) * sides[other][name])
        for ratio, (ours, other, times) in RATIOS.items()
        if ours in sides
    }


def _line(case: dict[str, Any]) -> str:
    train, score = (case[what]["ratios"]["branched / one full"] for what in ("training", "scoring"))
    return (
        f"{case['name']}: branched members take {train:.2f}x one full member in training, {score:.2f}x in scoring; "
        f"{case['training']['losses_compared']} losses differ from separate runs' by at most "
        f"{case['training']['loss_max_difference']:.0e}"
    )


def table(report: dict[str, Any]) -> str:
    """The report as a table for the terminal."""
    members = report["arguments"]["members"]
    parts = []
    for case in report["cases"]:
        rows = [[f"{case['name']}, {case['tokens']:,} tokens", "train s", "CPU s", "peak MiB", "score s", "CPU s"]]
        for side, (title, *_) in SIDES.items():
            training, scoring = case["training"]["sides"][side], case["scoring"]["sides"].get(side)
            memory = training["peak_memory_mib"]
            row = [title.format(M=members), f"{training['seconds']:.3f}", f"{training['cpu_seconds']:.3f}"]
            row.append("-" if memory is None else f"{memory:,.0f}")
            row += [f"{scoring['seconds']:.3f}", f"{scoring['cpu_seconds']:.3f}"] if scoring else ["-", "-"]
            rows.append(row)
        parts.append(formatted(rows))
        ratios = [["ratio", "training", "scoring"]]
        for name, value in case["training"]["ratios"].items():
            scoring = case["scoring"]["ratios"].get(name)
            ratios.append([name, f"{value:.2f}x", "-" if scoring is None else f"{scoring:.2f}x"])
        parts.append(formatted(ratios))
    kind, clock = report["arguments"]["kind"], "wall" if "GPU" in report["memory"] else "CPU"
    return (
        "\n\n".join(parts) + f"\nMembers of kind {kind}, M = {members}; M separate runs: {members} times one run. "
        f"Ratios: {clock} time, below 1 is less; medians.\n{report['machine']}, {report['dtype']}, "
        f"{report['attention']} attention, memory {report['memory']}"
    )


def plot(report: dict[str, Any], path: Path) -> bool:
    """The ratios of every case in training as bars; `False` where matplotlib is not installed."""
    cases = report["cases"]
    series = {name: [case["training"]["ratios"][name] for case in cases] for name in RATIOS}
    title = f"Optimizer step of {report['arguments']['members']} members\n{report['machine']}, {report['dtype']}"
    return plot_bars(path, [case["name"] for case in cases], series, "time ratio", title)
