"""Train a policy with the rewards of a process model for each step, and look at the credit of every token.

    python examples/dense_grpo_steps.py MODEL PRM    # for a GPU: a policy, and a model of examples/prm_stepwise.py
    python examples/dense_grpo_steps.py --smoke      # offline, a tiny model, on a CPU

The prompts are yours: `data/prompts.jsonl` with the columns `prompt` and `solution`.
The policy and the process model may have different tokenizers. The page that the script names shows curves, and
completions coloured by the advantage of each token.
"""

import sys
import tempfile

from datasets import Dataset, load_dataset

from trl_ext import DenseGRPOConfig, DenseGRPOTrainer, RewardScorer
from trl_ext.trainers.policy.report import policy_report


def exact(completions: list, solution: list[str], **columns) -> list[float]:
    """The verifier: whether the last line is the solution."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(text.strip().endswith(wanted)) for text, wanted in zip(texts, solution, strict=True)]


def train(model: str, prm: str, prompts: Dataset, **arguments) -> DenseGRPOTrainer:
    args = DenseGRPOConfig(advantage="process", verifier="exact", log_completions=True, **arguments)
    scorer = RewardScorer(prm, name="prm")
    trainer = DenseGRPOTrainer(model, exact, scorer, args=args, train_dataset=prompts)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return trainer


def full_run(model: str, prm: str) -> DenseGRPOTrainer:
    prompts = load_dataset("json", data_files="data/prompts.jsonl", split="train")
    return train(model, prm, prompts, output_dir="outputs/dense_grpo_steps", num_generations=8)


def smoke_run(folder: str) -> DenseGRPOTrainer:
    from trl_ext import PRMConfig, PRMTrainer
    from trl_ext.demo.model import tiny_reward_base

    base = tiny_reward_base(f"{folder}/base", hidden_size=64)
    quiet = dict(use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, logging_steps=1, save_strategy="no")
    rows = [
        {"prompt": f"Count from {n % 5}:\n", "completions": [str(n % 5), "x"], "labels": [True, n % 2 == 0]}
        for n in range(40)
    ]
    prm = PRMTrainer(base, PRMConfig(f"{folder}/prm", max_steps=5, **quiet), train_dataset=Dataset.from_list(rows))
    prm.train()
    prm.save_model()
    prompts = Dataset.from_list([{"prompt": row["prompt"], "solution": "4"} for row in rows[:10]])
    return train(
        base,
        f"{folder}/prm",
        prompts,
        output_dir=f"{folder}/policy",
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-3,
        **quiet,
    )


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = smoke_run(folder) if "--smoke" in arguments else full_run(*arguments)
        for log in trainer.state.log_history:
            if "reward" in log:
                print(f"verifier={log['rewards/exact/mean']:.4f} steps={log['dense/rewards_per_completion']:.4f}")
        print("report:", policy_report(trainer.args.output_dir))


if __name__ == "__main__":
    main(sys.argv[1:])
