"""The measurement of `trl-ext bench fit`: real steps of trainers on models with random weights.

It knows trainers and live tensors. It does not know how an estimate is made.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from trl_ext.bench.runner import peak, timed_training
from trl_ext.fit.config import TRAINERS, Parsed, changed
from trl_ext.fit.rows import SEPARATOR, Sizes, rows_for


GIB = 2**30
WARMUP = 1
"""Optimizer steps that are not timed."""
MOST_FLOPS_ON_CPU = 2e12
"""A batch with more operations is not run without a GPU."""


def too_much_here(flops: float) -> str | None:
    """The reason why a batch with this many operations is not run on this machine, or `None`."""
    import torch

    if torch.cuda.is_available() or flops <= MOST_FLOPS_ON_CPU:
        return None
    return f"no GPU, and {flops:.1e} operations in a batch are too many here"


def measured(run: Callable[[bool], dict[str, Any]], gpu_memory: float, activations: int) -> dict[str, Any]:
    """
    Measure a run, and the error of the estimate of its activations (in bytes).

    `run` is called with `False`. On a CPU the system does not report the memory of tensors, so `run` is called a
    second time with `True` and counts them.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_memory * GIB / whole))
    try:
        found = run(False)
        if not on_gpu:
            counted = run(True)
            found |= {name: counted[name] for name in ("activations_gib", "phases_gib") if name in counted}
    except torch.OutOfMemoryError as error:
        return {"fits": False, "out_of_memory": str(error).splitlines()[0]}
    finally:
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)
    found["fits"] = True if on_gpu else None
    found["estimated_activations_gib"] = activations / GIB
    found["error"] = activations / GIB / found["activations_gib"] - 1.0
    return found


def run_training(
    command: str, parsed: Parsed, model: Path, sizes: Sizes, args: argparse.Namespace, count: bool
) -> dict[str, Any]:
    """Run a few steps of the trainer of a command."""
    from trl_ext import trainers
    from trl_ext.trainers.common.command_line import build_trainer

    parsed = for_a_run(parsed, model, args)
    training = parsed.training
    if command == "prm":
        training.step_separator = SEPARATOR
    members = training.num_members if command == "ensemble" and training.data_strategy.startswith("column") else 0
    number = _micro_batches(training, args) * sizes.rows
    rows = rows_for(command, sizes, number, vars(training).get("categories"), args.seed)
    if members:
        name = training.data_strategy.partition(":")[2]
        rows = rows.add_column(name, [number % members for number in range(len(rows))])
    trainer = build_trainer(getattr(trainers, TRAINERS[command]), training, parsed.model, rows)
    tokens = sizes.rows * sizes.length * (sizes.candidates if command in ("reward", "ensemble") else 1)
    return _train(trainer, args, tokens, count)


def for_a_run(parsed: Parsed, model: Path, args: argparse.Namespace) -> Parsed:
    """The arguments of a short run that saves and reports nothing."""
    training = parsed.training
    steps = min(2, training.gradient_accumulation_steps)  # 2 covers steps with and without earlier gradients
    new = {
        "output_dir": str(model.parent / "run"),
        "gradient_accumulation_steps": steps,
        "max_steps": WARMUP + args.steps,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "logging_steps": 10_000,
        "report_to": [],
        "disable_tqdm": True,
        "push_to_hub": False,
    }
    return changed(parsed, new | {"model_name_or_path": str(model), "model_revision": "main"})


def _micro_batches(training: Any, args: argparse.Namespace) -> int:
    return training.gradient_accumulation_steps * (WARMUP + args.steps)


def _train(trainer: Any, args: argparse.Namespace, tokens: int, count: bool) -> dict[str, Any]:
    """Train and measure time, peak memory and activations. `tokens` is the text of a micro-batch in tokens."""
    import torch

    from trl_ext.fit.live_bytes import LiveBytes

    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    with LiveBytes(tensors) if count else nullcontext() as live:
        run = timed_training(trainer, WARMUP)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    states = [t for state in trainer.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    optimizer = sum(t.numel() * t.element_size() for t in states)
    found: dict[str, Any] = {"optimizer_gib": optimizer / GIB, "gradients_gib": gradients / GIB}
    seconds = statistics.median(run.wall)
    found["seconds_per_step"] = seconds
    accumulation = trainer.args.gradient_accumulation_steps
    found["model_tokens_per_second"] = run.model_tokens * accumulation / seconds
    found["text_tokens_per_second"] = tokens * accumulation / seconds
    found["flat_batches"] = run.flat_batches
    return found | peaks(tensors, optimizer + gradients, None if live is None else live.peak)


def peaks(tensors: Sequence[Any], beside: int, live: int | None) -> dict[str, Any]:
    """Peaks in GiB, and the activations: the peak without the model's tensors and without the bytes `beside`."""
    import torch

    if torch.cuda.is_available():
        weights = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        most = torch.cuda.max_memory_allocated()
        found = {"peak_allocated_gib": most / GIB, "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB}
        return found | {"activations_gib": (most - weights - beside) / GIB}
    found = {"peak_rss_gib": None if peak() is None else peak() / 1024}
    return found if live is None else found | {"activations_gib": (live - beside) / GIB}
