"""Compare ensembles of reward models with their members on real data; also branched and aspect ensembles.

    python examples/studies/ensembles.py --data topical_chat     # minutes on a CPU; table: docs/results/real_data.md
    python examples/studies/ensembles.py --data hh_harmless --folds 1
    python examples/studies/ensembles.py --smoke                 # a few rows and steps

Four members (LoRA on stories260K with different seeds and the same rows) train in one run on four fifths of the
training prompts. The last fifth calibrates their scales and fits the fusion. `accuracy` is the share of a prompt's
decided pairs that are in order. It is the mean over the unseen prompts of all folds, with a 95 % bootstrap interval
over conversations (prompts of one conversation are drawn together). `gain` is the accuracy minus that of a single
member (the mean of the four), paired by prompt. The study repeats this for members branched at each of `--branch_at`,
with adapters only above the branch. For topical_chat there is one more ensemble: it has a member for each of five
aspects that people rated, and predicts the overall rating.
"""

import argparse
import math
import statistics
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from rankings import FILES, pairs, ranked
from tools import data_folder, folds, read, settings, train_quietly

from trl_ext import RewardConfig, RewardEnsemble, RewardEnsembleConfig, RewardEnsembleTrainer, RewardTrainer
from trl_ext.metrics.disagreement import error_auc, error_by_disagreement, pair_disagreement, relative_disagreement
from trl_ext.metrics.ranking import pair_accuracy
from trl_ext.metrics.voting import bootstrap_interval


FILES = {**FILES, "hh_harmless": "pairs_hh_harmless/split_test.jsonl"}
COMPLETION = 250  # first characters of a completion
ASPECTS = ("understandability", "naturalness", "coherence", "engagingness", "groundedness")
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
OF_SEEDS = {
    "mean": dict(reduce="mean"),
    "median": dict(reduce="median"),
    "min (worst case)": dict(reduce="min"),
    "mean - 0.5 std": dict(reduce="mean_minus_std", coefficient=0.5),
    "mean - 0.5 var (UWO)": dict(reduce="mean_minus_var", coefficient=0.5),
    "fusion, logistic": dict(method="logistic"),
    "fusion, BMA": dict(method="bma"),
}
OF_ASPECTS = {
    "all aspects, equal weights": dict(reduce="weighted", weights=[1 / len(ASPECTS)] * len(ASPECTS)),
    "all aspects, min": dict(reduce="min"),
    "fusion of aspects": dict(method="logistic"),
}
Values = dict[str, list[float]]


def data(rows: list[dict], ratings: str = "ratings") -> Dataset:
    return Dataset.from_list(
        [{"prompt": r["prompt"], "completions": r["completions"], "ratings": r[ratings]} for r in rows]
    )


def group(row: dict) -> dict:
    """Turn a row of any of the files into a ranked group."""
    if "chosen" in row:
        texts = [row[name][-1]["content"] for name in ("chosen", "rejected")]
        first = row["prompt"][0]["content"]  # dialogues with the same first turn stay in one fold
        row = {"tree": first, "prompt": row["prompt"], "completions": texts, "ranks": [0, 1]}
    found = ranked(row) | aspect_ratings(row)
    return found | {"completions": [text[:COMPLETION] for text in found["completions"]]}


def aspect_ratings(row: dict) -> dict[str, list[float]]:
    """Ratings of the completions for each aspect, if the row has them."""
    found = row.get("aspect_scores", [])
    return {aspect: [float(own[aspect]) for own in found] for aspect in ASPECTS if found}


def config(args: argparse.Namespace, folder: str, rows: list[dict], completions: int) -> dict[str, Any]:
    k = sum(len(row["completions"]) for row in rows) / len(rows)
    return {
        "loss_type": "plackett_luce",
        "per_device_train_batch_size": max(1, round(completions / k)),
        **settings(args, folder, args.max_length),
        "save_only_model": True,
    }


