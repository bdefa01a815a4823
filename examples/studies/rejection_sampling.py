"""Compare rejection sampling with controls: rounds on the demo's task, and picks among real GSM8K solutions.

    python examples/studies/rejection_sampling.py rounds           # three seeds, offline
    python examples/studies/rejection_sampling.py picks            # needs the data of docs/results/real_data.md
    python examples/studies/rejection_sampling.py rounds --smoke   # checks that it runs

`rounds` trains a mediocre policy that sorts digits. Each of three rounds keeps samples that the exact verifier
finds right. The control keeps the same number of samples of the same prompts, drawn at random from all samples.
`picks` picks the best of 4 given solutions of a question with rules that need no training.
"""

import argparse
import math
import re
import tempfile
from pathlib import Path

from datasets import Dataset
from tools import data_folder, read

from trl_ext import RejectionSamplingConfig, RejectionSamplingTrainer
from trl_ext.demo.policy import train_policy
from trl_ext.demo.task import Problem, make_problems, verify
from trl_ext.metrics.voting import best_of_k, bootstrap_interval, majority_vote


SIZES = dict(policy=8000, trial=200, prompts=300, held_out=250, policy_steps=1000, rounds=3, samples=8, eval_samples=4)
SMOKE = dict(policy=200, trial=10, policy_steps=40, prompts=8, samples=4, rounds=1, held_out=6, eval_samples=2)
ARMS = {
    "verifier": {"selection": "threshold", "selection_kwargs": {"min_score": 1.0, "n": 4}},
    "random": {"selection": "random_per_prompt", "selection_kwargs": {"like": "threshold", "min_score": 1.0, "n": 4}},
}


def exact_match(prompts: list[str], completions: list[str], **kwargs) -> list[float]:
    """1 for a right solution, 0 for any other."""
    problems = [Problem(tuple(map(int, prompt.rstrip(":\n")))) for prompt in prompts]
    return [float(verify(*pair).answer_right) for pair in zip(problems, completions, strict=True)]


def rows(count: int, split: str, seed: int) -> Dataset:
    return Dataset.from_list([{"prompt": problem.prompt} for problem in make_problems(count, split, seed)])


def run_rounds(folder: str, seed: int, sizes: dict) -> dict[str, list[dict]]:
    """The history of each arm."""
    policy = f"{folder}/{seed}/policy"
    train_policy(
        make_problems(sizes["policy"], "policy", seed),
        make_problems(sizes["trial"], "trial", seed),
        policy,
        seed=seed,
        max_steps=sizes["policy_steps"],
    )
    histories = {}
    for arm, selection in ARMS.items():
        if sizes is SMOKE:  # an untrained policy solves nothing
            selection = {"selection": "top_per_prompt" if arm == "verifier" else "random_per_prompt"}
        args = RejectionSamplingConfig(
            output_dir=f"{folder}/{seed}/{arm}",
            num_rounds=sizes["rounds"],
            num_generations=sizes["samples"],
            num_generations_eval=sizes["eval_samples"],
            max_completion_length=20,
            temperature=0.8,
            generation_batch_size=512,
            **selection,
            num_train_epochs=1,
            per_device_train_batch_size=16,
            learning_rate=1e-4,  # at 3e-4 the first steps of a round's new optimizer undo earlier learning
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            seed=seed,
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        trainer = RejectionSamplingTrainer(
            policy,
            exact_match,
            args,
            train_dataset=rows(sizes["prompts"], "train", seed),
            eval_dataset=rows(sizes["held_out"], "held_out", seed),
        )
        trainer.train()
        histories[arm] = trainer.history
    return histories


def report_rounds(seeds: list[dict[str, list[dict]]]) -> None:
    """Print exact match on held-out prompts: the mean over seeds, with an interval from the errors over prompts."""
    print(f"{'round':>5} {'arm':<10} {'exact match':>11}  {'95 % interval':<16} {'rows':>6}  by seed")
    for number in range(len(seeds[0]["verifier"])):
        for arm in ARMS if number else ["verifier"]:
            found = [history[arm][number] for history in seeds]
            values = [row["eval_reward"] for row in found]
            mean = sum(values) / len(values)
            error = math.sqrt(sum(row["eval_reward_error"] ** 2 for row in found)) / len(found)
            kept = sum(row.get("rows", 0) for row in found) // len(found)
            interval = f"{mean - 1.96 * error:.3f} to {mean + 1.96 * error:.3f}"
            by_seed = " ".join(f"{value:.3f}" for value in values)
            print(f"{number:>5} {arm if number else 'before':<10} {mean:>11.3f}  {interval:<16} {kept:>6}  {by_seed}")


def report_picks(folder: Path) -> None:
    """Print the share of questions whose pick is right, for each rule."""
    questions: dict[str, list[dict]] = {}
    for row in read(folder / "orm_gsm8k" / "model_solutions.jsonl"):
        questions.setdefault(row["id"], []).append(row)
    groups = [group for group in questions.values() if len(group) == 4]

    def answer(text: str) -> float | None:
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        return float(numbers[-1].replace(",", "")) if numbers else None

    picks: dict[str, list[float]] = {name: [] for name in ("random", "shortest", "longest", "majority", "oracle")}
    for group in groups:
        right = [float(row["label"]) for row in group]
        lengths = [float(len(row["completion"])) for row in group]
        answers = [answer(row["completion"]) for row in group]
        votes = [float(answers.count(given)) if given is not None else 0.0 for given in answers]
        assert majority_vote(answers) is None or max(votes) == answers.count(majority_vote(answers))
        picks["random"].append(best_of_k(right, right, 1))
        picks["shortest"].append(best_of_k(right, [-length for length in lengths], 4))
        picks["longest"].append(best_of_k(right, lengths, 4))
        picks["majority"].append(best_of_k(right, votes, 4))  # solutions with equally many votes are equally likely
        picks["oracle"].append(best_of_k(right, right, 4))
    print(f"{len(groups)} questions with 4 solutions each")
    print(f"{'pick':<10} {'right':>6}  {'95 % interval':<16} more than random")
    for name, values in picks.items():
        low, high = bootstrap_interval(values)
        gain = [value - base for value, base in zip(values, picks["random"], strict=True)]
        ends = bootstrap_interval(gain)
        mean = sum(values) / len(values)
        print(f"{name:<10} {mean:>6.3f}  {f'{low:.3f} to {high:.3f}':<16} {ends[0]:+.3f} to {ends[1]:+.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("study", choices=("rounds", "picks"))
    parser.add_argument("--smoke", action="store_true", help="for rounds: a few rows and steps")
    args = parser.parse_args()
    if args.study == "picks":
        report_picks(data_folder(["orm_gsm8k"]))
        return
    with tempfile.TemporaryDirectory() as folder:
        seeds = [0] if args.smoke else [0, 1, 2]
        report_rounds([run_rounds(folder, seed, SMOKE if args.smoke else SIZES) for seed in seeds])


if __name__ == "__main__":
    main()
