"""What `trl-ext bench fit` measures: real training, scoring and writing of models with random weights.

Knows trainers, scorers and generators, clocks and tensors that are alive. Knows no estimates but their
numbers.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl_ext.bench.runner import CountTokens, differences, forget_peak, peak, step_clock
from trl_ext.fit.config import TRAINERS, Parsed, changed
from trl_ext.fit.rows import SEPARATOR, Sizes, random_text, rows_for


GIB = 2**30
WARMUP = 1
"""Optimizer steps that are not timed."""
MOST_FLOPS_ON_CPU = 2e12
"""Of a batch: more than that is not run without a GPU."""


def too_much_here(flops: float) -> str | None:
    """Why a batch of so many operations is not run on this machine; `None` where it is."""
    import torch

    if torch.cuda.is_available() or flops <= MOST_FLOPS_ON_CPU:
        return None
    return f"no GPU, and {flops:.1e} operations in a batch are too many here"


def measured(run: Callable[[bool], dict[str, Any]], gpu_memory: float, activations: int) -> dict[str, Any]:
    """
    What a run takes, and how far off the estimate of its activations (bytes) is.

    `run` is called with `False`; on a CPU, where the system cannot tell what tensors take, with `True` too: then it
    counts them.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_memory * GIB / whole))
    try:
        found = run(False)
        if not on_gpu:
            found["activations_gib"] = run(True)["activations_gib"]
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
    """Some steps of a command's trainer of reward models."""
    import trl_ext
    from trl_ext.cli._train import build_trainer

    parsed = _for_a_run(parsed, model, args)
    training = parsed.training
    if command == "prm":
        training.step_separator = SEPARATOR
    members = training.num_members if command == "ensemble" and training.data_strategy.startswith("column") else 0
    number = _micro_batches(training, args) * sizes.rows
    rows = rows_for(command, sizes, number, vars(training).get("categories"), args.seed)
    if members:
        name = training.data_strategy.partition(":")[2]
        rows = rows.add_column(name, [number % members for number in range(len(rows))])
    trainer = build_trainer(trl_ext.__getattr__(TRAINERS[command]), training, parsed.model, rows)
    tokens = sizes.rows * sizes.length * (sizes.candidates if command in ("reward", "ensemble") else 1)
    return _train(trainer, args, tokens, count)


def run_text_training(
    parsed: Parsed, model: Path, teacher: Path | None, plain: bool, sizes: Sizes, args: argparse.Namespace, count: bool
) -> dict[str, Any]:
    """Some steps of TRL's `SFTTrainer` (`plain`), or of `WeakToStrongTrainer`, with a teacher or none."""
    import trl
    from trl import get_peft_config, get_quantization_config

    from trl_ext import WeakToStrongTrainer
    from trl_ext.pipelines.generation.transformers_backend import load_policy

    parsed = _for_a_run(parsed, model, args)
    training, own = parsed.training, parsed.model
    rows = rows_for("text", sizes, _micro_batches(training, args) * sizes.rows, seed=args.seed)
    loading = {"dtype": own.dtype, "attn_implementation": own.attn_implementation}
    policy = load_policy(model, loading | {"quantization_config": get_quantization_config(own)})
    more = {} if teacher is None else {"teacher_model": load_policy(teacher)}
    trainer = (trl.SFTTrainer if plain else WeakToStrongTrainer)(
        model=policy, args=training, train_dataset=rows, peft_config=get_peft_config(own), **more
    )
    beside = [] if teacher is None else [*more["teacher_model"].parameters(), *more["teacher_model"].buffers()]
    return _train(trainer, args, sizes.rows * sizes.length, count, beside)


def run_scoring(
    parsed: Parsed, model: Path, sizes: Sizes, num_labels: int, args: argparse.Namespace, count: bool
) -> dict[str, Any]:
    """One batch of rows that share prompts, by `RewardScorer`."""
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config

    from trl_ext import RewardScorer
    from trl_ext.models.adapters import add_adapter
    from trl_ext.models.building import build_reward_model

    loading = {"dtype": parsed.model.dtype, "quantization_config": get_quantization_config(parsed.model)}
    loaded, head = build_reward_model(str(model), num_labels=num_labels, **loading)
    adapter = get_peft_config(parsed.model)
    loaded = loaded if adapter is None else add_adapter(loaded, adapter, head)
    scorer = RewardScorer(loaded, AutoTokenizer.from_pretrained(model))
    texts = [random_text(sizes.prompt, sizes.words, args.seed + number) for number in range(sizes.rows)]
    prompts = [text for text in texts for _ in range(sizes.candidates)]
    completions = [f" {random_text(sizes.completion, sizes.words, number)}" for number in range(len(prompts))]
    return _infer(lambda: scorer(prompts, completions), loaded, len(prompts) * sizes.length, count)


