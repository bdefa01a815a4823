"""Weak-to-strong training on real preferences, and other uses of small models on `weak_to_strong.py`'s digits.

    python examples/studies/weak_supervision.py pairs --strong PATH  # stories260K labels for a larger model
    python examples/studies/weak_supervision.py cascade                # after weak_to_strong.py has run in this folder
    python examples/studies/weak_supervision.py selection

`pairs` needs data (see docs/results/real_data.md). `cascade` takes the weak judge of `weak_to_strong.py` and defers
the pairs that it is least sure of to the ceiling. `selection` corrupts 30 % of the solutions in a training set, keeps
the share that a model pretrained on other problems finds most likely, and trains on it; the control trains on the same
number of rows drawn at random. Add `--smoke` for a few rows and steps.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from tools import Results, data_folder, read, train_quietly
from transformers import AutoTokenizer

from trl_ext import RewardConfig, WeakToStrongArguments, WeakToStrongConfig, WeakToStrongTrainer, weak_to_strong
from trl_ext.demo.model import tiny_reward_base
from trl_ext.demo.task import make_problems
from trl_ext.pipelines.cascade import cascade
from trl_ext.pipelines.generation.sampling import Sampling
from trl_ext.pipelines.generation.transformers_backend import TransformersGenerator, load_policy
from trl_ext.pipelines.likelihood_selection import select_by_likelihood
from trl_ext.pipelines.weak_to_strong.runs import read_judgements


sys.path.append(str(Path(__file__).resolve().parents[1]))  # the folder of the next one
from weak_to_strong import COMMON, corrupted, pretrained, solution_rows


PAIRS, CHARACTERS = "pairs_hh_harmless/split_test.jsonl", 300
KEEP = (0.25, 0.5, 0.7, 1.0)
WRONG = 0.3


def real_pairs(args: argparse.Namespace) -> None:
    """Run weak-to-strong on well-formed pairs: the last question and the beginning of both answers."""
    folder = data_folder([PAIRS, "stories260K"])
    rows = [
        {
            "prompt": row["prompt"][-1]["content"][-CHARACTERS:].strip() + "\n",
            "chosen": row["chosen"][0]["content"][:CHARACTERS],
            "rejected": row["rejected"][0]["content"][:CHARACTERS],
        }
        for row in read(folder / PAIRS)
        if row["clean"]
    ]
    rows = [row for row in rows if row["chosen"] != row["rejected"]]
    config = WeakToStrongArguments(
        [str(folder / "stories260K")],
        [args.strong],
        student_loss=args.loss,
        seeds=args.seeds,
        weak_training={"learning_rate": 1e-3, "max_steps": 2 if args.smoke else args.weak_steps, "max_length": 384},
        isolate="always",
    )
    training = RewardConfig(
        args.output_dir or tempfile.mkdtemp(),
        max_steps=2 if args.smoke else args.steps,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=16,
        max_length=128,
        min_survival=0.0,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        **{
            name: value
            for name, value in COMMON.items()
            if name not in ("per_device_train_batch_size", "learning_rate", "warmup_steps")
        },
    )
    report = weak_to_strong(config, training, Dataset.from_list(rows[:100] if args.smoke else rows))
    print(report.markdown())
    print("peak GiB of a run:", {name: round(value, 2) for name, value in report.peak_memory_gib.items()})


def cascade_curve(folder: Path) -> None:
    """Print the accuracy of weak model and ceiling together over the share of deferred pairs, as a mean over seeds."""
    table = Results("deferred to the ceiling")
    runs = sorted(folder.glob("weak-0-seed-*"))
    if not runs:
        raise SystemExit(f"{folder} has no runs. Run `python examples/weak_to_strong.py` in this folder first.")
    for run in runs:
        weak = read_judgements(run, "test")
        strong = read_judgements(folder / run.name.replace("weak-0", "ceiling-0"), "test")
        sure = [max(one.output, 1 - one.output) for one in weak]
        curve = cascade(sure, [one.right for one in weak], [one.right for one in strong])
        for share in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0):
            point = min(curve, key=lambda point: abs(point.deferred - share))
            table.add(f"{share:.0%}", accuracy=point.performance)
    table.print()


def selection_curve(smoke: bool) -> None:
    """Print the share of wrong rows among the kept rows, and exact match after training on them."""
    table, scratch = Results("kept"), tempfile.mkdtemp()
    judge = pretrained(f"{scratch}/writer", 5 if smoke else 150, solution_rows(4000, "policy"))
    held_out = solution_rows(40 if smoke else 400, "held_out")
    for seed in (0,) if smoke else (0, 1, 2):
        rng, rows = random.Random(seed), []
        for problem in make_problems(60 if smoke else 2000, "train", seed, lengths=(5, 6)):
            wrong = rng.random() < WRONG
            completion = corrupted(problem, rng) if wrong else problem.solution
            rows.append({"prompt": problem.prompt, "completion": completion, "wrong": wrong})
        data = Dataset.from_list(rows)
        for keep in KEEP:
            chosen, _ = select_by_likelihood(judge, data, keep=keep, batch_size=64)
            drawn = data.select(sorted(rng.sample(range(len(data)), len(chosen))))
            table.add(
                f"{keep:.0%}",
                wrong_rows=sum(chosen["wrong"]) / len(chosen),
                exact_match=exact_match(chosen, held_out, seed, smoke),
                exact_match_random=exact_match(drawn, held_out, seed, smoke),
            )
    table.print()


def exact_match(rows: Dataset, held_out: Dataset, seed: int, smoke: bool) -> float:
    """Train a new model on the rows, and return its exact match on held-out problems."""
    with tempfile.TemporaryDirectory() as folder:
        training = COMMON | {"learning_rate": 2e-3, "seed": seed}
        args = WeakToStrongConfig(
            folder, max_steps=3 if smoke else 400, kd_weight=0.0, save_strategy="no", logging_strategy="no", **training
        )
        base = tiny_reward_base(f"{folder}/untrained", hidden_size=64, num_layers=2)
        trainer = WeakToStrongTrainer(base, args=args, train_dataset=rows.select_columns(["prompt", "completion"]))
        train_quietly(trainer)
        trainer.save_model(folder)
        generator = TransformersGenerator(
            load_policy(folder),
            Sampling(max_completion_length=24, temperature=0.0),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        found = generator.generate(held_out["prompt"], num_generations=1, seed=0)
    right = [own[0].text.strip() == gold.strip() for own, gold in zip(found, held_out["completion"], strict=True)]
    return sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=("pairs", "cascade", "selection"))
    parser.add_argument("--strong", help="for pairs: the folder of a larger model, e.g. MiniLM")
    parser.add_argument("--loss", default="xent", choices=("xent", "logconf"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--weak_steps", type=int, default=200)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--output_dir", help="for pairs: folder for the runs; for cascade: folder of earlier runs")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.study == "pairs":
        if args.strong is None:
            parser.error("pairs needs --strong PATH")
        real_pairs(args)
    elif args.study == "cascade":
        cascade_curve(Path(args.output_dir or "outputs/weak_to_strong/preference-xent"))
    else:
        selection_curve(args.smoke)


if __name__ == "__main__":
    main()
