"""`trl-ext bench trunk`: training steps whose frozen layers have run before, beside the same steps without a cache.

All sides train adapters on the upper layers of one model, on the same pairs. The first side is `trl.RewardTrainer`.
Ours trains without `trunk_cache`, with an empty one (what the first epoch costs) and with a filled one (what every
further epoch costs). The case knows trainers. It does not know how states are kept.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from trl_ext.bench.padded import interval, interval_of_turns
from trl_ext.bench.runner import (
    Run,
    add_memory_arguments,
    add_model_arguments,
    add_run_arguments,
    apart,
    check_counts,
    circumstances,
    formatted,
    in_turns,
    medians,
    mib,
    place,
    plot_bars,
    quantization_of,
    ratios_of_turns,
    shape_of,
    timed_training,
    training_arguments,
)
from trl_ext.bench.synthetic import as_pair, save_model, synthetic_groups, words_tokenizer


if TYPE_CHECKING:
    from datasets import Dataset

SIDES = {
    "trl": "trl.RewardTrainer",
    "plain": "ours, no cache",
    "filling": "ours, first epoch",
    "filled": "ours, later epochs",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `trl-ext bench trunk`."""
    parser.add_argument("--shape", default="192,64", help="P,C: prompt and completion tokens of each pair")
    parser.add_argument("--batch_size", type=int, default=4, help="pairs in a batch")
    parser.add_argument("--trained_layers", type=int, help="upper layers with adapters; default: a quarter")
    parser.add_argument("--output_dir", default="outputs/bench_trunk", help="where bench.json and bench.png go")
    add_run_arguments(parser)
    add_memory_arguments(parser)
    add_model_arguments(parser)
    parser.set_defaults(num_layers=8)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure all sides in turns.

    Returns:
        `dict` with

        - `sides`: times and memory of each side
        - `saved`: for each of our sides `cpu`, TRL's CPU time over its own, and `of_plain`, that of ours without a
          cache over its own: medians over turns, with the intervals
        - `loss_max_difference` of the filled cache from no cache, and the [`circumstances`]
    """
    check_counts(args, warmup=1, steps=1, repeats=1, batch_size=1, num_layers=2, lora_r=1)
    p, c = shape_of(args.shape, "P,C", (0, 1), "P >= 0 and C >= 1")
    trained = args.trained_layers or max(1, args.num_layers // 4)
    if not 1 <= trained < args.num_layers:
        raise ValueError(f"--trained_layers is {trained}; needed: 1 to {args.num_layers - 1}, below --num_layers.")
    groups = synthetic_groups(args.batch_size * (args.warmup + args.steps), p, c, 2, args.seed)
    rows = groups.map(as_pair, remove_columns=groups.column_names)
    with tempfile.TemporaryDirectory() as folder:
        save_model(f"{folder}/model", args, p + c, words_tokenizer())
        train = {side: partial(_train, side, rows, trained, Path(folder), args) for side in SIDES}
        losses = {side: train[side](logging_steps=1).losses for side in ("plain", "filled")}  # and fills the cache
        runs = in_turns(train, args.repeats)
    saved = {}
    for side in ("plain", "filling", "filled"):
        beside_trl, beside_plain = (ratios_of_turns(runs[other], runs[side])["cpu"] for other in ("trl", "plain"))
        saved[side] = {
            "cpu": median(beside_trl),
            "interval": interval_of_turns(beside_trl),
            "of_plain": median(beside_plain),
            "of_plain_interval": interval_of_turns(beside_plain),
        }
    return {
        "trained_layers": trained,
        "sides": {side: medians(found, step="_per_step") for side, found in runs.items()},
        "saved": saved,
        "loss_max_difference": apart(losses["plain"], losses["filled"]),
        **circumstances(args),
    }


def _train(side: str, rows: "Dataset", trained: int, folder: Path, args: argparse.Namespace, **more: Any) -> Run:
    import trl
    from peft import LoraConfig

    import trl_ext

    caches = {"filling": "memory", "filled": str(folder / "states")}
    if side in caches:
        more["trunk_cache"] = caches[side]
    library = trl if side == "trl" else trl_ext
    layers = list(range(args.num_layers - trained, args.num_layers))
    adapter = {"r": args.lora_r, "task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    trainer = library.RewardTrainer(
        model=str(folder / "model"),
        args=library.RewardConfig(**training_arguments(args, str(folder / side), args.batch_size, **more)),
        train_dataset=rows,
        quantization_config=quantization_of(args),
        peft_config=LoraConfig(**adapter, target_modules=targets, layers_to_transform=layers),
    )
    return timed_training(trainer, args.warmup)


def table(report: dict[str, Any]) -> str:
    """The report as a table for the terminal."""
    rows = [["side", "CPU s/step", "MiB", "CPU time of TRL over it", "of ours without a cache over it"]]
    for side, found in report["sides"].items():
        saved = report["saved"].get(side)
        beside = ["", ""] if saved is None else [
            f"{saved['cpu']:.2f} {interval(saved['interval'])}",
            f"{saved['of_plain']:.2f} {interval(saved['of_plain_interval'])}",
        ]  # fmt: skip
        rows.append([SIDES[side], f"{found['cpu_seconds_per_step']:.3f}", mib(found["peak_memory_mib"]), *beside])
    layers, apart_by = report["arguments"]["num_layers"], report["loss_max_difference"]
    return (
        f"{formatted(rows)}\nAdapters on the last {report['trained_layers']} of {layers} layers. Losses with and "
        f"without the cache differ by at most {apart_by:.1e}. {place(report)}"
    )


def plot(report: dict[str, Any], path: Path) -> bool:
    """Bars of the CPU time of a step; False if matplotlib is missing."""
    seconds = [found["cpu_seconds_per_step"] for found in report["sides"].values()]
    return plot_bars(path, list(SIDES.values()), {"CPU s/step": seconds}, "CPU seconds", "Steps with kept states")