def run_writing(
    policy: Any, tokenizer: Any, sampling: Any, sizes: Sizes, args: argparse.Namespace, count: bool
) -> dict[str, Any]:
    """One batch of completions, by our backend in this process."""
    from trl_ext.pipelines.generation.transformers_backend import TransformersGenerator

    generator = TransformersGenerator(policy, sampling, tokenizer, sizes.rows)
    # a token shorter, so that the batch has padding, as real ones
    lengths = [sizes.prompt - (number == 0 and sizes.prompt > 1) for number in range(sizes.rows)]
    prompts = [random_text(length, sizes.words, args.seed + number) for number, length in enumerate(lengths)]
    return _infer(lambda: generator.generate(prompts, 1, args.seed), policy, sizes.rows * sizes.completion, count)


def _for_a_run(parsed: Parsed, model: Path, args: argparse.Namespace) -> Parsed:
    training = parsed.training
    steps = min(2, training.gradient_accumulation_steps)  # where gradients of an earlier micro-batch are there or not
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


def _train(
    trainer: Any, args: argparse.Namespace, tokens: int, count: bool, beside: Sequence[Any] = ()
) -> dict[str, Any]:
    """Train: time, peak memory, and what of it were activations. `tokens` of texts are in a micro-batch."""
    import torch
    from transformers import PrinterCallback

    from trl_ext.fit.live_bytes import LiveBytes

    trainer.remove_callback(PrinterCallback)
    trainer.data_collator = counter = CountTokens(trainer.data_collator)
    clock = step_clock()
    trainer.add_callback(clock)
    forget_peak()
    tensors = [*trainer.model.parameters(), *trainer.model.buffers(), *beside]
    live = None
    if count:
        with LiveBytes(tensors) as live:
            trainer.train()
    else:
        trainer.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    states = [t for state in trainer.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    optimizer = sum(t.numel() * t.element_size() for t in states)
    found: dict[str, Any] = {"optimizer_gib": optimizer / GIB, "gradients_gib": gradients / GIB}
    accumulation = trainer.args.gradient_accumulation_steps
    seconds = statistics.median(differences(clock.wall))
    found["seconds_per_step"] = seconds
    found["model_tokens_per_second"] = counter.tokens / (WARMUP + args.steps) / seconds
    found["text_tokens_per_second"] = tokens * accumulation / seconds
    found["flat_batches"] = counter.flat / (accumulation * (WARMUP + args.steps))
    return found | _memory(tensors, optimizer + gradients, None if live is None else live.peak)


def _infer(run: Callable[[], Any], model: Any, tokens: int, count: bool) -> dict[str, Any]:
    from trl_ext.fit.live_bytes import LiveBytes

    tensors, live = [*model.parameters(), *model.buffers()], None
    if not count:
        run()  # the warm-up
    forget_peak()
    started = time.perf_counter()
    if count:
        with LiveBytes(tensors) as live:
            run()
    else:
        run()
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {"seconds": seconds, "text_tokens_per_second": tokens / seconds}
    return found | _memory(tensors, 0, None if live is None else live.peak)


def _memory(tensors: Sequence[Any], beside: int, live: int | None) -> dict[str, Any]:
    """Peaks in GiB, and of the peak what is neither a tensor of the model nor `beside`."""
    import torch

    if torch.cuda.is_available():
        weights = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        most = torch.cuda.max_memory_allocated()
        found = {"peak_allocated_gib": most / GIB, "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB}
        return found | {"activations_gib": (most - weights - beside) / GIB}
    found = {"peak_rss_gib": None if peak() is None else peak() / 1024}
    return found if live is None else found | {"activations_gib": (live - beside) / GIB}
