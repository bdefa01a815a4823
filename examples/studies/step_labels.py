"""Compare ways to label steps by rollouts: generated tokens against the quality of labels and of the process model.

    python examples/studies/step_labels.py --seeds 3 --output_dir outputs/study_step_labels    # run it again to go on
    python examples/studies/step_labels.py --smoke                                             # four arms, a few steps

The task is that of `trl-ext demo`: sort digits, one line a step, with a verifier that is never wrong. The lists have
three or four digits. The tiny policy learnt from lists of five to eight, and about a fifth of its samples is right.
It writes four solutions of each training prompt, and every arm labels their steps by rollouts of the same policy. A
process model learns from the labels of each arm, with the same number of optimizer steps, from one base: a language
model of the same size that sorts well. The seeds differ in prompts, solutions, rollouts and training.
Held-out solutions with exact labels measure it:

- AUC: right steps against the first wrong step of each solution (an empty last step stands for the end).
- first error: share of solutions in which the first step below a threshold is the first wrong one, or there is none.
  The threshold is the best one on the trial problems.
- best of 8: share of problems in which the candidate with the highest minimum over its steps is right.

The share of the gain is (arm - chance) / (reference - chance), where the reference is the better of full Monte Carlo
with soft and with hard labels. Chance is 0.5 for the AUC, the best constant answer for the first error, and the mean
candidate for best of 8. Results of finished arms are kept in `<output_dir>/seed-<n>/<arm>.json`.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from quiet import QUIET
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from trl_ext import PRMConfig, PRMTrainer, RewardScorer
from trl_ext.demo.policy import sample_solutions, train_policy
from trl_ext.demo.task import Problem, make_problems, verify
from trl_ext.pipelines.feedback.step_labels import label_steps_with_report


LENGTHS = (3, 4)  # digits to sort
# How each arm labels, the most important first. `share`: the share of the prompts that it uses. `derived`: hard labels
# from the rollouts of the arm with soft ones.
ARMS: dict[str, dict[str, Any]] = {
    "exact labels": {},
    "adaptive, 4, denoised": {"method": "adaptive", "num_rollouts": 4, "denoise": True},
    "full, 8 rollouts, hard": {"reuse": False, "derived": "hard"},
    "full, 8 rollouts, soft": {"reuse": False},
    "verdict of the solution for every step": {"num_rollouts": 1},
    "full, 8 rollouts, hard, a tenth of the prompts": {"reuse": False, "derived": "hard", "share": 0.1},
    "full, 1 rollout, soft": {"reuse": False, "num_rollouts": 1},
    "full, 8, hard, shared": {"labels": "hard"},
    "full, 8, denoised, shared": {"denoise": True},
    "binary, 8": {"method": "binary"},
    "adaptive, 8": {"method": "adaptive"},
    "adaptive, 4": {"method": "adaptive", "num_rollouts": 4},
}
REFERENCES = ("full, 8 rollouts, hard", "full, 8 rollouts, soft")
QUALITIES = ("auc", "first_error", "best_of_8")


def problem_of(prompt: str) -> Problem:
    return Problem(tuple(map(int, prompt.removesuffix(":\n"))))


def exact(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The verifier: 1 for a right answer, else 0."""
    return [float(verify(problem_of(p), c).answer_right) for p, c in zip(prompts, completions, strict=True)]


def truth(prompt: str, steps: Sequence[str]) -> list[float]:
    """Exact labels: whether all lines so far are right; of the empty last step, whether it was right to end there."""
    needed = [step.rstrip("\n") for step in problem_of(prompt).steps]
    lines = list(steps[:-1])
    return [*(float(lines[: end + 1] == needed[: end + 1]) for end in range(len(lines))), float(lines == needed)]


def label(folder: Path, policy: Path, arm: str, seed: int, args: argparse.Namespace) -> tuple[list[dict], dict]:
    """The rows of an arm, and its report. Arms with the same settings share what is stored."""
    options = dict(ARMS[arm])
    derived, share = options.pop("derived", None), options.pop("share", 1.0)
    prompts = [{"prompt": problem.prompt} for problem in make_problems(args.prompts, "train", seed, lengths=LENGTHS)]
    tokenizer = AutoTokenizer.from_pretrained(policy)
    if arm == "exact labels":
        options = {"num_rollouts": 1}  # the solutions themselves are enough
    found = label_steps_with_report(
        str(policy),
        prompts[: round(share * args.prompts)],
        exact,
        folder / "labels",
        **options,
        label_end=True,
        seed=seed,
        temperature=0.8,
        max_completion_length=14,
        generation_batch_size=512,
        chunk_size=100,
        generation_kwargs={
            "min_new_tokens": 1,
            "suppress_tokens": [tokenizer.pad_token_id, tokenizer.bos_token_id],
        },
    )
    rows = found.dataset.to_list()
    for row in rows:
        if arm == "exact labels":
            row["labels"] = truth(row["prompt"], row["completions"])
        elif derived == "hard":
            row["labels"] = [float(value > 0) for value in row["labels"]]
    return rows, found.report