def scored(ensemble: RewardEnsemble, rows: list[dict]) -> list[list[list[float]]]:
    """Scores indexed by prompt, completion and member."""
    texts = [(row["prompt"], text) for row in rows for text in row["completions"]]
    found = iter(ensemble.score_members(*zip(*texts, strict=True)))
    return [[next(found) for _ in row["completions"]] for row in rows]


def accuracies(rows: list[dict], scores: list[list[float]]) -> list[float]:
    """For each prompt, the share of its decided pairs that are in order."""
    return [
        pair_accuracy(torch.tensor([own]), torch.tensor([row["ratings"]]), torch.ones(1, len(own)).bool()).item()
        for row, own in zip(rows, scores, strict=True)
    ]


def compare(ensemble: RewardEnsemble, calibration: list[dict], test: list[dict], reducers: dict[str, dict]) -> Values:
    """Accuracy of each member and of each reducer on each test prompt."""
    flat = [(row["prompt"], text) for row in calibration for text in row["completions"]]
    ensemble.fit_normalizer([prompt for prompt, _ in flat], [text for _, text in flat])
    members = scored(ensemble, test)
    values = {
        name: accuracies(test, [[own[m] for own in row] for row in members]) for m, name in enumerate(ensemble.members)
    }
    for name, arguments in reducers.items():
        if name.startswith("fusion"):
            ensemble.fit_fusion(*(list(column) for column in zip(*pairs(calibration), strict=True)), **arguments)
        else:
            ensemble.set_reducer(**arguments)
        values[name] = accuracies(test, [ensemble.combine(row) for row in members])
    return values


