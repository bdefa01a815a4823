"""What the tests of token-level trainers share: rows of the three kinds, and tiny runs of each trainer."""

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback

from tests.trainers.helpers import config
from trl_ext import ORMConfig, ORMTrainer, PRMConfig, PRMTrainer, SegmentRewardConfig, SegmentRewardTrainer
from trl_ext.trainers.token.trainer import TokenRewardTrainer


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


KINDS: dict[str, tuple[type, type, Any]] = {
    "orm": (ORMTrainer, ORMConfig, outcome_rows),
    "prm": (PRMTrainer, PRMConfig, step_rows),
    "segment": (SegmentRewardTrainer, SegmentRewardConfig, segment_rows),
}


def token_trainer(
    kind: str,
    model: Any,
    folder: Path,
    rows: Any = None,
    eval_rows: Any = None,
    trainer_kwargs: dict[str, Any] | None = None,
    **arguments: Any,
) -> TokenRewardTrainer:
    """A quiet fp32 CPU run of four steps; `arguments` override the configuration."""
    trainer_class, config_class, make_rows = KINDS[kind]
    rows = make_rows(24) if rows is None else rows
    data = [Dataset.from_list(given) if isinstance(given, list) else given for given in (rows, eval_rows)]
    trainer = trainer_class(
        model=str(model) if isinstance(model, Path) else model,
        args=config(folder, config_class, **arguments),
        train_dataset=data[0],
        eval_dataset=data[1],
        **(trainer_kwargs or {}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def logits_of(trainer: TokenRewardTrainer, row: dict[str, Any]) -> torch.Tensor:
    """Outputs for every token of a prepared row, alone and unpadded, (T, outputs): by plain transformers."""
    model = trainer.model
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
