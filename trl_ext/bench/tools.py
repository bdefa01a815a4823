"""What the measurements of `trl-ext bench` share: clocks, memory, models with random weights, synthetic rows, plots.

Knows nothing of trainers and scorers, nor of what is compared with what.
"""

import argparse
import ctypes
import importlib.util
import os
import platform
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

VOCABULARY = 4096
FIRST_WORD = 3  # 0, 1, 2 are pad, bos and eos
SPAN = 16  # tokens of a step or segment
CHAT_TEMPLATE = "{% for m in messages %}<bos>{{ m['role'] }}\n{{ m['content'] }}<eos>\n{% endfor %}"


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


def synthetic_groups(number: int, prompt: int, completion: int, candidates: int, seed: int = 0) -> "Dataset":
    """
    Tokenized rankings: a random prompt of `prompt` tokens, and `candidates` completions of `completion` tokens each.

    Their first tokens differ, so that the candidates share the prompt and nothing else.
    """
    from datasets import Dataset

    rng = random.Random(seed)

    def words(length: int) -> list[int]:
        return [rng.randrange(FIRST_WORD, VOCABULARY) for _ in range(length)]

    rows = []
    for _ in range(number):
        shared, first = words(prompt), rng.sample(range(FIRST_WORD, VOCABULARY), candidates)
        ids = [[*shared, own, *words(completion - 1)] for own in first]
        rows.append({"candidate_ids": ids, "ratings": [float(candidates - k) for k in range(candidates)]})
    return Dataset.from_list(rows)


def labelled_rows(kind: str, prompts: int, p: int, c: int, k: int, seed: int = 0) -> "Dataset":
    """
    Rows of `kind` `"orm"`, `"prm"` or `"segment"`: k completions of c tokens to each prompt of p, labelled by chance.

    Of outcomes EOS is one of the c tokens. Steps and segments are `SPAN` tokens long, the last one what is left.
    """
    from datasets import Dataset

    rng = random.Random(seed)

    def words(length: int) -> str:
        return " ".join(f"w{rng.randrange(FIRST_WORD, VOCABULARY)}" for _ in range(length))

    def completion() -> dict[str, Any]:
        if kind == "orm":
            return {"completion": words(c - 1), "label": rng.random() < 0.5}
        parts = [words(min(SPAN, c - start)) for start in range(0, c, SPAN)]
        if kind == "prm":
            return {"completions": parts, "labels": [rng.random() < 0.5 for _ in parts]}
        starts = [sum(len(part) + 1 for part in parts[:n]) for n in range(len(parts))]
        segments = [
            {"start": start, "end": start + len(part), "score": rng.random()}
            for start, part in zip(starts, parts, strict=True)
        ]
        return {"completion": " ".join(parts), "segments": segments}

    questions = [f"{words(p)}\n" if p else "" for _ in range(prompts)]
    return Dataset.from_list([{"prompt": question, **completion()} for question in questions for _ in range(k)])


def words_tokenizer(size: int = VOCABULARY) -> "PreTrainedTokenizerBase":
    """A tokenizer for texts of the words w3, w4, ...: one token each, `size` of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{n}": n for n in range(FIRST_WORD, size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrapped(words)


def tokenizer_of(rows: "Dataset") -> "PreTrainedTokenizerBase":
    """A byte-level BPE tokenizer of up to 4,096 tokens, trained on the rows' texts, with a plain chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    columns = [name for name in ("prompt", "chosen", "rejected", "completions") if name in rows.column_names]
    if not columns:
        raise ValueError(f"The rows have no text to train a tokenizer on, only {rows.column_names}.")
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(_texts([rows[name] for name in columns]), trainer)
    return _wrapped(pieces)


def save_model(folder: str, args: argparse.Namespace, max_positions: int, tokenizer: Any) -> None:
    """A Llama-style language model with random weights, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=max(len(tokenizer), VOCABULARY),
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        num_key_value_heads=args.num_heads,
        max_position_embeddings=max_positions,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(args.seed)
    LlamaForCausalLM(config).to(torch.bfloat16 if dtype_of(args) == "bfloat16" else torch.float32).save_pretrained(
        folder
    )


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


def _wrapped(tokenizer: Any) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _texts(value: Any) -> Iterator[str]:
    """Every string in rows of text or messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif value is not None:
        for item in value:
            yield from _texts(item)
