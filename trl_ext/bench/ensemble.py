"""`trl-ext bench ensemble`: compare M members in one pass with single members, in training and in scoring.

Every side trains (or scores) the same rows. The sides are one member with adapters on all layers, one member with
adapters above the branch only, and M members of either kind in our ensemble trainer. The report takes M separate runs
to last M times as long as one run of the same kind. The case also compares the losses of branched members with those
of M separate runs. It knows trainers and scores. It does not know how members are stacked.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.bench.runner import (
    Run,
    add_memory_arguments,
    add_model_arguments,
    add_run_arguments,
    check_counts,
    circumstances,
    dtype_of,
    formatted,
    in_turns,
    keep_freed_memory,
    medians,
    mib,
    place,
    plot_bars,
    quantization_of,
    shape_of,
    timed,
    timed_training,
    training_arguments,
)
from trl_ext.bench.synthetic import labelled_rows, save_model, synthetic_groups, words_tokenizer


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
# kind of the members -> (prefix of a single member's trainer, prefix of the ensemble's, outputs of a member's head)
KINDS = {
    "reward": ("Reward", "RewardEnsemble", 1),
    "orm": ("ORM", "ORMEnsemble", 1),
    "prm": ("PRM", "PRMEnsemble", 2),
    "segment": ("SegmentReward", "SegmentEnsemble", 1),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `trl-ext bench ensemble`."""
    parser.add_argument(
        "--kind", choices=KINDS, default="reward", help="kind of the members, as in `trl-ext ensemble`"
    )
    parser.add_argument(
        "--shapes",
        nargs="*",
        default=["0,16,2,4", "0,128,2,4"],
        help="P,C,K,groups: prompt tokens, completion tokens, completions of each prompt, prompts in a batch",
    )
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--branch_at", type=float, default=0.75, help="share of the layers below the branch")
    parser.add_argument("--output_dir", default="outputs/bench_ensemble", help="where bench.json and bench.png go")
    add_run_arguments(parser, steps=2, repeats=3)
    add_memory_arguments(parser)
    add_model_arguments(parser)
    parser.set_defaults(num_layers=8)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure every shape.

    Returns:
        `dict` with `cases` and the [`circumstances`]. A case has `tokens` (tokens of a batch, as one member sees it),
        `training` and `scoring` (token-level members score every token). `training` and `scoring` each have `sides`
        (seconds and CPU seconds of a step or pass; for training also the peak memory in MiB) and `ratios` of CPU time
        (of wall time on a GPU). `training` also has `loss_max_difference`, the largest difference between branched
        members and separate runs over `losses_compared` losses.
    """
    check_counts(args, warmup=1, steps=1, repeats=1, members=2, lora_r=1)
    keep_freed_memory()
    cases = []
    least = (0, 2 if args.kind == "orm" else 1, 1, 1)
    for shape in args.shapes:
        needed = "C, K and groups of 1 or more (C of 2 for outcomes)"
        p, c, k, groups = shape_of(shape, "P,C,K,groups", least, needed)
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
    runs = in_turns({side: partial(_train, side, rows, batch, model, args) for side in SIDES}, args.repeats)
    sides = {side: medians(found) for side, found in runs.items()}
    return {"sides": sides, "ratios": _ratios(sides, args.members), **_compare_losses(rows, batch, model, args)}


def _compare_losses(rows: "Dataset", batch: int, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Compare each branched member's losses with those of a separate run that has the member's seed."""
    how = {"logging_steps": 1, "learning_rate": 1e-3}  # large enough that one step visibly changes the next loss
    history = _train("stacked_branched", rows, batch, model, args, **how).history
    differences = []
    for member in range(args.members):
        alone = _train("one_branched", rows, batch, model, args, **how, seed=args.seed + member).losses
        together = [entry[name] for entry in history if (name := f"loss_member_{member}") in entry]
        differences += [abs(a - b) for a, b in zip(together, alone, strict=True)]
    return {"loss_max_difference": max(differences), "losses_compared": len(differences)}


def _train(side: str, rows: "Dataset", batch: int, model: str, args: argparse.Namespace, **more: Any) -> Run:
    """Train one side once; `more` holds further arguments of its config."""
    from peft import LoraConfig

    import trl_ext

    _, several, branched, strategy = SIDES[side]
    one, many, _ = KINDS[args.kind]
    given = training_arguments(args, f"{model}/{side}", batch, min_survival=0.0)
    if args.kind == "reward":
        given["loss_type"] = "plackett_luce"
    peft_config = LoraConfig(r=args.lora_r, target_modules="all-linear")
    if several:
        given |= {"num_members": args.members, "data_strategy": strategy}
        given["branch_at"] = args.branch_at if branched else None
    else:
        given["data_seed"] = args.seed  # the order of rows stays the same when the seed of head and adapter changes
        if branched:
            peft_config = _branched(peft_config, model, args)
    name = many if several else one
    trainer = getattr(trl_ext, f"{name}Trainer")(
        model=model,
        args=getattr(trl_ext, f"{name}Config")(**given | more),
        train_dataset=rows,
        quantization_config=quantization_of(args),
        peft_config=peft_config,
    )
    return timed_training(trainer, args.warmup)


def _scoring(ids: list[list[int]], model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Score one batch with one member and with all members; token-level members score every token."""
    import torch
    from peft import LoraConfig

    from trl_ext.models.adapters import add_adapter
    from trl_ext.models.building import build_reward_model
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
            num_labels=KINDS[args.kind][2],
            head="per_token" if per_token else "sequence",
            quantization_config=quantization_of(args),
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

    def scored(call: Callable) -> Run:
        with torch.no_grad():
            return timed(lambda: call().sum().item())  # .item() waits for the GPU

    sides = {side: partial(scored, call) for side, call in calls.items()}
    in_turns(sides, 1)  # the warm-up
    found = {side: medians(runs) for side, runs in in_turns(sides, 2 * args.repeats).items()}
    return {"sides": found, "ratios": _ratios(found, args.members)}


def _branched(peft_config: Any, model: str, args: argparse.Namespace) -> Any:
    """The LoRA config of one member with adapters above the branch only, written in PEFT's own fields."""
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(model).num_hidden_layers
    peft_config.target_modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    peft_config.layers_to_transform = list(range(min(int(args.branch_at * layers), layers - 1), layers))
    return peft_config


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
            row = [title.format(M=members), f"{training['seconds']:.3f}", f"{training['cpu_seconds']:.3f}"]
            row.append(mib(training["peak_memory_mib"]))
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
        f"Ratios of {clock} time; below 1 is faster. All times are medians.\n{place(report)}"
    )


def plot(report: dict[str, Any], path: Path) -> bool:
    """Plot the training ratios of every case as bars. Returns `False` if matplotlib is not installed."""
    cases = report["cases"]
    series = {name: [case["training"]["ratios"][name] for case in cases] for name in RATIOS}
    title = f"Optimizer step of {report['arguments']['members']} members\n{report['machine']}, {report['dtype']}"
    return plot_bars(path, [case["name"] for case in cases], series, "time ratio", title)
