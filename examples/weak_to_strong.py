"""Train a strong student on a weak model's labels, and measure how much of the gap to ground truth it recovers.

    python examples/weak_to_strong.py            # offline; preferences and generation, three seeds, CPU
    python examples/weak_to_strong.py --smoke    # the same in seconds, too short to learn

The task is sorting digits; code makes right and wrong solutions. The weak supervisor is small and has random weights.
The strong student was pretrained on other problems, so it has seen the task before, as in Burns et al.
(https://huggingface.co/papers/2312.09390). It saw texts with verdicts before it learns to judge, and solutions before
it learns to generate them. To use your own data, give `weak_to_strong` a data set with the columns of the
task, and paths or Hub ids of two models.
"""

import random
import sys
import tempfile

from datasets import Dataset
from transformers import PrinterCallback

from trl_ext import RewardConfig, WeakToStrongArguments, WeakToStrongConfig, WeakToStrongTrainer, weak_to_strong
from trl_ext.demo.model import tiny_reward_base
from trl_ext.demo.task import Problem, make_problems


LENGTHS = (5, 6)  # digits to sort

COMMON = {
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "warmup_steps": 20,
    "logging_steps": 50,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "disable_tqdm": True,
}


def corrupted(problem: Problem, rng: random.Random) -> str:
    """A wrong solution: two lines are swapped, one is left out, or one digit is changed."""
    lines = problem.steps
    place = rng.randrange(len(lines) - 1)
    kind = rng.choice(("swap", "drop", "change"))
    if kind == "swap":
        lines[place], lines[place + 1] = lines[place + 1], lines[place]
    elif kind == "drop":
        del lines[place]
    else:
        others = [f"{digit}\n" for digit in range(10) if f"{digit}\n" not in lines]
        lines[place] = rng.choice(others)
    return "".join(lines)


def pair_rows(number: int) -> Dataset:
    """Pairs of a right and a wrong solution of the same problem."""
    rng, rows = random.Random(0), []
    for problem in make_problems(number, "train", 0, lengths=LENGTHS):
        rows.append({"prompt": problem.prompt, "chosen": problem.solution, "rejected": corrupted(problem, rng)})
    return Dataset.from_list(rows)


def solution_rows(number: int, split: str = "train") -> Dataset:
    """Right solutions."""
    problems = make_problems(number, split, 0, lengths=LENGTHS)
    return Dataset.from_list([{"prompt": problem.prompt, "completion": problem.solution} for problem in problems])


def verdict_rows(number: int, split: str) -> Dataset:
    """Solutions, half of them wrong, each followed by a verdict."""
    rng, rows = random.Random(0), []
    for problem in make_problems(number, split, 0, lengths=LENGTHS):
        right = rng.random() < 0.5
        solution = problem.solution if right else corrupted(problem, rng)
        rows.append({"prompt": problem.prompt + solution, "completion": "1" if right else "0"})
    return Dataset.from_list(rows)


def pretrained(folder: str, steps: int, rows: Dataset) -> str:
    """Pretrain a strong language model on texts of the same kind about other problems."""
    base = tiny_reward_base(f"{folder}/untrained", hidden_size=96, num_layers=2)
    args = WeakToStrongConfig(f"{folder}/pretraining", max_steps=steps, kd_weight=0.0, save_strategy="no", **COMMON)
    trainer = WeakToStrongTrainer(base, args=args, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(f"{folder}/strong")
    return f"{folder}/strong"


def main() -> None:
    smoke = "--smoke" in sys.argv[1:]
    folder = tempfile.mkdtemp() if smoke else "outputs/weak_to_strong"
    seeds = [0] if smoke else [0, 1, 2]
    weak = tiny_reward_base(f"{folder}/weak", hidden_size=48, num_layers=1)

    judge = pretrained(f"{folder}/judge", 5 if smoke else 800, verdict_rows(4000, "policy"))
    for loss in ("xent", "logconf"):
        config = WeakToStrongArguments(
            [weak],
            [judge],
            task="preference",
            student_loss=loss,
            seeds=seeds,
            weak_training={"max_steps": 3 if smoke else 150, "learning_rate": 2e-3},
        )
        args = RewardConfig(f"{folder}/preference-{loss}", max_steps=3 if smoke else 300, **COMMON)
        print(weak_to_strong(config, args, pair_rows(60 if smoke else 6000)).markdown())

    writer = pretrained(f"{folder}/writer", 5 if smoke else 600, solution_rows(4000, "policy"))
    for loss in ("sft", "kd"):
        config = WeakToStrongArguments(
            [weak],
            [writer],
            task="generation",
            student_loss=loss,
            seeds=seeds,
            weak_share=0.2,
            # long enough to learn to end texts, because the student skips truncated ones
            weak_training={"max_steps": 150 if smoke else 600, "learning_rate": 2e-3},
            max_completion_length=24,
        )
        training = COMMON | {"learning_rate": 2e-4}  # the writer knows the task, so it needs few and small steps
        args = WeakToStrongConfig(f"{folder}/generation-{loss}", max_steps=3 if smoke else 100, **training)
        print(weak_to_strong(config, args, solution_rows(60 if smoke else 4000)).markdown())


if __name__ == "__main__":
    main()
