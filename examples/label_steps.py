"""Label the steps of solutions without annotators, and train a process reward model on them.

    python examples/label_steps.py            # a small model solves arithmetic, and a rule checks it; for a GPU
    python examples/label_steps.py --smoke    # offline, a tiny policy of the demo's task

The policy writes solutions. From the end of a step it writes rollouts, and a verifier that only sees answers says
which ones are right. The first step from which no rollout is right is the first error.
"""

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from trl_ext import PRMConfig, PRMTrainer, RewardScorer
from trl_ext.demo.policy import train_policy
from trl_ext.demo.task import Problem, make_problems, verify
from trl_ext.pipelines.feedback.step_labels import label_steps_with_report


def sorted_digits(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """1 for a right answer, else 0. It says nothing about steps."""
    problems = [Problem(tuple(map(int, prompt.removesuffix(":\n")))) for prompt in prompts]
    return [float(verify(problem, text).answer_right) for problem, text in zip(problems, completions, strict=True)]


def right_sum(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """1 for a right answer to the questions in docs/data/steps, else 0."""
    sums = [sum(map(int, re.findall(r"\d+", prompt))) for prompt in prompts]
    return [float(text.rstrip().endswith(f"= {right}")) for text, right in zip(completions, sums, strict=True)]


def smoke_run(folder: str) -> dict[str, Any]:
    policy = f"{folder}/policy"
    lists = make_problems(300, "policy", 0, lengths=(3, 4)), make_problems(30, "trial", 0, lengths=(3, 4))
    train_policy(*lists, policy, seed=0, max_steps=120, target_accuracy=0.3)
    prompts = [{"prompt": problem.prompt} for problem in make_problems(40, "train", 0, lengths=(3, 4))]
    sampling = dict(temperature=0.8, max_completion_length=12, generation_batch_size=256)
    return dict(model=policy, dataset=prompts, verifier=sorted_digits, num_rollouts=4, num_solutions=2, **sampling)


def full_run() -> dict[str, Any]:
    questions = [f"A shop sells {n} boxes of 12 pens and {n + 3} single pens. How many pens?" for n in range(64)]
    prompts = [
        {"prompt": [{"role": "user", "content": question}], "solution": str(13 * n + 3)}
        for n, question in enumerate(questions)
    ]
    # math-verify reads the answers (pip install "trl-ext[math]"); a paragraph is a step
    return dict(model="Qwen/Qwen3-0.6B", dataset=prompts, verifier="accuracy_reward", step_separator="\n\n")


def main(smoke: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = smoke_run(folder) if smoke else full_run()
        output = Path(folder, "labels") if smoke else Path("outputs/label_steps")
        found = label_steps_with_report(output_dir=output, method="adaptive", **run)
        report = found.report
        print(f"{report['labelled']} solutions, {report['rollouts']} rollouts, {report['tokens']} generated tokens")
        for row in found.dataset.select(range(3)):
            pairs = zip(row["completions"], row["labels"], strict=True)
            print("  ".join(f"{step!r}: {label}" for step, label in pairs))
        args = PRMConfig(
            str(Path(folder, "prm") if smoke else "outputs/prm_from_rollouts"),
            step_separator=run.get("step_separator", "\n"),
            **(dict(max_steps=5, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True) if smoke else {}),
        )
        trainer = PRMTrainer(run["model"], args, train_dataset=found.dataset)
        trainer.train()
        row = found.dataset[0]
        scorer = RewardScorer(trainer.model, processing_class=trainer.processing_class)
        print("P(correct):", scorer.score_steps([row["prompt"]], [row["completions"]])[0])


if __name__ == "__main__":
    main(smoke="--smoke" in sys.argv[1:])
