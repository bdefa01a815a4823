"""The runner of all `trl-ext bench` cases: it times sides in turns, measures memory, and writes the report.

A case is a module with `add_arguments(parser)`, `measure(args) -> dict`, `table(report) -> str` and
`plot(report, path) -> bool`. The runner knows clocks, memory, tables and files, and that a trainer can train. It does
not know what a case compares.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import Trainer


@dataclass
class Run:
    """
    Time, memory and logs of one timed run.

    Args:
        wall (`list[float]`), cpu (`list[float]`): wall and CPU seconds of each timed step, or of the single call.
        peak (`float`, *optional*): peak memory in MiB; `None` if the system does not report it.
        history (`list[dict]`): the log entries of a training run.
        model_tokens (`float`): mean number of tokens that the model processes in a batch, padding included.
        flat_batches (`float`): share of the batches that were laid out as flat rows.
        operators (`list[dict]`): with a profiler, the operators of the last step, slowest first.
    """

    wall: list[float]
    cpu: list[float]
    peak: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    model_tokens: float = 0.0
    flat_batches: float = 0.0
    operators: list[dict[str, Any]] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """The losses that a training run logged."""
        return [entry["loss"] for entry in self.history if "loss" in entry]


def run_case(name: str, case: Any, args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure a case, write `bench.json` and `bench.png` to `args.output_dir`, and print the table.

    Returns:
        `dict`: the report: the case's name in `bench`, its measurements, and the [`circumstances`].
    """
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    report = {"bench": name, **case.measure(args)}
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    Path(output, "bench.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(case.table(report))  # after the file is written, because printing fails when the reader of a pipe has left
    plotted = case.plot(report, output / "bench.png")
    print(f"Wrote {output / 'bench.json'}" + (" and bench.png." if plotted else " (no bench.png without matplotlib)."))
    return report


def in_turns(sides: Mapping[str, Callable[[], Run]], repeats: int) -> dict[str, list[Run]]:
    """Run each side `repeats` times. Every turn reverses the order, so that no side always runs first."""
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in sides if turn % 2 == 0 else reversed(sides):
            runs[name].append(sides[name]())
    return runs


def timed(call: Callable[[], Any]) -> Run:
    """Measure time and peak memory of one call. The call itself must wait for the GPU."""
    forget_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Run([time.perf_counter() - wall], [time.process_time() - cpu], peak())


def timed_training(trainer: "Trainer", warmup: int, profiled: bool = False) -> Run:
    """
    Train, and time every optimizer step after the first `warmup` steps.

    The trainer's `args.max_steps` sets the number of steps. `profiled` records the operators of the last step.
    """
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.data_collator = counter = CountTokens(trainer.data_collator)
    clock = step_clock()
    trainer.add_callback(clock)
    profiler = step_profiler(trainer.args.max_steps - 1) if profiled else None
    if profiler is not None:
        trainer.add_callback(profiler)
    forget_peak()
    trainer.train()
    skip = warmup - 1  # the first difference of two stamps belongs to the second step
    batches = trainer.args.max_steps * trainer.args.gradient_accumulation_steps
    return Run(
        wall=differences(clock.wall)[skip:],
        cpu=differences(clock.cpu)[skip:],
        peak=peak(),
        history=trainer.state.log_history,
        model_tokens=counter.tokens / batches,
        flat_batches=counter.flat / batches,
        operators=[] if profiler is None else profiler.operators,
    )


def medians(runs: list[Run], tokens: float | None = None, step: str = "") -> dict[str, float | None]:
    """
    Summarize a side: take each step's median over the runs (all runs see the same batches), then average the steps.

    Args:
        runs (`list[Run]`): the runs of the side.
        tokens (`float`, *optional*): tokens of text in a step, for `tokens_per_second`.
        step (`str`): suffix of the keys that hold times, e.g. `"_per_step"`.
    """
    wall, cpu = (
        statistics.fmean(map(statistics.median, zip(*(getattr(run, clock) for run in runs), strict=True)))
        for clock in ("wall", "cpu")
    )
    peaks = [run.peak for run in runs if run.peak is not None]
    found = {f"seconds{step}": wall, f"cpu_seconds{step}": cpu}
    if tokens is not None:
        found["tokens_per_second"] = tokens / wall
    return found | {"peak_memory_mib": statistics.median(peaks) if peaks else None}


def ratios_of_turns(theirs: list[Run], ours: list[Run]) -> dict[str, list[float]]:
    """
    Their time over ours for each turn, by clock.

    The two runs of a turn follow each other, so they meet about the same load on the machine.
    """
    return {
        clock: [sum(getattr(a, clock)) / sum(getattr(b, clock)) for a, b in zip(theirs, ours, strict=True)]
        for clock in ("wall", "cpu")
    }


def apart(first: list[float], second: list[float]) -> float:
    """The largest absolute difference between two lists of losses or scores."""
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def shape_of(text: str, names: str, least: tuple[int, ...], needed: str) -> tuple[int, ...]:
    """
    Parse a shape such as `256,64,4`.

    Raises:
        ValueError: if the count differs from that of `names` (e.g. `"P,C,K"`), or a number is below its `least`.
    """
    try:
        numbers = tuple(map(int, text.split(",")))
    except ValueError:
        numbers = ()
    if len(numbers) != len(least):
        raise ValueError(f"{text!r} is no shape. Needed: {names}, e.g. {','.join(str(max(4, n)) for n in least)}.")
    if any(number < lowest for number, lowest in zip(numbers, least, strict=True)):
        raise ValueError(f"{text!r} is no shape. Needed: {needed}.")
    return numbers


# ------------------------------------------------------------------------------------------ arguments that cases share
def add_run_arguments(parser: argparse.ArgumentParser, steps: int = 4, repeats: int = 5) -> None:
    """Options of a case that trains: LoRA rank, steps and repeats."""
    parser.add_argument("--lora_r", type=int, default=16, help="rank of LoRA on all linear layers; 0: full weights")
    parser.add_argument("--steps", type=int, default=steps, help="timed optimizer steps of a run")
    parser.add_argument("--warmup", type=int, default=1, help="steps at the start of a run that are not timed")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs of each side, in turns")


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a case that trains large models."""
    parser.add_argument("--load_in_4bit", action="store_true", help="NF4 base (QLoRA)")
    parser.add_argument("--gradient_checkpointing", action="store_true")


def training_arguments(args: argparse.Namespace, output_dir: str, batch_size: int, **more: Any) -> dict[str, Any]:
    """Training arguments that all sides of a case share. Nothing is saved, reported or shown."""
    dtype = dtype_of(args)
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": batch_size,
        "max_steps": args.warmup + args.steps,
        "gradient_checkpointing": getattr(args, "gradient_checkpointing", False),  # not every case has the option
        "bf16": dtype == "bfloat16",
        "model_init_kwargs": {"dtype": dtype, "attn_implementation": args.attn_implementation},
        "max_length": None,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": args.seed,
        **more,
    }


def quantization_of(args: argparse.Namespace) -> Any:
    """The NF4 quantization config with `--load_in_4bit`, else `None`."""
    import torch
    from transformers import BitsAndBytesConfig

    if not args.load_in_4bit:
        return None
    compute = getattr(torch, dtype_of(args))
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for the size, dtype, attention and seed of the model."""
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--num_heads", type=int, default=8)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default=None, help="default: bf16 on a GPU, else fp32"
    )
    parser.add_argument("--attn_implementation", default="sdpa")
    parser.add_argument("--seed", type=int, default=0)


