"""The table of trainers: for each its class, its rows, and how a tiny run of it is made.

A file that tests a property (checkpoints, accumulation, two processes ...) takes its trainers from here by name. A
trainer that joins the table joins those tests. Knows nothing of the properties.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PrinterCallback, Trainer

from tests.tiny import ranked_rows
from tests.trainers.helpers import config, lora
from trl_ext import (
    ORMConfig,
    ORMEnsembleConfig,
    ORMEnsembleTrainer,
    ORMTrainer,
    PRMConfig,
    PRMEnsembleConfig,
    PRMEnsembleTrainer,
    PRMTrainer,
    RewardConfig,
    RewardEnsembleConfig,
    RewardEnsembleTrainer,
    RewardTrainer,
    SegmentEnsembleConfig,
    SegmentEnsembleTrainer,
    SegmentRewardConfig,
    SegmentRewardTrainer,
)


_GOOD = ("good", "clear", "correct", "kind")
_BAD = ("bad", "vague", "wrong", "rude")


def _words(rng: random.Random, good: bool, count: int) -> str:
    return " ".join(rng.choice(_GOOD if good else _BAD) for _ in range(count))


def _chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def outcome_rows(n: int, questions: int = 4, chat: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """`n` outcome rows over a few questions: a completion of 1 to 5 good or bad words is right or wrong."""
    rng = random.Random(seed)
    rows = []
    for number in range(n):
        label = rng.random() < 0.5
        prompt = f"Question {number % questions}:"
        text = f" {_words(rng, label, rng.randint(1, 5))}."
        rows.append({"prompt": _chat(prompt) if chat else prompt, "completion": text, "label": label})
    return rows


def step_rows(n: int, most: int = 4, classes: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """`n` stepwise rows of 1 to `most` steps of good words (true or 1), bad ones (false or -1), or both (0)."""
    rng = random.Random(seed)
    rows = []
    for number in range(n):
        steps, labels = [], []
        for _ in range(rng.randint(1, most)):
            label = rng.choice([-1, 0, 1]) if classes == 3 else rng.random() < 0.6
            text = _words(rng, label > 0, rng.randint(1, 4))
            steps.append(text if label else text + " good")
            labels.append(label)
        rows.append({"prompt": f"Question {number}:\n", "completions": steps, "labels": labels})
    return rows


def segment_rows(n: int, binary: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """`n` segment rows: `tone` of each sentence, for two of three rows `length` of the whole; each tenth has none."""
    rng = random.Random(seed)
    rows = []
    for number in range(n):
        text, segments = "", []
        for _ in range(rng.randint(1, 3)):
            good = rng.random() < 0.5
            start = len(text)
            text += _words(rng, good, rng.randint(1, 4)) + ". "
            segments.append({"start": start, "end": len(text) - 1, "score": float(good), "category": "tone"})
        if number % 3:
            score = float(len(text) > 25) if binary else len(text) / 10
            segments.append({"start": 0, "end": len(text) - 1, "score": score, "category": "length"})
        if number % 10 == 9:
            segments = []
        rng.shuffle(segments)
        rows.append({"prompt": f"Question {number}: ", "completion": text.rstrip(), "segments": segments})
    return rows


@dataclass(frozen=True)
class Kind:
    """A trainer of the table."""

    trainer: type[Trainer]
    config: type
    rows: Callable[..., list[dict[str, Any]]]
    """`rows(n, seed=0)` makes n rows."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What every tiny run of it sets in its configuration."""
    trainer_kwargs: Callable[[], dict[str, Any]] = dict
    """What every tiny run of it hands to the trainer."""


RANKED = partial(ranked_rows, k=4, ragged=True, ties=True)
BY_RANK = {"loss_type": "plackett_luce"}
MEMBERS = {"num_members": 3}


def adapter() -> dict[str, Any]:
    return {"peft_config": lora()}


TABLE = {
    "reward": Kind(RewardTrainer, RewardConfig, RANKED, BY_RANK),
    "orm": Kind(ORMTrainer, ORMConfig, outcome_rows),
    "prm": Kind(PRMTrainer, PRMConfig, step_rows),
    "segment": Kind(SegmentRewardTrainer, SegmentRewardConfig, segment_rows),
    "reward ensemble": Kind(RewardEnsembleTrainer, RewardEnsembleConfig, RANKED, BY_RANK | MEMBERS, adapter),
    "orm ensemble": Kind(ORMEnsembleTrainer, ORMEnsembleConfig, outcome_rows, MEMBERS, adapter),
    "prm ensemble": Kind(PRMEnsembleTrainer, PRMEnsembleConfig, step_rows, MEMBERS, adapter),
    "segment ensemble": Kind(SegmentEnsembleTrainer, SegmentEnsembleConfig, segment_rows, MEMBERS, adapter),
}
TOKEN = ("orm", "prm", "segment")
SINGLE = ("reward", *TOKEN)
ENSEMBLES = tuple(name for name in TABLE if name.endswith("ensemble"))


def rows_of(kind: str, n: int, **kwargs: Any) -> list[dict[str, Any]]:
    """`n` rows for a trainer of the table."""
    return TABLE[kind].rows(n, **kwargs)


def tiny_trainer(
    kind: str,
    model: Any,
    folder: Path,
    rows: Any = None,
    eval_rows: Any = None,
    trainer_kwargs: dict[str, Any] | None = None,
    **arguments: Any,
) -> Trainer:
    """A quiet fp32 CPU run of four steps; `arguments` override the configuration."""
    entry = TABLE[kind]
    rows = entry.rows(24) if rows is None else rows
    data = [Dataset.from_list(given) if isinstance(given, list) else given for given in (rows, eval_rows)]
    trainer = entry.trainer(
        model=str(model) if isinstance(model, Path) else model,
        args=config(folder, entry.config, **(entry.arguments | arguments)),
        train_dataset=data[0],
        eval_dataset=data[1],
        **(entry.trainer_kwargs() | (trainer_kwargs or {})),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def logits_of(trainer: Trainer | nn.Module, row: dict[str, Any]) -> torch.Tensor:
    """Outputs for every token of a prepared row, alone and unpadded, (T, outputs): by plain transformers."""
    model = trainer.model if isinstance(trainer, Trainer) else trainer
    ids = torch.tensor([row["span_input_ids"]])
    captured = []
    base = model.get_base_model() if "PeftModel" in type(model).__name__ else model
    head = dict(base.named_children()).get("score") or dict(base.named_children())["classifier"]
    handle = head.register_forward_hook(lambda module, args, output: captured.append(output))
    model.eval()
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    handle.remove()
    return captured[0][0].float()