def members_and_reducers(
    args: argparse.Namespace,
    completions: int,
    train: list[dict],
    calibration: list[dict],
    test: list[dict],
    reducers: dict[str, dict],
    branch_at: float | None = None,
) -> tuple[Values, RewardEnsemble]:
    """Train members with different seeds; return the accuracy of a single one (their mean) and of each reducer."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardEnsembleTrainer(
            model=args.model,
            args=RewardEnsembleConfig(
                num_members=args.members, branch_at=branch_at, **config(args, folder, train, completions)
            ),
            train_dataset=data(train),
            peft_config=LORA,
        )
        train_quietly(trainer)
        trainer.save_model()
        ensemble = RewardEnsemble(folder, scorer_kwargs={"max_length": trainer.args.max_length})
        values = compare(ensemble, calibration, test, reducers)
    single = [values.pop(name) for name in ensemble.members]
    return {"single member": [statistics.fmean(own) for own in zip(*single, strict=True)], **values}, ensemble


def of_seeds(
    args: argparse.Namespace, completions: int, train: list[dict], calibration: list[dict], test: list[dict]
) -> tuple[Values, list[torch.Tensor]]:
    """Accuracies of full-depth and branched members, and full-depth score differences on decided test pairs."""
    rows = completions, train, calibration, test
    values, ensemble = members_and_reducers(args, *rows, OF_SEEDS)
    for share in args.branch_at:
        branched, _ = members_and_reducers(args, *rows, {"mean": OF_SEEDS["mean"]}, share)
        values |= {f"branched at {share}: {name}": own for name, own in branched.items()}
    differences = []
    for row, own in zip(test, scored(ensemble, test), strict=True):
        for a, better in enumerate(row["ratings"]):
            for b, worse in enumerate(row["ratings"]):
                if better > worse:
                    differences.append(torch.tensor(own[a]) - torch.tensor(own[b]))
    return values, differences


def of_aspects(
    args: argparse.Namespace, completions: int, train: list[dict], calibration: list[dict], test: list[dict]
) -> Values:
    """An ensemble of one member per aspect, and a single model of the overall rating, both tested on the latter."""
    with tempfile.TemporaryDirectory() as folder:
        for aspect in ("ratings", *ASPECTS):
            rows = [row for row in train if len(set(row[aspect])) > 1]
            trainer = RewardTrainer(
                model=args.model,
                args=RewardConfig(**config(args, f"{folder}/{aspect}", rows, completions)),
                train_dataset=data(rows, aspect),
                peft_config=LORA,
            )
            train_quietly(trainer)
            trainer.save_model()
        limit = {"max_length": trainer.args.max_length}
        overall = RewardEnsemble([f"{folder}/ratings"], scorer_kwargs=limit)
        ensemble = RewardEnsemble([f"{folder}/{aspect}" for aspect in ASPECTS], scorer_kwargs=limit)
    alone = accuracies(test, [overall.combine(row) for row in scored(overall, test)])
    found = compare(ensemble, calibration, test, OF_ASPECTS)
    return {"one model of the overall rating": alone, **found}


def show(title: str, values: Values, reference: str, groups: list[str]) -> None:
    """Print accuracy and gain over `reference` with intervals; `groups` holds the conversation of each prompt."""
    print(f"| {title} ({len(values[reference])} prompts) | accuracy | gain |\n|---|---|---|")
    for name, own in values.items():
        low, high = bootstrap_interval(own, groups=groups)
        cell = f"{statistics.fmean(own):.3f} [{low:.3f}, {high:.3f}]"
        gain = ""
        if name != reference:
            differences = [value - base for value, base in zip(own, values[reference], strict=True)]
            low, high = bootstrap_interval(differences, groups=groups)
            gain = f"{statistics.fmean(differences):+.3f} [{low:+.3f}, {high:+.3f}]"
        print(f"| {name} | {cell} | {gain} |")
    print(flush=True)


def extend(all_values: Values, values: Values) -> None:
    for name, own in values.items():
        all_values.setdefault(name, []).extend(own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="a model's folder; default: stories260K of the data")
    parser.add_argument("--data", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--folds", type=int, default=5, help="number of the five folds to run")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--branch_at", type=float, nargs="*", default=[0.6], help="share of layers below it")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--completions", type=int, default=16, help="completions of a member in a step")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=120, help="most prompts of a fold to test, and to calibrate")
    parser.add_argument("--smoke", action="store_true", help="a few rows, one fold, two steps")
    args = parser.parse_args()
    root = data_folder([FILES[name] for name in args.data] + ([] if args.model else ["stories260K"]))
    args.model = args.model or str(root / "stories260K")
    for name in args.data:
        rows = [group(row) for row in read(root / FILES[name]) if row.get("clean", True)]
        rows = [row for row in rows if len(set(row["ratings"])) > 1]
        seeds: Values = {}
        aspects: Values = {}
        differences: list[torch.Tensor] = []
        groups: list[str] = []
        for train, test in folds([row["group"] for row in rows], 1 if args.smoke else args.folds):
            train, test = [rows[i] for i in train], [rows[i] for i in test[: args.prompts]]
            if args.smoke:
                train, test = train[:15], test[:6]
            fit, calibration = next(folds([row["group"] for row in train], 1, seed=1))
            split = [train[i] for i in fit], [train[i] for i in calibration[: args.prompts]]
            values, found = of_seeds(args, args.completions, *split, test)
            extend(seeds, values)
            groups += [row["group"] for row in test]
            differences += found
            if name == "topical_chat":
                extend(aspects, of_aspects(args, args.completions, *split, test))
        show(name, seeds, "single member", groups)
        table = torch.stack(differences)
        margins, spread = table.mean(dim=1), pair_disagreement(table)
        bins = error_by_disagreement(margins, spread, min(10, len(margins)))
        aucs = error_auc(margins, spread), error_auc(margins, relative_disagreement(table))
        print(f"{name}: error rate of the mean by decile of disagreement ({len(margins)} pairs):")
        print(*(f"{one['error']:.2f}" for one in bins))
        print(
            "AUC {:.3f}; of disagreement over the mean difference {:.3f}\n".format(*(a or math.nan for a in aucs)),
            flush=True,
        )
        if aspects:
            show(f"{name}, aspects", aspects, "one model of the overall rating", groups)


if __name__ == "__main__":
    main()
