"""`trl-ext bench reward`: compare training steps of our `RewardTrainer` with the same steps on padded rows.

For pairs the baseline is `trl.RewardTrainer`. TRL's trainer only accepts pairs, so for larger groups the baseline is
our trainer with `shared_prefix=False`: it right-pads rows as TRL does and uses the same ranking loss. Both sides train
on the same batches. The case knows trainers. It does not know how either of them works.
"""

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.bench.padded import line_of, padded_beside_ours, plot_speedups, table_of
from trl_ext.bench.runner import (
    Run,
    add_memory_arguments,
    add_model_arguments,
    add_run_arguments,
    check_counts,
    circumstances,
    quantization_of,
    shape_of,
    timed_training,
    training_arguments,
)
from trl_ext.bench.synthetic import (
    FIRST_WORD,
    VOCABULARY,
    as_pair,
    save_model,
    synthetic_groups,
    tokenizer_of,
    words_tokenizer,
)


if TYPE_CHECKING:
    from datasets import Dataset

GRID = ("64,64,2", "192,64,2", "256,64,4", "64,256,4", "512,128,8", "0,128,2")
PADDED_TOKENS = 2048
"""Padded tokens of a synthetic batch when `--batch_size` is not given."""


@dataclass
class Case:
    """Groups to train on; `formula` is K(P + C) / (P + KC) if all groups have the same shape, else `None`."""

    name: str
    rows: "Dataset"
    batch_size: int
    formula: float | None = None

    @property
    def pairs(self) -> bool:
        """Whether every group is a pair, so that TRL's trainer can train on the rows."""
        return all(len(ids) == 2 for ids in self.rows["candidate_ids"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `trl-ext bench reward`."""
    parser.add_argument(
        "--shapes", nargs="*", default=list(GRID), help="P,C,K: prompt tokens, completion tokens, candidates"
    )
    parser.add_argument("--dataset_name", help="also preference or ranked rows from a file, a folder or the Hub")
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument(
        "--tokenizer_name", help="for --dataset_name; default: a byte-level BPE of 4,096 tokens trained on its rows"
    )
    parser.add_argument("--max_length", type=int, default=1024, help="most tokens of a candidate of --dataset_name")
    parser.add_argument("--batch_size", type=int, help="groups in a batch; default: about 2,048 padded tokens, or 4")
    parser.add_argument("--profile", action="store_true", help="also show which operators take the last step's time")
    parser.add_argument("--output_dir", default="outputs/bench_reward", help="where bench.json and bench.png go")
    add_run_arguments(parser)
    add_memory_arguments(parser)
    add_model_arguments(parser)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure every shape and the data set.

    Returns:
        `dict` with `cases` and the [`circumstances`]. A case has:

        - `baseline`: the name of the other side.
        - what [`padded_beside_ours`] returns for the sides `"padded"` and `"trl_ext"`.
        - `profile`, with `--profile` only: for each side the `name`, `share` of the step and `calls` of each operator.
    """
    check_counts(args, warmup=1, steps=1, repeats=1)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (case, tokenizer) in enumerate(_cases(args)):
            longest = max(len(ids) for group in case.rows["candidate_ids"] for ids in group)
            save_model(f"{folder}/{number}", args, longest, tokenizer)
            cases.append(_measure_case(case, f"{folder}/{number}", args))
            print(line_of(cases[-1]), flush=True)
    return {"cases": cases, **circumstances(args)}


def _cases(args: argparse.Namespace) -> list[tuple[Case, Any]]:
    """The cases to measure, each with its tokenizer."""
    batches, cases = args.warmup + args.steps, []
    for shape in args.shapes:
        p, c, k = shape_of(shape, "P,C,K", (0, 1, 2), "P >= 0, C >= 1 and K >= 2")
        if k > VOCABULARY - FIRST_WORD:
            most = VOCABULARY - FIRST_WORD
            raise ValueError(f"{shape!r} has {k} candidates; needed: at most {most}, one for each first word.")
        size = args.batch_size or max(1, PADDED_TOKENS // (k * (p + c)))
        rows = synthetic_groups(size * batches, p, c, k, args.seed)
        cases.append((Case(f"({p}, {c}, {k})", rows, size, k * (p + c) / (p + k * c)), words_tokenizer()))
    if args.dataset_name:
        size = args.batch_size or 4
        rows, tokenizer = _real_rows(args, size * batches)
        cases.append((Case(Path(args.dataset_name).name, rows, size), tokenizer))
    return cases


def _real_rows(args: argparse.Namespace, number: int) -> tuple["Dataset", Any]:
    """Token ids and ratings of rows drawn from a data set, prepared exactly as for training."""
    from transformers import AutoTokenizer

    from trl_ext.data.formats import prepare_groups
    from trl_ext.data.sources import load_source, select_split
    from trl_ext.data.tokenization import TokenizationSettings

    rows = select_split(load_source(args.dataset_name), args.dataset_split, "--dataset_split")
    if "clean" in rows.column_names:  # a column set by hand; the preparation refuses irregular rows
        rows = rows.filter(lambda clean: clean, input_columns="clean")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name) if args.tokenizer_name else tokenizer_of(rows)
    prepared, _ = prepare_groups(
        rows.shuffle(seed=args.seed),
        tokenizer,
        tokenization=TokenizationSettings.for_training(tokenizer),
        max_length=args.max_length,
        dataset_name=args.dataset_name,
    )
    if len(prepared) < number:
        raise ValueError(f"{args.dataset_name} has {len(prepared)} usable rows; needed: {number}. Lower --batch_size.")
    prepared = prepared.select(range(number)).select_columns(["candidate_ids", "candidate_ratings"])
    return prepared.rename_column("candidate_ratings", "ratings"), tokenizer


def _measure_case(case: Case, model: str, args: argparse.Namespace) -> dict[str, Any]:
    train = {side: partial(_train, case, side, model, args) for side in ("padded", "trl_ext")}
    tokens = sum(len(ids) for group in case.rows["candidate_ids"] for ids in group) / (args.warmup + args.steps)
    report = {
        "name": case.name,
        "baseline": "trl.RewardTrainer"
        if case.pairs
        else "padded rows (trl_ext.RewardTrainer, shared_prefix=False, plackett_luce)",
        "groups_per_batch": case.batch_size,
        "formula": case.formula,
        **padded_beside_ours(train, args.repeats, tokens),
    }
    if args.profile:
        report["profile"] = {side: run(profiled=True).operators for side, run in train.items()}
    return report


def _train(case: Case, side: str, model: str, args: argparse.Namespace, profiled: bool = False, **more: Any) -> Run:
    """Train one side once; `more` holds further arguments of its config."""
    import trl
    from peft import LoraConfig

    import trl_ext

    library, rows = trl_ext, case.rows
    if case.pairs:
        rows = rows.map(as_pair, remove_columns=rows.column_names, load_from_cache_file=False)
    if side == "padded" and case.pairs:
        library = trl
    else:
        more |= {"shared_prefix": "auto" if side == "trl_ext" else False, "min_survival": 0.0}
        more["loss_type"] = "bradley_terry" if case.pairs else "plackett_luce"
    adapter = {"r": args.lora_r, "target_modules": "all-linear", "task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    trainer = library.RewardTrainer(
        model=model,
        args=library.RewardConfig(**training_arguments(args, f"{model}/{side}", case.batch_size, **more)),
        train_dataset=rows,
        quantization_config=quantization_of(args),
        peft_config=LoraConfig(**adapter) if args.lora_r else None,
    )
    return timed_training(trainer, args.warmup, profiled)


def table(report: dict[str, Any]) -> str:
    """The report as a table for the terminal."""
    explained = (
        "TRL: trl.RewardTrainer; for groups of more than two, our trainer on padded rows with the Plackett-Luce loss. "
        "Flat rows: sdpa by index."
    )
    profiles = "".join(_profile_lines(case) for case in report["cases"] if "profile" in case)
    return table_of(report, ("groups_per_batch", "groups"), ("TRL", "ours"), explained) + profiles


def _profile_lines(case: dict[str, Any], smallest: float = 0.02) -> str:
    lines = [f"\n\n{case['name']}: where the time of a step goes"]
    for side, operators in case["profile"].items():
        shown = [f"{op['name']} {op['share']:.0%} ({op['calls']})" for op in operators if op["share"] >= smallest]
        lines.append(f"  {side}: " + ", ".join(shown))
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> bool:
    """Plot time ratio and token bound of every case as bars. Returns `False` if matplotlib is not installed."""
    return plot_speedups(report, "Optimizer step, padded rows over shared prefix", path)