def check_counts(args: argparse.Namespace, **least: int) -> None:
    """Raise `ValueError` if an option is below its minimum."""
    for name, number in least.items():
        if getattr(args, name) < number:
            raise ValueError(f"--{name} is {getattr(args, name)}; needed: {number} or more.")


def dtype_of(args: argparse.Namespace) -> str:
    """The dtype from `--dtype`; by default bf16 on a GPU and fp32 elsewhere."""
    import torch

    return args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")


def circumstances(args: argparse.Namespace) -> dict[str, Any]:
    """Machine, dtype, library versions and arguments, which readers need to interpret the numbers."""
    import torch
    import transformers
    import trl

    import trl_ext

    cuda = torch.cuda.is_available()
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s) of {os.cpu_count()} core(s)"
    return {
        "machine": torch.cuda.get_device_name() if cuda else cpu,
        "memory": "allocated on the GPU" if cuda else "resident",
        "dtype": dtype_of(args),
        "attention": args.attn_implementation,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "trl_ext": trl_ext.__version__,
        },
        "arguments": {name: value for name, value in vars(args).items() if name not in ("command", "output_dir")},
    }


class CountTokens:
    """Wraps a collator and counts the input tokens (padding included) and the batches laid out as flat rows."""

    def __init__(self, collator: Callable):
        self.collator = collator
        self.tokens = 0
        self.flat = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        if isinstance(batch, list):  # rows of a trainer that makes its batches later, such as GRPO
            return batch
        flat = batch.get("prefix_layout")
        self.tokens += batch["input_ids"].numel() if flat is None else flat.num_tokens
        self.flat += flat is not None
        return batch