def held_out(policy: Path, split: str, count: int, samples: int, seed: int) -> list[list[tuple[str, list[str]]]]:
    """Prompt and steps of each sample, problem by problem."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy).eval(), AutoTokenizer.from_pretrained(policy)
    problems = make_problems(count, split, seed, lengths=LENGTHS)
    texts = sample_solutions(model, tokenizer, problems, samples, seed=seed)
    return [[(p.prompt, [*t.splitlines(), ""]) for t in own] for p, own in zip(problems, texts, strict=True)]


def first_wrong(values: Sequence[float], threshold: float) -> int:
    return next((place for place, value in enumerate(values) if value < threshold), len(values))


def qualities(scorer: RewardScorer, held: list, trial: list) -> dict[str, float]:
    """How good a process model is; see the head of this file."""

    def score(groups: list) -> list[tuple[list[float], list[float]]]:
        flat = [pair for own in groups for pair in own]
        scores = scorer.score_steps([prompt for prompt, _ in flat], [steps for _, steps in flat])
        return [(own, truth(*pair)) for own, pair in zip(scores, flat, strict=True)]

    found, tuning = score(held), score(trial)
    best = max(
        np.quantile([value for own, _ in tuning for value in own], np.linspace(0, 1, 101)),
        key=lambda t: sum(first_wrong(own, t) == first_wrong(right, 0.5) for own, right in tuning),
    )
    upto = [(own[: first_wrong(right, 0.5) + 1], right[: first_wrong(right, 0.5) + 1]) for own, right in found]
    places = [first_wrong(right, 0.5) - len(right) for _, right in found]  # 0: no error
    groups = [found[at : at + 8] for at in range(0, len(found), 8)]
    right = [[float(min(labels) > 0.5) for _, labels in own] for own in groups]
    picks = [max(range(len(own)), key=lambda at, own=own: min(own[at][0])) for own in groups]
    return {
        "auc": roc_auc_score([y for _, labels in upto for y in labels], [x for own, _ in upto for x in own]),
        "first_error": statistics.fmean(first_wrong(own, best) == first_wrong(labels, 0.5) for own, labels in found),
        "best_of_8": statistics.fmean(own[pick] for own, pick in zip(right, picks, strict=True)),
        "chance_auc": 0.5,
        "chance_first_error": max(places.count(place) for place in set(places)) / len(places),
        "chance_best_of_8": statistics.fmean(value for own in right for value in own),
    }


def label_metrics(rows: list[dict], report: dict) -> dict[str, Any]:
    """What the labels of an arm cost, and how many are right."""
    pairs = [
        (value, right)
        for row in rows
        for value, right in zip(row["labels"], truth(row["prompt"], row["completions"]), strict=True)
        if value is not None
    ]
    costs = ("solutions", "labelled", "rollouts", "rollout_tokens", "solution_tokens", "tokens")
    accuracy = statistics.fmean((value > 0) == (right > 0) for value, right in pairs)
    return {**{name: report[name] for name in costs}, "label_accuracy": accuracy}


def train_and_measure(
    rows: list[dict], root: Path, seed: int, args: argparse.Namespace, held: list, trial: list
) -> dict:
    """Train a process model on the labels of an arm, and measure it."""
    config = PRMConfig(
        str(root / "prm"),
        max_steps=args.steps,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        warmup_steps=min(20, args.steps // 2),
        lr_scheduler_type="cosine",
        seed=seed,
        logging_strategy="no",
        **QUIET,
    )
    trainer = PRMTrainer(str(root / "base"), config, train_dataset=Dataset.from_list(rows))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    scorer = RewardScorer(trainer.model, processing_class=trainer.processing_class, device="cpu", batch_size=256)
    return qualities(scorer, held, trial)


def prepare(root: Path, args: argparse.Namespace) -> dict[int, tuple[list, list]]:
    """Train the base and the policy if they are missing. Returns held-out and trial solutions of each seed."""
    if not (root / "base" / "config.json").is_file():
        lists = [
            make_problems(n, split, 100, lengths=(5, 6))
            for n, split in ((args.policy_prompts, "policy"), (100, "trial"))
        ]
        well = dict(target_accuracy=0.9, try_every=50, batch_size=32, learning_rate=1e-3)
        train_policy(*lists, root / "base", seed=100, max_steps=args.policy_steps, **well)
    if not (root / "policy" / "config.json").is_file():
        lists = [make_problems(n, split, 2) for n, split in ((args.policy_prompts, "policy"), (200, "trial"))]
        train_policy(*lists, root / "policy", seed=2, max_steps=args.policy_steps)
    return {
        seed: (
            held_out(root / "policy", "held_out", args.eval_prompts, 8, seed),
            held_out(root / "policy", "trial", args.eval_prompts // 2, 4, seed),
        )
        for seed in range(args.seeds)
    }


def run_arms(root: Path, args: argparse.Namespace) -> list[dict[str, dict]]:
    """The results of every arm of each seed; finished arms are read from disk."""
    solutions = prepare(root, args)
    results: list[dict[str, dict]] = [{} for _ in solutions]
    # a policy of a few steps is never right, so that denoising would leave out every prompt
    for place, arm in enumerate(arm for arm in ARMS if not (args.smoke and ARMS[arm].get("denoise"))):
        trained = args.trained is None or place < args.trained
        for seed, (held, trial) in solutions.items():
            folder = root / f"seed-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{arm.replace(' ', '_').replace(',', '')}.json"
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if not found or (trained and "auc" not in found):
                rows, report = label(folder, root / "policy", arm, seed, args)
                found = label_metrics(rows, report)
                if trained:
                    found |= train_and_measure(rows, root, seed, args, held, trial)
                file.write_text(json.dumps(found) + "\n", encoding="utf-8")
                print(f"seed {seed}, {arm}: {found}", file=sys.stderr, flush=True)
            results[seed][arm] = found
    return results


def shown(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard error over the seeds."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{error}"


def share_of_gain(gains: Sequence[float], references: Sequence[float]) -> str:
    """The sum of gains over that of the reference, with a standard error by the jackknife over the seeds."""
    if sum(references) / len(references) < 0.02:
        return "undefined"  # the reference is no better than chance
    share, number = sum(gains) / sum(references), len(gains)
    if number == 1:
        return f"{share:.0%}"
    without = [(sum(gains) - one) / (sum(references) - other) for one, other in zip(gains, references, strict=True)]
    centre = statistics.fmean(without)
    error = math.sqrt((number - 1) / number * sum((value - centre) ** 2 for value in without))
    return f"{share:.0%} ± {error:.0%}"


def table(results: list[dict[str, dict]]) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of the comparison."""
    columns = ["labels", "tokens of rollouts", "with solutions", "solutions kept", "label > 0 is right"]
    columns += ["AUC", "first error", "best of 8", "share of the gain (AUC; first error; best of 8)"]
    references = [arm for arm in REFERENCES if "auc" in results[0][arm]]
    reference = {
        name: max(references, key=lambda arm, name=name: statistics.fmean(found[arm][name] for found in results))
        for name in QUALITIES
    }
    rows = []
    for arm in results[0]:
        own, full = [found[arm] for found in results], [found[REFERENCES[0]] for found in results]
        tokens = [
            sum(one[name] for one in own) / sum(one[name] for one in full) for name in ("rollout_tokens", "tokens")
        ]
        cells = ["none", "none"] if arm == "exact labels" else [f"{share:.1%}" for share in tokens]
        cells += [f"{sum(one['labelled'] for one in own) / sum(one['solutions'] for one in own):.0%}"]
        cells += [shown([one["label_accuracy"] for one in own])]
        if "auc" not in own[0]:
            rows.append([arm, *cells, "", "", "", ""])
            continue
        gains = [
            share_of_gain(
                [one[name] - one[f"chance_{name}"] for one in own],
                [found[reference[name]][name] - found[reference[name]][f"chance_{name}"] for found in results],
            )
            for name in QUALITIES
        ]
        rows.append([arm, *cells, *(shown([one[name] for one in own]) for name in QUALITIES), "; ".join(gains)])
    chance = [shown([found["exact labels"][f"chance_{name}"] for found in results]) for name in QUALITIES]
    return columns, [*rows, ["chance", "", "", "", "", *chance, ""]]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=200, help="training prompts, with four solutions each")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each process model")
    parser.add_argument("--eval_prompts", type=int, default=60, help="held-out prompts, with eight samples each")
    parser.add_argument("--trained", type=int, help="train process models of so many arms, from the first (all)")
    parser.add_argument("--output_dir", default="outputs/study_step_labels")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(arguments)
    vars(args).update(policy_prompts=8000, policy_steps=1000)
    if args.smoke:
        vars(args).update(
            policy_prompts=200, policy_steps=30, seeds=1, prompts=40, steps=2, eval_prompts=10, trained=3
        )
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) if args.smoke else Path(args.output_dir)
        results = run_arms(root, args)
    columns, rows = table(results)
    if not args.smoke:
        (root / "table.json").write_text(json.dumps({"columns": columns, "rows": rows}, indent=2), encoding="utf-8")
    for row in [columns, ["---"] * len(columns), *rows]:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
