"""`trl-ext bench dpo`: compare training steps of `RankedDPOTrainer` with the same steps on padded rows.

For pairs the baseline is `trl.DPOTrainer`. For larger groups, which TRL does not train on, it is our trainer with
`shared_prefix=False`: TRL's forward pass on padded rows, and the same ranking loss. Both sides train on the same
batches, and each step runs the policy and the reference. The case knows trainers. It does not know how they work.
"""

import argparse
import tempfile
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
from trl_ext.bench.synthetic import FIRST_WORD, VOCABULARY, save_model, synthetic_groups, words_tokenizer


if TYPE_CHECKING:
    from datasets import Dataset

GRID = ("64,64,2", "256,64,2", "256,64,4", "512,128,8")
PADDED_TOKENS = 2048
"""Padded tokens of a batch when `--batch_size` is not given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `trl-ext bench dpo`."""
    parser.add_argument(
        "--shapes", nargs="*", default=list(GRID), help="P,C,K: prompt tokens, completion tokens, completions"
    )
    parser.add_argument("--batch_size", type=int, help="prompts in a batch; default: about 2,048 padded tokens")
    parser.add_argument("--output_dir", default="outputs/bench_dpo", help="where bench.json and bench.png go")
    add_run_arguments(parser)
    add_memory_arguments(parser)
    add_model_arguments(parser)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure every shape.

    Returns:
        `dict` with `cases` and the [`circumstances`]. A case has the `baseline`, and what [`padded_beside_ours`]
        returns for the sides `"padded"` and `"trl_ext"`.
    """
    check_counts(args, warmup=1, steps=1, repeats=1)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate(args.shapes):
            p, c, k = shape_of(text, "P,C,K", (1, 1, 2), "P >= 1, C >= 1 and K >= 2")
            if k > VOCABULARY - FIRST_WORD:
                raise ValueError(f"{text!r} has {k} completions; needed: at most {VOCABULARY - FIRST_WORD}.")
            model = f"{folder}/{number}"
            save_model(model, args, p + c + 1, words_tokenizer())
            cases.append(_measure_case((p, c, k), model, args))
            print(line_of(cases[-1]), flush=True)
    return {"cases": cases, **circumstances(args)}


def _rows(number: int, p: int, c: int, k: int, seed: int) -> "Dataset":
    """Rows of text: pairs for K = 2, else rankings."""

    def as_text(row: dict[str, Any]) -> dict[str, Any]:
        words = [[f"w{n}" for n in ids] for ids in row["candidate_ids"]]
        prompt, own = " ".join(words[0][:p]), [" " + " ".join(one[p:]) for one in words]
        if k == 2:
            return {"prompt": prompt, "chosen": own[0], "rejected": own[1]}
        return {"prompt": prompt, "completions": own, "ratings": row["ratings"]}

    groups = synthetic_groups(number, p, c, k, seed)
    return groups.map(as_text, remove_columns=groups.column_names, load_from_cache_file=False)


def _measure_case(shape: tuple[int, int, int], model: str, args: argparse.Namespace) -> dict[str, Any]:
    p, c, k = shape
    size = args.batch_size or max(1, PADDED_TOKENS // (k * (p + c)))
    rows = _rows(size * (args.warmup + args.steps), p, c, k, args.seed)
    train = {side: partial(_train, rows, k == 2, side, size, model, args) for side in ("padded", "trl_ext")}
    return {
        "name": f"({p}, {c}, {k})",
        "baseline": "trl.DPOTrainer" if k == 2 else "padded rows (RankedDPOTrainer, shared_prefix=False)",
        "groups_per_batch": size,
        **padded_beside_ours(train, args.repeats, size * k * (p + c + 1)),  # with EOS
    }


def _train(
    rows: "Dataset", pairs: bool, side: str, size: int, model: str, args: argparse.Namespace, **more: Any
) -> Run:
    """Train one side once; `more` holds further arguments of its config."""
    import trl
    from peft import LoraConfig

    import trl_ext

    trainer_class, config_class = trl_ext.RankedDPOTrainer, trl_ext.RankedDPOConfig
    if side == "padded" and pairs:
        trainer_class, config_class = trl.DPOTrainer, trl.DPOConfig
    else:
        more |= {"loss_type": "bradley_terry" if pairs else "plackett_luce", "min_survival": 0.0}
        more["shared_prefix"] = "auto" if side == "trl_ext" else False
    adapter = LoraConfig(r=args.lora_r, target_modules="all-linear", task_type="CAUSAL_LM") if args.lora_r else None
    trainer = trainer_class(
        model=model,
        args=config_class(**training_arguments(args, f"{model}/{side}", size, **more)),
        train_dataset=rows,
        quantization_config=quantization_of(args),
        peft_config=adapter,
    )
    return timed_training(trainer, args.warmup)


def table(report: dict[str, Any]) -> str:
    """The report as a table for the terminal."""
    return table_of(report, ("groups_per_batch", "prompts"))


def plot(report: dict[str, Any], path: Path) -> bool:
    """Draw the speed-ups beside their bounds. `False` if matplotlib is not installed."""
    return plot_speedups(report, "DPO step: padded rows over flat rows", path)
