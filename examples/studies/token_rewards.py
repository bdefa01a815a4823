"""Compare outcome, process and segment reward models with simple baselines on real annotations.

    python examples/studies/token_rewards.py orm         # or prm, segment; tables: docs/results/real_data.md
    python examples/studies/token_rewards.py prm --model PATH --folds 1 --steps 20 --learning_rate 1e-4
    python examples/studies/token_rewards.py prm --smoke   # a few rows and steps

A small model trains all weights and is tested on unseen questions. The baselines on the same folds are the length of
the judged text, a logistic regression on its n-grams, and its position (the number of a step, the first character of a
segment). Text that exceeds the model's positions is cut. A step or segment that has no score for this reason is left
out for all methods.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.metrics import f1_score, roc_auc_score
from tools import Results, by_ngrams, by_number, data_folder, folds, read, settings, train_quietly

from trl_ext import (
    ORMConfig,
    ORMTrainer,
    PRMConfig,
    PRMTrainer,
    RewardScorer,
    SegmentRewardConfig,
    SegmentRewardTrainer,
)
from trl_ext.metrics.question import QuestionStream


FILES = {"orm": "orm_gsm8k", "prm": "steps_bigbench_mistake", "segment": "segment_finegrained"}
TASKS = ["word_sorting", "tracking_shuffled_objects", "logical_deduction", "multistep_arithmetic", "dyck_languages"]
MAX_LENGTH = {"orm": 768, "prm": 1024, "segment": 640}  # tokens of stories260K, with about 1.7 characters each
STEP_PROMPT = 400  # last characters of the prompt, which leaves room for the steps

Fold = tuple[list[dict], list[dict]]


def train(args: argparse.Namespace, trainer_class: type, config_class: type, rows: list[dict], **options: Any):
    """Train a model on the rows and return its scorer."""
    with tempfile.TemporaryDirectory() as folder:
        shared = settings(args, folder, MAX_LENGTH[args.what])
        config = config_class(per_device_train_batch_size=args.batch_size, **shared, **options)
        trainer = trainer_class(model=args.model, args=config, train_dataset=Dataset.from_list(rows))
        train_quietly(trainer)
    return RewardScorer(trainer.model, trainer.processing_class, max_length=config.max_length)


# ------------------------------------------------------------------------------------------------------------ outcomes
def orm(args: argparse.Namespace, root: Path) -> None:
    """Outcome models. The four solutions of a question, from GSM8K's *test* questions, stay in one fold."""
    rows = read(root / "model_solutions.jsonl")
    results = Results("orm_gsm8k")
    for training, test in parts(args, rows, [row["id"] for row in rows]):
        columns = [{name: row[name] for name in ("prompt", "completion", "label")} for row in training]
        scorer = train(args, ORMTrainer, ORMConfig, columns)
        texts, labels = [row["completion"] for row in training], [row["label"] for row in training]
        answers = [row["completion"] for row in test]
        scores = {
            "length": by_number(list(map(len, texts)), labels, list(map(len, answers))),
            "n-grams": by_ngrams(texts, labels, answers),
            "ORM": scorer([row["prompt"] for row in test], answers),
        }
        for method, own in scores.items():
            results.add(method, **outcome_metrics(test, own))
    results.print()


def outcome_metrics(rows: list[dict], scores: Sequence[float]) -> dict[str, float]:
    """Metrics over all solutions and within questions."""
    labels = torch.tensor([float(row["label"]) for row in rows])
    questions = torch.tensor([int(row["id"].rsplit("-", 1)[1]) for row in rows])
    stream = QuestionStream()
    stream.add(torch.tensor(scores), labels, questions)
    within = stream.summary()
    names = {"right_wrong_accuracy": "within a question", "best_of_n": "best of 4", "mean_of_n": "random of 4"}
    names["oracle_of_n"] = "oracle of 4"
    return {"pooled AUC": roc_auc_score(labels, scores), **{names[name]: within[name] for name in names}}


