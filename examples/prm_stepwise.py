"""Train a process reward model, find the first wrong step with it, and use it as a reward function.

    python examples/prm_stepwise.py            # trl-lib/math_shepherd, see below; for a GPU
    python examples/prm_stepwise.py --smoke    # offline, a tiny model, under a minute on a CPU

A row has a prompt, the steps of a solution (`completions`), and a label for each step: true, false, a probability, or
null for a step without annotation. This is the format of TRL's former PRMTrainer.
"""

import sys
import tempfile

from datasets import Dataset, load_dataset
from peft import LoraConfig

from trl_ext import PRMConfig, PRMTrainer, RewardScorer


LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def full_run() -> PRMTrainer:
    args = PRMConfig(
        output_dir="outputs/prm_stepwise",
        learning_rate=1e-4,  # for LoRA; TRL's default of 1e-5 is for training all weights
        num_train_epochs=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=8,
        eval_strategy="steps",
        eval_steps=0.2,  # five times in all
    )
    data = load_dataset("trl-lib/math_shepherd")
    return PRMTrainer(
        model="Qwen/Qwen3-0.6B",
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"].select(range(1000)),
        peft_config=LORA,
    )


def smoke_rows(start: int) -> list[dict]:
    """Solutions that count up from a digit; every third has a letter as a wrong step, and no labels after it."""
    rows = []
    for number in range(start, start + 60):
        first = number % 5
        steps = [str(first + i) for i in range(4)]
        labels: list[bool | None] = [True] * 4
        if number % 3 == 0:
            wrong = 1 + number // 3 % 3
            steps[wrong] = "x"
            labels[wrong:] = [False] + [None] * (3 - wrong)
        rows.append({"prompt": f"Count from {first}:\n", "completions": steps, "labels": labels})
    return rows


def smoke_run(folder: str) -> PRMTrainer:
    from trl_ext.demo.model import tiny_reward_base

    args = PRMConfig(
        output_dir=f"{folder}/out",
        max_steps=80,
        learning_rate=1e-2,
        per_device_train_batch_size=15,
        logging_steps=5,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    return PRMTrainer(
        model=tiny_reward_base(f"{folder}/base", hidden_size=32),
        args=args,
        train_dataset=Dataset.from_list(smoke_rows(0)),
        eval_dataset=Dataset.from_list(smoke_rows(7)),  # the same texts: a smoke run does not test generalisation
        peft_config=LORA,
    )


def main(smoke: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = smoke_run(folder) if smoke else full_run()
        trainer.train()
        trainer.save_model()
        print("losses:", *(f"{entry['loss']:.4f}" for entry in trainer.state.log_history if "loss" in entry))
        metrics = trainer.evaluate()
        # AUC on steps up to the first error, and the AUC that the step's number alone reaches
        names = ("auc_to_first_error", "step_index_auc", "first_error_accuracy", "processbench_f1")
        print(*(f"{name}={metrics[f'eval_{name}']:.3f}" for name in names))

        # the score of a completion is its worst step's; `prod` or `sum_log` would also penalise long completions
        scorer = RewardScorer(trainer.args.output_dir, aggregation="min")
        prompt, steps = "Count from 2:\n", ["2", "3", "x", "5"]
        (probabilities,) = scorer.score_steps([prompt], [steps])
        for step, probability in zip(steps, probabilities, strict=True):
            print(f"{probability:.3f}  {step}")
        # the scorer itself is a reward function for GRPOTrainer(reward_funcs=[scorer])
        good, bad = scorer([prompt] * 2, ["2\n3\n4\n5", "\n".join(steps)])
        print(f"rewards: {good:.3f} {bad:.3f}")


if __name__ == "__main__":
    main(smoke="--smoke" in sys.argv[1:])
