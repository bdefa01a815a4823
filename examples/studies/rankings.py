"""Compare losses on real rankings: Plackett-Luce, pairs within a prompt, and Bradley-Terry on all pairs.

    python examples/studies/rankings.py                    # minutes on a CPU; docs/results/real_data.md has the table
    python examples/studies/rankings.py --model PATH --folds 1
    python examples/studies/rankings.py --smoke            # a few rows and steps

The same small model trains all weights with each loss and the same number of completions in a step. The test prompts
are unseen. The model reads the end of the prompt and the beginning of a completion, as much as fits into 512 tokens of
stories260K. Two baselines use the same folds: the longer (whole) completion wins, and a logistic regression on the
n-grams of the text that the model reads. `accuracy` is the trainer's metric: the share of a prompt's decided pairs
that are in order, averaged over the prompts.
"""

import argparse
import tempfile
from itertools import combinations

import numpy as np
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from tools import Results, data_folder, folds, ngrams, read, settings, train_quietly

from trl_ext import RewardConfig, RewardScorer, RewardTrainer
from trl_ext.metrics.ranking import pair_accuracy


FILES = {"oasst": "rankings_oasst_en100/rankings.jsonl", "topical_chat": "rankings_topical_chat/rankings.jsonl"}
PROMPT, COMPLETION = 200, 600  # last characters of the prompt, first characters of a completion
COMPLETIONS_A_STEP = {"oasst": 24, "topical_chat": 48}  # completions of oasst are longer


def ranked(row: dict) -> dict:
    """Turn a row into a group: the last turn of the prompt, and as ratings people's ratings, or else -rank."""
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    return {
        "prompt": prompt[-PROMPT:].strip() + "\n",
        "completions": [text[:COMPLETION] for text in row["completions"]],
        "ratings": [float(rating) for rating in row.get("scores") or [-rank for rank in row["ranks"]]],
        "lengths": [len(text) for text in row["completions"]],
        # prompts of one conversation stay in one fold; they share its tree or its first line
        "group": row.get("tree", prompt.split("\n")[0]),
    }


def pairs(rows: list[dict]) -> list[tuple[str, str, str]]:
    """Prompt, better and worse completion of each decided pair."""
    found = []
    for row in rows:
        for a, b in combinations(range(len(row["ratings"])), 2):
            if row["ratings"][a] != row["ratings"][b]:
                better, worse = (a, b) if row["ratings"][a] > row["ratings"][b] else (b, a)
                found.append((row["prompt"], row["completions"][better], row["completions"][worse]))
    return found


def accuracy(rows: list[dict], scores: list[list[float]]) -> float:
    """The share of a prompt's pairs that are in order, averaged over the prompts."""
    values = [
        pair_accuracy(torch.tensor([own]), torch.tensor([row["ratings"]]), torch.ones(1, len(own)).bool()).item()
        for row, own in zip(rows, scores, strict=True)
    ]
    return float(np.nanmean(values))


def by_ngrams(train: list[dict], test: list[dict]) -> list[list[float]]:
    """A logistic regression on differences of n-gram vectors: Bradley-Terry with a linear score."""
    vectors = ngrams().fit([text for row in train for text in row["completions"]])
    _, better, worse = zip(*pairs(train), strict=True)
    difference = vectors.transform(better) - vectors.transform(worse)
    sign = np.where(np.arange(difference.shape[0]) % 2, 1, -1)  # the regression needs both classes
    model = LogisticRegression(fit_intercept=False, max_iter=1000).fit(
        difference.multiply(sign[:, None]).tocsr(), sign
    )
    return [(vectors.transform(row["completions"]) @ model.coef_[0]).tolist() for row in test]


def by_model(
    args: argparse.Namespace, loss: str, completions: int, train: list[dict], test: list[dict]
) -> list[list[float]]:
    """Train a model with the loss, and score each completion of the test prompts."""
    k = sum(len(row["completions"]) for row in train) / len(train)
    if loss == "bradley_terry":
        data = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs(train)]
        k = 2
    else:
        data = [{name: row[name] for name in ("prompt", "completions", "ratings")} for row in train]
    with tempfile.TemporaryDirectory() as folder:
        config = RewardConfig(
            loss_type=loss,
            per_device_train_batch_size=round(completions / k),
            **settings(args, folder, args.max_length),
        )
        trainer = RewardTrainer(model=args.model, args=config, train_dataset=Dataset.from_list(data))
        train_quietly(trainer)
    scorer = RewardScorer(trainer.model, trainer.processing_class, max_length=config.max_length)
    flat = scorer(*zip(*((row["prompt"], text) for row in test for text in row["completions"]), strict=True))
    scores = iter(flat)
    return [[next(scores) for _ in row["completions"]] for row in test]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="a model's folder; default: stories260K of the data")
    parser.add_argument("--data", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--folds", type=int, default=5, help="number of the five folds to run")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--smoke", action="store_true", help="a few rows, one fold, two steps")
    args = parser.parse_args()
    root = data_folder([FILES[name] for name in args.data] + ([] if args.model else ["stories260K"]))
    args.model = args.model or str(root / "stories260K")
    for name in args.data:
        rows = [ranked(row) for row in read(root / FILES[name])]
        rows = [row for row in rows if len(set(row["ratings"])) > 1]
        results = Results(name)
        for train, test in folds([row["group"] for row in rows], 1 if args.smoke else args.folds):
            train, test = [rows[i] for i in train], [rows[i] for i in test]
            if args.smoke:
                train, test = train[:12], test[:6]
            results.add("longer wins", accuracy=accuracy(test, [row["lengths"] for row in test]))
            results.add("n-grams", accuracy=accuracy(test, by_ngrams(train, test)))
            for loss in ("plackett_luce", "pairwise", "bradley_terry"):
                label = {"bradley_terry": "bradley_terry, all pairs"}.get(loss, loss)
                results.add(
                    label, accuracy=accuracy(test, by_model(args, loss, COMPLETIONS_A_STEP[name], train, test))
                )
        results.print()


if __name__ == "__main__":
    main()
