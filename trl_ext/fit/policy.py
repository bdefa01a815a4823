"""`trl-ext bench policy`: steps of `DenseGRPOTrainer` and `PPOTrainer` beside TRL's `GRPOTrainer`, and PPO's memory.

All sides sample as many tokens, with a reward function that costs nothing, so the difference is that of the trainers.
The memory is that of live tensors in the first two steps, beside those of `trl.SFTTrainer` on as many tokens.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from trl_ext.bench.runner import (
    Run,
    add_memory_arguments,
    add_model_arguments,
    add_run_arguments,
    check_counts,
    circumstances,
    formatted,
    in_turns,
    medians,
    place,
    plot_bars,
    quantization_of,
    ratios_of_turns,
    shape_of,
    timed_training,
    training_arguments,
)
from trl_ext.bench.synthetic import VOCABULARY, labelled_rows, save_model, words_tokenizer


SIDES = ("grpo", "dense", "ppo")
# The parts of a step that are ours: credit and metrics. PPO's credit contains the forward pass of the critic.
OWN = ("_credit", "_observe")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `trl-ext bench policy`."""
    parser.add_argument("--shapes", nargs="*", default=["64,64,8"], help="P,C,G: prompt and new tokens, completions")
    parser.add_argument("--num_iterations", type=int, default=1, help="optimizer steps on each batch of completions")
    parser.add_argument("--vocab_size", type=int, default=VOCABULARY, help="tokens of the model")
    parser.add_argument("--memory_only", action="store_true", help="do not measure time")
    parser.add_argument("--output_dir", default="outputs/bench_policy", help="where bench.json and bench.png go")
    add_run_arguments(parser, steps=3, repeats=3)
    add_memory_arguments(parser)
    add_model_arguments(parser)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure every shape.

    Returns:
        `dict` with `cases` and the [`circumstances`]. A case has `sides` (seconds and CPU seconds of a step of each),
        `own_share` (the part of a step of `DenseGRPOTrainer` that is spent in its own code), `dense_ratio` and
        `ppo_ratio` (step time over that of `GRPOTrainer`, CPU time, median of the turns), and `memory`: weights and
        peak of live tensors in MiB of a step of PPO and of SFT, and `ratio`. With `memory_only` it has `name` and
        `memory`.
    """
    check_counts(args, warmup=1, steps=1, repeats=1, num_iterations=1, lora_r=1, vocab_size=VOCABULARY)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for number, shape in enumerate(args.shapes):
            p, c, g = shape_of(shape, "P,C,G", (1, 1, 2), "P >= 1, C >= 1 and G >= 2")
            model = f"{folder}/{number}"
            save_model(model, args, p + c, words_tokenizer(args.vocab_size))
            cases.append(_measure_case(model, args, p, c, g))
    return {"cases": cases, **circumstances(args)}


def _measure_case(model: str, args: argparse.Namespace, p: int, c: int, g: int) -> dict[str, Any]:
    if args.memory_only:
        return {"name": f"({p}, {c}, {g})", "memory": _memory(model, args, p, c, g)}
    shares: list[float] = []

    def train(side: str) -> Run:
        trainer = _policy_trainer(side, model, args, p, c, g)
        own = _watched(trainer) if side == "dense" else None
        start = time.process_time()
        run = timed_training(trainer, args.warmup)
        if own is not None:
            shares.append(own[0] / (time.process_time() - start))
        return run

    runs = in_turns({side: partial(train, side) for side in SIDES}, args.repeats)
    ratio = {
        side: statistics.median(ratios_of_turns(runs[side], runs["grpo"])["cpu"]) for side in SIDES if side != "grpo"
    }
    return {
        "name": f"({p}, {c}, {g})",
        "sides": {side: medians(runs[side], step="_per_step") for side in SIDES},
        "own_share": statistics.median(shares),
        "dense_ratio": ratio["dense"],
        "ppo_ratio": ratio["ppo"],
        "memory": _memory(model, args, p, c, g),
    }


def _policy_trainer(side: str, model: str, args: argparse.Namespace, p: int, c: int, g: int) -> Any:
    """A trainer on random prompts; completions have exactly `c` tokens."""
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from trl_ext import DenseGRPOConfig, DenseGRPOTrainer, PPOConfig, PPOTrainer

    def scalar(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text) % 7) for text in completions]

    def dense(completions: list[str], **columns: Any) -> list[Any]:
        return [[(0, len(text) // 2, 1.0), (len(text) // 2, len(text), 0.5)] for text in completions]

    config, trainer = {
        "grpo": (GRPOConfig, GRPOTrainer),
        "dense": (DenseGRPOConfig, DenseGRPOTrainer),
        "ppo": (PPOConfig, PPOTrainer),
    }[side]
    arguments = training_arguments(
        args,
        f"{model}/{side}",
        g,
        num_generations=g,
        max_completion_length=c,
        num_iterations=args.num_iterations,
        generation_kwargs={"min_new_tokens": c},
        beta=0.0,
    )
    del arguments["max_length"]
    rows = labelled_rows("orm", args.warmup + args.steps, p, 2, 1, args.seed).select_columns(["prompt"])
    more = {} if side == "grpo" else {"dense_reward_funcs": dense}
    return trainer(
        model=model,
        reward_funcs=scalar,
        args=config(**arguments),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model),
        quantization_config=quantization_of(args),
        peft_config=LoraConfig(r=args.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"),
        **more,
    )


def _watched(trainer: Any) -> list[float]:
    """A list whose one number grows by the CPU seconds that the trainer spends in its own code."""
    spent = [0.0]

    def timed(function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[0] += time.process_time() - start

        return call

    for name in OWN:
        setattr(trainer, name, timed(getattr(trainer, name)))
    return spent


def _memory(model: str, args: argparse.Namespace, p: int, c: int, g: int) -> dict[str, float]:
    """Weights and peak of live tensors in MiB, in steps of PPO and of SFT on as many tokens."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from trl_ext.fit.live_bytes import LiveBytes

    # after the first step there are states of the optimizer
    short = argparse.Namespace(**{**vars(args), "warmup": 0, "steps": args.num_iterations + 1})
    ids = {"input_ids": [[5] * (p + c)] * g, "labels": [[5] * (p + c)] * g}
    sft = SFTTrainer(
        model=model,
        args=SFTConfig(**training_arguments(short, f"{model}/sft", g)),
        train_dataset=Dataset.from_dict(ids),
        processing_class=AutoTokenizer.from_pretrained(model),
        quantization_config=quantization_of(args),
        peft_config=LoraConfig(r=args.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    found: dict[str, float] = {}
    for name, trainer in (("ppo", _policy_trainer("ppo", model, short, p, c, g)), ("sft", sft)):
        modules = [trainer.model, *filter(None, [getattr(trainer, "value_model", None)])]  # SFT has none
        weights = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in weights}
        trainer.remove_callback(PrinterCallback)
        with LiveBytes(weights) as count:
            trainer.train()
        found[f"{name}_weights"] = sum(sizes.values()) / 2**20
        found[f"{name}_peak"] = count.peak / 2**20
    total = {name: found[f"{name}_weights"] + found[f"{name}_peak"] for name in ("ppo", "sft")}
    return found | {"ratio": total["ppo"] / total["sft"]}


def table(report: dict[str, Any]) -> str:
    """The report as a table for the terminal."""
    if "sides" not in report["cases"][0]:
        memory = [[case["name"], *(f"{value:,.2f}" for value in case["memory"].values())] for case in report["cases"]]
        names = [name.replace("_", " ") for name in report["cases"][0]["memory"]]
        return f"{formatted([['(P, C, G)', *names], *memory])}\nMiB: weights and live tensors.\n{place(report)}"
    rows = [["(P, C, G)", *(f"{side} s" for side in SIDES), "dense/grpo", "own share", "ppo/grpo", "MiB ppo/sft"]]
    for case in report["cases"]:
        times = [f"{case['sides'][side]['cpu_seconds_per_step']:.3f}" for side in SIDES]
        shares = [f"{case['dense_ratio']:.2f}", f"{case['own_share']:.2%}", f"{case['ppo_ratio']:.2f}"]
        rows.append([case["name"], *times, *shares, f"{case['memory']['ratio']:.2f}"])
    return f"{formatted(rows)}\nCPU seconds of an optimizer step. MiB: weights and live tensors.\n{place(report)}"


def plot(report: dict[str, Any], path: Path) -> bool:
    """Plot the step times over GRPO's as bars. Returns `False` if matplotlib is not installed or nothing was timed."""
    if "sides" not in report["cases"][0]:
        return False
    labels = [case["name"] for case in report["cases"]]
    series = {side: [case[f"{side}_ratio"] for case in report["cases"]] for side in ("dense", "ppo")}
    return plot_bars(
        path, labels, series, "CPU time / that of GRPO", "Optimizer step: prompt, new tokens, completions"
    )
