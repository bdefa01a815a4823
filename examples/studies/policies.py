"""Compare ways to train a policy on an exact task at equal samples: outcome, process rewards, PPO, rejection sampling.

    python examples/studies/policies.py --seeds 5 --output_dir outputs/study_policies    # run it again to go on
    python examples/studies/policies.py --smoke                                          # a few steps each

The task is that of `trl-ext demo`: sort digits, one line a step, with a verifier that is never wrong. For each seed a
tiny policy is fine-tuned until about a quarter of its samples is right, and a process model learns from its samples.
Every arm then starts from that policy and sees the same number of prompts and samples, no prompt twice. The outcome
reward is the verifier's: 1 for a right answer. The dense rewards are the process model's P(correct) of each line; the
last line's is that of ending there. Some arms take the verifier's verdicts of the lines instead: what a process model
without faults would give. Results of finished arms are kept in `<output_dir>/seed-<n>/<arm>.json`: the share of right
samples on held-out prompts, and what the trainer logged at every tenth of the training.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from quiet import QUIET
from scipy.stats import t as student_t
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer
from trl import SFTConfig, SFTTrainer

from trl_ext import (
    DenseGRPOConfig,
    DenseGRPOTrainer,
    PPOConfig,
    PPOTrainer,
    PRMConfig,
    PRMTrainer,
    RewardScorer,
    rejection_sample,
)
from trl_ext.demo.policy import sample_solutions, train_policy
from trl_ext.demo.task import Problem, make_problems, verify


# What differs between the arms that are trained by policy gradients. Those called "exact" get the verifier's verdicts.
ARMS: dict[str, dict[str, Any]] = {
    "outcome": {"advantage": "outcome"},
    "process": {"advantage": "process"},
    "min-form": {"advantage": "min_form"},
    "shaped": {"advantage": "shaped", "potential": "min"},
    "shrunken": {"advantage": "shrunken", "dense_weight": 0.0},
    "PPO": {"advantage": "gae", "value_learning_rate": 1e-3, "beta": 0.0},
    "process, exact": {"advantage": "process"},
    "shaped, exact": {"advantage": "shaped", "potential": "min"},
    "shrunken, summed": {"advantage": "shrunken"},
    "shaped, exact, lambda 0.8": {"advantage": "shaped", "potential": "min", "gae_lambda": 0.8},
}
ASKED_FOR = ("shrunken, summed", "shaped, exact, lambda 0.8")  # known to fail; run with --arms only
REJECTION = "rejection sampling"
COLUMNS = [
    "arm",
    "right on held-out prompts",
    "less the first arm",
    "right in training, by tenths",
    "lines of a sample, first to last tenth",
    "samples cut, last tenth",
]
LOGGED = {
    "rewards/exact/mean": "right",
    "rewards/dense/mean": "dense reward",
    "dense/rewards_per_completion": "lines",
    "completions/clipped_ratio": "cut",
}
GROUP = 8


def problem_of(prompt: str) -> Problem:
    return Problem(tuple(map(int, prompt.removesuffix(":\n"))))


def exact(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The verifier: 1 for a right answer, else 0."""
    return [float(verify(problem_of(p), c).answer_right) for p, c in zip(prompts, completions, strict=True)]


def lines(text: str) -> list[str]:
    """The lines of a solution, and an empty one for ending there."""
    return [*text.splitlines(), ""]


def spans_of(text: str, rewards: list[float]) -> list[tuple[int, int, float]] | None:
    """One reward a line; the last line gets the one behind it, that of ending there."""
    start, spans = 0, []
    parts = text.splitlines(keepends=True)
    for line, reward in zip(parts, [*rewards[: len(parts) - 1], rewards[-1]], strict=True):
        spans.append((start, start + len(line), reward))
        start += len(line)
    return spans or None


def process_rewards(scorer: RewardScorer) -> Callable:
    """P(correct) of each line by a process model."""

    def process(prompts: list[str], completions: list[str], **columns: Any) -> list:
        scores = scorer.score_steps(prompts, [lines(text) for text in completions])
        return [spans_of(text, own) if text else None for text, own in zip(completions, scores, strict=True)]

    return process


def exact_steps(prompts: list[str], completions: list[str], **columns: Any) -> list:
    """The verifier's verdict of each line: 1 as long as all lines are right."""
    found = []
    for prompt, text in zip(prompts, completions, strict=True):
        verdict = verify(problem_of(prompt), text)
        so_far = [float(all(verdict.steps_right[: n + 1])) for n in range(len(verdict.steps_right))]
        found.append(spans_of(text, [*so_far, float(verdict.answer_right)]) if text else None)
    return found


def quiet(trainer: Trainer) -> Trainer:
    trainer.remove_callback(PrinterCallback)
    return trainer