def step_clock() -> Any:
    """
    A callback that records the time at the end of every optimizer step.

    The time between two stamps includes data loading. On a GPU the callback waits until the step is finished.
    """
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.wall: list[float] = []
            self.cpu: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.wall.append(time.perf_counter())
            self.cpu.append(time.process_time())

    return Clock()


def step_profiler(step: int) -> Any:
    """A callback whose `operators` lists those of one optimizer step (counted from 0), slowest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    class Profiler(TrainerCallback):
        def __init__(self):
            self.operators: list[dict[str, Any]] = []
            on_gpu = torch.cuda.is_available()
            self._clock = "self_device_time_total" if on_gpu else "self_cpu_time_total"
            self._profile = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu)

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                self._profile.start()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step != step + 1:
                return
            self._profile.stop()
            found = self._profile.key_averages()
            total = sum(getattr(event, self._clock) for event in found)
            self.operators = [
                {"name": event.key, "share": getattr(event, self._clock) / total, "calls": event.count}
                for event in sorted(found, key=lambda event: -getattr(event, self._clock))
            ]

    return Profiler()


def differences(stamps: list[float]) -> list[float]:
    """The time from each stamp to the next."""
    return [after - before for before, after in zip(stamps, stamps[1:], strict=False)]


def keep_freed_memory() -> None:
    """
    Make glibc keep large memory blocks after they are freed.

    By default glibc maps every block above 32 MiB anew, which costs a page fault for every 4 KiB. On a CPU this makes
    one step with large tensors slower than several steps with small ones (measured: 10 % of a forward pass). The
    function does nothing with another C library.
    """
    if platform.libc_ver()[0] == "glibc":
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**31 - 1)


def forget_peak() -> None:
    """Return freed memory to the system and reset the peak, as far as the system supports it."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float | None:
    """Peak memory in MiB since [`forget_peak`]; `None` if the system does not report it."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


def formatted(rows: list[list[str]]) -> str:
    """Format rows of cells as a table: the first column is left-aligned, the others are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def plot_bars(path: Path, labels: list[str], series: dict[str, list[float]], ylabel: str, title: str) -> bool:
    """Save grouped bars with a line at 1 as a PNG. Returns `False` if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 1.3 * len(labels)), 4.0), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * width for place in range(len(labels))]
        axes.bar_label(axes.bar(places, values, width, label=name), fmt="%.2f", fontsize=7)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(path)
    return True


def mib(value: float | None) -> str:
    """Format a memory value as a table cell."""
    return "-" if value is None else f"{value:,.0f}"


def place(report: dict[str, Any]) -> str:
    """The line below a table: machine, dtype, attention and kind of memory."""
    return f"{report['machine']}, {report['dtype']}, {report['attention']} attention, memory {report['memory']}"
