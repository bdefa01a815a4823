"""The one runner of `trl-ext bench`: sides take turns, and it records time, memory, medians, ratios and the report.

A case is a module with `add_arguments(parser)`, `measure(args) -> dict`, `table(report) -> str` and
`plot(report, path) -> bool`. The runner knows clocks, memory, trainers as things that train, tables and files. It does
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
    What one timed run took.

    Args:
        wall (`list[float]`), cpu (`list[float]`): seconds of each timed step, or of the one call.
        peak (`float`, *optional*): peak memory in MiB; `None` where the system cannot tell.
        history (`list[dict]`): what a training logged.
        model_tokens (`float`): tokens that a batch put through the model, padding included.
        flat_batches (`float`): share of the batches that were flat rows.
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
        """The losses that a training logged."""
        return [entry["loss"] for entry in self.history if "loss" in entry]


def run_case(name: str, case: Any, args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure a case, write `bench.json` and `bench.png` to `args.output_dir`, and print the table.

    Returns:
        `dict`: the report: what the case measured, under `bench` its name, and the circumstances.
    """
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    report = {"bench": name, **case.measure(args)}
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    Path(output, "bench.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(case.table(report))  # after the file: the reader may be gone
    plotted = case.plot(report, output / "bench.png")
    print(f"Wrote {output / 'bench.json'}" + (" and bench.png." if plotted else " (no bench.png without matplotlib)."))
    return report


def in_turns(sides: Mapping[str, Callable[[], Run]], repeats: int) -> dict[str, list[Run]]:
    """Run each side `repeats` times. The order turns round with every turn, so that no side is always first."""
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in sides if turn % 2 == 0 else reversed(sides):
            runs[name].append(sides[name]())
    return runs


def timed(call: Callable[[], Any]) -> Run:
    """One call: its time, and its peak memory. The caller waits for the GPU inside the call."""
    forget_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Run([time.perf_counter() - wall], [time.process_time() - cpu], peak())


def timed_training(trainer: "Trainer", warmup: int, profiled: bool = False) -> Run:
    """
    Train, and time every optimizer step after the first `warmup` of them.

    `args.max_steps` of the trainer says how many steps there are. With `profiled` the last step is recorded.
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
    What a side takes: the median of each step over the runs (its batch is the same in all), averaged over the steps.

    Args:
        runs (`list[Run]`): the runs of the side.
        tokens (`float`, *optional*): tokens of text in a step, for `tokens_per_second`.
        step (`str`): ends the names of the times, e.g. `"_per_step"`.
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
    """Their time over ours, turn by turn, by clock: the two runs of a turn meet the same load of the machine."""
    return {
        clock: [sum(getattr(a, clock)) / sum(getattr(b, clock)) for a, b in zip(theirs, ours, strict=True)]
        for clock in ("wall", "cpu")
    }


def apart(first: list[float], second: list[float]) -> float:
    """The largest difference of two lists of losses or scores, value by value."""
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def shape_of(text: str, names: str, least: tuple[int, ...], needed: str) -> tuple[int, ...]:
    """
    The numbers of a shape such as `256,64,4`.

    Raises:
        `ValueError`: it has other than as many numbers as `names` (such as `"P,C,K"`), or one below its `least`.
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
    """Options of a case that trains: how many steps, and how often."""
    parser.add_argument("--lora_r", type=int, default=16, help="rank of LoRA on all linear layers; 0: full weights")
    parser.add_argument("--steps", type=int, default=steps, help="timed optimizer steps of a run")
    parser.add_argument("--warmup", type=int, default=1, help="steps at the start of a run that are not timed")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs of each side, in turns")


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a case that trains large models."""
    parser.add_argument("--load_in_4bit", action="store_true", help="NF4 base (QLoRA)")
    parser.add_argument("--gradient_checkpointing", action="store_true")


def training_arguments(args: argparse.Namespace, output_dir: str, batch_size: int, **more: Any) -> dict[str, Any]:
    """Arguments of a training config that all sides of a case share; nothing is saved, reported or shown."""
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
    """NF4 where `--load_in_4bit` was given."""
    import torch
    from transformers import BitsAndBytesConfig

    if not args.load_in_4bit:
        return None
    compute = getattr(torch, dtype_of(args))
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say which model is run, and how."""
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--num_heads", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="default: bf16 on GPU, or fp32")
    parser.add_argument("--attn_implementation", default="sdpa")
    parser.add_argument("--seed", type=int, default=0)


def check_counts(args: argparse.Namespace, **least: int) -> None:
    """Raise `ValueError` for an option below the number that it needs at least."""
    for name, number in least.items():
        if getattr(args, name) < number:
            raise ValueError(f"--{name} is {getattr(args, name)}; needed: {number} or more.")


def dtype_of(args: argparse.Namespace) -> str:
    """The dtype that was asked for, or bf16 on a GPU and fp32 elsewhere."""
    import torch

    return args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")


def circumstances(args: argparse.Namespace) -> dict[str, Any]:
    """Machine, dtype, versions and arguments: what a number is worth nothing without."""
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
    """A collator that counts the tokens (padding too) which the model is given, and the batches that are flat rows."""

    def __init__(self, collator: Callable):
        self.collator = collator
        self.tokens = 0
        self.flat = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        flat = batch.get("prefix_layout")
        self.tokens += batch["input_ids"].numel() if flat is None else flat.num_tokens
        self.flat += flat is not None
        return batch


def step_clock() -> Any:
    """A callback that stamps the end of every optimizer step (data loading included), on a GPU once it is done."""
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
    """A callback that records the operators of one optimizer step (counted from 0), as `operators`, slowest first."""
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
    """From each stamp to the next."""
    return [after - before for before, after in zip(stamps, stamps[1:], strict=False)]


def keep_freed_memory() -> None:
    """
    Have glibc keep large blocks that were freed.

    It maps blocks above 32 MiB anew each time, at a page fault for every 4 KiB, so that on a CPU a step with such
    tensors takes longer than several with smaller ones (seen: 10 % in a forward pass). Elsewhere nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**31 - 1)


def forget_peak() -> None:
    """Give freed memory back and start a new measurement of the peak, where the system can."""
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
    """Peak memory in MiB since `forget_peak`; `None` where the system cannot tell."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


def formatted(rows: list[list[str]]) -> str:
    """Rows of cells as a table for the terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def plot_bars(path: Path, labels: list[str], series: dict[str, list[float]], ylabel: str, title: str) -> bool:
    """Groups of bars as a PNG with a line at 1; `False` where matplotlib is not installed."""
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
    """A cell of the table for memory."""
    return "-" if value is None else f"{value:,.0f}"


def place(report: dict[str, Any]) -> str:
    """The line below a table: where and how it was measured."""
    return f"{report['machine']}, {report['dtype']}, {report['attention']} attention, memory {report['memory']}"


def plot_speedups(report: dict[str, Any], title: str, path: Path) -> bool:
    """Time ratios and the token bound of every case as bars; `False` where matplotlib is not installed."""
    cases = report["cases"]
    series = {
        "time ratio (wall)": [case["speedup"] for case in cases],
        "time ratio (CPU)": [case["cpu_speedup"] for case in cases],
        "token bound": [case["token_bound"] for case in cases],
    }
    title = f"{title}\n{report['machine']}, {report['dtype']}"
    return plot_bars(path, [case["name"] for case in cases], series, "times faster", title)