def prepare(folder: Path, seed: int, args: argparse.Namespace) -> tuple[Path, Path]:
    """The policy that all arms start from, and the process model, which learns from samples of it."""
    policy, prm = folder / "policy", folder / "prm"
    if not (policy / "config.json").is_file():
        problems = make_problems(args.policy_prompts, "policy", seed), make_problems(args.trial_prompts, "trial", seed)
        train_policy(*problems, policy, seed=seed, max_steps=args.policy_steps)
    if not (prm / "reward_model.json").is_file():
        problems = make_problems(args.prm_prompts, "train", seed)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
        rows = []
        # hotter samples show it mistakes that the policy may come to make
        for temperature in (0.8, 1.2):
            samples = sample_solutions(model, tokenizer, problems, 4, seed=seed, temperature=temperature)
            for problem, texts in zip(problems, samples, strict=True):
                for text in texts:
                    verdict = verify(problem, text)
                    labels = [*verdict.steps_right, verdict.answer_right]
                    rows.append({"prompt": problem.prompt, "completions": lines(text), "labels": labels})
        config = PRMConfig(
            str(prm),
            max_steps=args.prm_steps,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            seed=seed,
            **QUIET,
        )
        trainer = quiet(PRMTrainer(str(policy), config, train_dataset=Dataset.from_list(rows)))
        trainer.train()
        trainer.save_model(str(prm))
    return policy, prm


def accuracy(model: Any, tokenizer: Any, args: argparse.Namespace, seed: int) -> float:
    """The share of right samples on held-out prompts."""
    problems = make_problems(args.eval_prompts, "held_out", seed)
    samples = sample_solutions(model.eval(), tokenizer, problems, 2, seed=seed)
    right = [verify(p, text).answer_right for p, texts in zip(problems, samples, strict=True) for text in texts]
    return sum(right) / len(right)