# --------------------------------------------------------------------------------------------------------------- steps
def prm(args: argparse.Namespace, root: Path) -> None:
    """One process model for the five tasks, with and without the unannotated labels after the first mistake."""
    rows = [
        {**row, "task": task, "prompt": row["prompt"][-STEP_PROMPT:].strip() + "\n"}
        for task in TASKS
        for row in read(root / f"{task}.jsonl")[: args.rows_per_task]
    ]
    first, everything = Results("AUC, steps up to the first mistake"), Results("AUC, all steps: do not report")
    options = {"max_completion_length": settings(args, ".", MAX_LENGTH["prm"])["max_length"] * 3 // 4}
    for training, test in parts(args, rows, [row["task"] + row["prompt"] for row in rows]):
        columns = [{name: row[name] for name in ("prompt", "completions", "labels")} for row in training]
        scores = {"step number": steps_of(test, range), "length": step_baseline(training, test, len, by_number)}
        scores["n-grams"] = step_baseline(training, test, str, by_ngrams)
        for masked in (True, False) if args.unmasked else (True,):
            scorer = train(args, PRMTrainer, PRMConfig, columns, mask_after_first_error=masked, **options)
            name = "PRM, masked after the first mistake" if masked else "PRM, labels after it taken as they are"
            scores[name] = scorer.score_steps([row["prompt"] for row in test], [row["completions"] for row in test])
        seen = scores["PRM, masked after the first mistake"]
        for method, own in scores.items():
            first.add(method, **step_aucs(test, own, seen, to_first=True))
            everything.add(method, **step_aucs(test, own, seen, to_first=False))
    first.print()
    everything.print()


def until_first(row: dict) -> int:
    """The number of steps up to and including the first mistake."""
    return len(row["labels"]) if row["mistake_index"] is None else row["mistake_index"] + 1


def steps_of(rows: list[dict], score: Callable) -> list[list[float]]:
    """A baseline that scores later steps lower."""
    return [[-float(number) for number in score(len(row["labels"]))] for row in rows]


def step_baseline(training: list[dict], test: list[dict], view: Callable, fit: Callable) -> list[list[float]]:
    """A regression on `view(step)`, fitted for each task to the steps up to the first mistake."""
    scores = {}
    for task in {row["task"] for row in test}:
        known = [
            (view(step), label)
            for row in training
            if row["task"] == task
            for step, label in list(zip(row["completions"], row["labels"], strict=True))[: until_first(row)]
        ]
        asked = [
            (number, step) for number, row in enumerate(test) if row["task"] == task for step in row["completions"]
        ]
        values = fit(*map(list, zip(*known, strict=True)), [view(step) for _, step in asked])
        for (number, _), value in zip(asked, values, strict=True):
            scores.setdefault(number, []).append(value)
    return [scores[number] for number in range(len(test))]


def step_aucs(rows: list[dict], scores: list, seen: list, to_first: bool) -> dict[str, float]:
    """AUC of each task over the steps that have a model score, and the mean over the tasks."""
    aucs = {}
    for task in TASKS:
        points = [
            point
            for row, own, of_model in zip(rows, scores, seen, strict=True)
            if row["task"] == task
            for point in list(zip(row["labels"], own, of_model, strict=True))[: until_first(row) if to_first else None]
        ]
        labels, values = zip(
            *((label, value) for label, value, of_model in points if of_model is not None), strict=True
        )
        aucs[task.split("_")[0]] = roc_auc_score(labels, values)
    return {**aucs, "mean": float(np.mean(list(aucs.values())))}


# ------------------------------------------------------------------------------------------------------------ segments
def segment(args: argparse.Namespace, root: Path) -> None:
    """One head for relevance of sub-sentences and factuality of sentences. The passages do not fit: question only."""
    questions = {row["id"]: row["question"] for row in read(root / "dev_feedback.jsonl")}
    level = {"relevance": "subsentence", "factuality": "sentence"}
    rows: dict[str, dict] = {}
    for row in read(root / "segments_derived.jsonl"):
        new = {"prompt": questions[row["id"]] + "\n", "completion": row["completion"], "segments": []}
        kept = rows.setdefault(row["id"], new)["segments"]
        for name in level:
            if level[name] == row["level"]:
                kept += [
                    {"start": s["start"], "end": s["end"], "label": s[name], "category": name}
                    for s in row["segments"]
                    if s[name] is not None
                ]
    results = {name: Results(f"{name} of a {level[name]}") for name in level}
    for training, test in parts(args, list(rows.values()), list(rows)):
        scorer = train(args, SegmentRewardTrainer, SegmentRewardConfig, training, loss_type="bce")
        spans = [[(s["start"], s["end"]) for s in row["segments"]] for row in test]
        values = scorer.score_segments([row["prompt"] for row in test], [row["completion"] for row in test], spans)
        for name in level:
            known = segments_of(training, name)
            asked = [
                (*point, value[name])
                for point, value in zip(segments_of(test), sum(values, []), strict=True)
                if value and point[0] == name
            ]
            _, starts, texts, labels = zip(*known, strict=True)
            _, new_starts, new_texts, truth, by_trained = zip(*asked, strict=True)
            scores = {
                "length": by_number(list(map(len, texts)), labels, list(map(len, new_texts))),
                "position": by_number(starts, labels, new_starts),
                "n-grams": by_ngrams(texts, labels, new_texts),
                "segment model": by_trained,
            }
            for method, own in scores.items():
                results[name].add(method, **segment_metrics(own, truth, wrong_rate=1 - np.mean(labels)))
    for table in results.values():
        table.print()


def segments_of(rows: list[dict], category: str | None = None) -> list[tuple[str, int, str, int]]:
    """Category, start, text and label of each segment of one category, or of all."""
    return [
        (s["category"], s["start"], row["completion"][s["start"] : s["end"]], int(s["label"]))
        for row in rows
        for s in row["segments"]
        if category in (None, s["category"])
    ]


def segment_metrics(scores: Sequence[float], labels: Sequence[int], wrong_rate: float) -> dict[str, float]:
    """AUC, and F1 of the errors when the share of segments called wrong is the wrong share in training."""
    called = np.array(scores) <= np.quantile(scores, wrong_rate)
    return {"AUC": roc_auc_score(labels, scores), "F1 of errors": f1_score(1 - np.array(labels), called)}


# ------------------------------------------------------------------------------------------------------------- program
def parts(args: argparse.Namespace, rows: list[dict], groups: list[str]) -> list[Fold]:
    """Training and test rows of each fold."""
    taken = []
    for train_rows, test_rows in folds(groups, 1 if args.smoke else args.folds):
        order = np.random.default_rng(0).permutation(
            train_rows
        )  # shuffle, because the steps may see only a part of the rows
        if args.smoke:
            order, test_rows = order[:200], test_rows[:60]
        taken.append(([rows[i] for i in order], [rows[i] for i in test_rows]))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=FILES)
    parser.add_argument("--model", help="a model's folder; default: stories260K of the data")
    parser.add_argument("--folds", type=int, default=5, help="folds to run, of five")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument(
        "--rows_per_task", type=int, default=300, help="prm: most rows of a task (Dyck languages has more)"
    )
    parser.add_argument("--no_unmasked", dest="unmasked", action="store_false", help="prm: leave out the second model")
    parser.add_argument("--smoke", action="store_true", help="one fold, two training steps, and fewer rows for prm")
    args = parser.parse_args()
    if args.smoke:
        args.batch_size, args.rows_per_task = 4, 20
    root = data_folder([FILES[args.what]] + ([] if args.model else ["stories260K"]))
    args.model = args.model or str(root / "stories260K")
    {"orm": orm, "prm": prm, "segment": segment}[args.what](args, root / FILES[args.what])


if __name__ == "__main__":
    main()