def train_arm(
    name: str, policy: Path, prm: Path, folder: Path, seed: int, args: argparse.Namespace
) -> tuple[Any, dict[str, list[float]]]:
    """Train one arm; return the policy and what was logged at every tenth of the training."""
    # the process model learned from the first prompts of the split
    problems = make_problems(args.prm_prompts + args.steps * args.prompts, "train", seed)[args.prm_prompts :]
    prompts = Dataset.from_list([{"prompt": problem.prompt} for problem in problems])
    tokenizer = AutoTokenizer.from_pretrained(policy)
    sampling = {"min_new_tokens": 1, "suppress_tokens": [tokenizer.pad_token_id, tokenizer.bos_token_id]}
    if name == REJECTION:
        rows = rejection_sample(
            str(policy),
            exact,
            prompts,
            folder / "samples",
            GROUP,
            selection_kwargs={"n": 2},
            seed=seed,
            temperature=0.8,
            max_completion_length=20,
            generation_kwargs=sampling,
            isolate="never",
        )
        config = SFTConfig(
            str(folder), num_train_epochs=1, per_device_train_batch_size=16, learning_rate=3e-4, seed=seed, **QUIET
        )
        trainer = quiet(SFTTrainer(str(policy), config, train_dataset=rows.select_columns(["prompt", "completion"])))
        trainer.train()
        return trainer.model, {}
    options = dict(
        output_dir=str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=GROUP * args.prompts,
        num_generations=GROUP,
        max_completion_length=20,
        temperature=0.8,
        generation_kwargs=sampling,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=min(20, args.steps // 4),  # Adam's first steps are as large as any
        logging_steps=max(1, args.steps // 10),
        verifier="exact",
        seed=seed,
        **QUIET,
        **ARMS[name],
    )
    ppo = ARMS[name]["advantage"] == "gae"
    dense = None
    if "exact" in name:
        dense = exact_steps
    elif not ppo and name != "outcome":
        dense = process_rewards(RewardScorer(prm, device="cpu"))
    config = (PPOConfig if ppo else DenseGRPOConfig)(**options)
    trainer = quiet(
        (PPOTrainer if ppo else DenseGRPOTrainer)(str(policy), exact, dense, config, train_dataset=prompts)
    )
    trainer.train()
    trainer.save_state()
    logged = [row for row in trainer.state.log_history if "rewards/exact/mean" in row]
    return trainer.model, {
        title: [round(row[name], 4) for row in logged] for name, title in LOGGED.items() if name in logged[0]
    }


def run_seed(seed: int, root: Path, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What came of every arm of a seed; finished arms are read from disk."""
    folder = root / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    policy, prm = prepare(folder, seed, args)
    found: dict[str, dict[str, Any]] = {}
    for name in ("before", *args.arms):
        place = folder / name.replace(" ", "_").replace(",", "")
        file = place.with_suffix(".json")
        if not file.is_file():
            start = time.perf_counter()
            model, curves = AutoModelForCausalLM.from_pretrained(policy), {}
            if name != "before":
                model, curves = train_arm(name, policy, prm, place, seed, args)
            with torch.random.fork_rng(devices=[]):
                share = accuracy(model, AutoTokenizer.from_pretrained(policy), args, seed)
            seconds = round(time.perf_counter() - start, 1)
            result = {"accuracy": share, "curves": curves, "seconds": seconds}
            file.write_text(json.dumps(result) + "\n", encoding="utf-8")
            print(f"seed {seed}, {name}: {share:.3f} ({seconds} s)", file=sys.stderr, flush=True)
        found[name] = json.loads(file.read_text(encoding="utf-8"))
    return found


def gain_over(name: str, other: str, results: list[dict[str, dict[str, Any]]]) -> dict[str, float]:
    """The mean gain of an arm over another one, paired by seed, with a 95 % interval of Student's t."""
    gains = [result[name]["accuracy"] - result[other]["accuracy"] for result in results]
    mean = statistics.fmean(gains)
    if len(gains) < 2:
        return {"mean": mean}
    half = student_t.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / len(gains) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each arm")
    parser.add_argument("--prompts", type=int, default=8, help="prompts in a step, with 8 samples each")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--policy_steps", type=int, default=1000, help="fine-tuning before; fewer is a worse start")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, REJECTION], help="default: all but those known to fail")
    parser.add_argument("--eval_prompts", type=int, default=500, help="held-out prompts, with 2 samples each")
    parser.add_argument("--output_dir", default="outputs/study_policies")
    parser.add_argument("--json", help="file for the table's figures")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(arguments)
    sizes = dict(policy_prompts=8000, trial_prompts=200, prm_prompts=1500, prm_steps=400)
    if args.smoke:
        sizes = dict(policy_prompts=200, policy_steps=30, trial_prompts=10, prm_prompts=8, prm_steps=2)
        args.seeds, args.steps, args.prompts, args.eval_prompts = 1, 2, 1, 8
    vars(args).update(sizes)
    usual = [*(name for name in ARMS if name not in ASKED_FOR), REJECTION]
    args.arms = args.arms or usual
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) if args.smoke else Path(args.output_dir)
        keep_settings(root, {name: vars(args)[name] for name in ("steps", "prompts", "learning_rate", "policy_steps")})
        results = [run_seed(seed, root, args) for seed in range(args.first_seed, args.first_seed + args.seeds)]
    arms = {
        name: {
            "accuracy": statistics.fmean(result[name]["accuracy"] for result in results),
            "each seed": [result[name]["accuracy"] for result in results],
            "curves": {
                title: [round(statistics.fmean(values), 4) for values in zip(*of_seeds, strict=True)]
                for title in results[0][name]["curves"]
                for of_seeds in [[result[name]["curves"][title] for result in results]]
            },
            "less the first arm": gain_over(name, args.arms[0], results),
        }
        for name in results[0]
    }
    lines = [table_line(name, arm) for name, arm in arms.items()]
    if args.json:
        command = f"python examples/studies/policies.py --seeds {args.seeds} --steps {args.steps}"
        command += "" if args.policy_steps == 1000 else f" --policy_steps {args.policy_steps}"
        if args.arms != usual:
            command += " --arms " + " ".join(f'"{name}"' if " " in name else name for name in args.arms)
        note = (
            f"{len(results)} seeds, {args.steps} steps of {args.prompts} prompts with {GROUP} samples; rejection "
            "sampling gets as many. Differences are paired by seed, with 95 % intervals (Student's t). What is in "
            "training is that of the policy as it samples, at temperature 0.8."
        )
        report = {"title": "Ways to train a policy on the demo's task", "date": date.today().isoformat()}
        report |= {"machine": f"{os.cpu_count()} CPU cores, no GPU", "command": [command], "note": note}
        report |= {"columns": COLUMNS, "rows": lines, "figures": arms}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n".join("| " + " | ".join(line) + " |" for line in [COLUMNS, ["---"] * len(COLUMNS), *lines]))


def keep_settings(root: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix results of different settings in one folder."""
    file = root / "settings.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else settings
    if known != settings:
        sys.exit(f"{root} holds results of {known}, and these are {settings}. Give another --output_dir.")
    root.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def table_line(name: str, arm: dict[str, Any]) -> list[str]:
    gain, curves = arm["less the first arm"], arm["curves"]
    line = [name, f"{arm['accuracy']:.3f}"]
    if gain["mean"] == gain.get("low", 0.0) == 0.0:
        line.append("")
    else:
        line.append(
            f"{gain['mean']:+.3f}" + (f" ({gain['low']:+.3f} to {gain['high']:+.3f})" if "low" in gain else "")
        )
    line.append(" ".join(f"{value:.2f}" for value in curves.get("right", [])))
    ends = [f"{values[0]:.1f} to {values[-1]:.1f}" for values in [curves.get("lines")] if values]
    return [*line, *(ends or [""]), f"{curves['cut'][-1]:.0%}" if "cut" in curves else ""]


if __name__ == "__main__":
    main(sys.argv[1:])
