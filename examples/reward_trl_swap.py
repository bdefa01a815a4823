"""A reward model script for TRL, in which only one import line was changed.

python examples/reward_trl_swap.py            # downloads a 0.5B model and UltraFeedback; for a GPU
python examples/reward_trl_swap.py --smoke    # offline, a tiny model, a few seconds on a CPU
"""

import sys
import tempfile

from datasets import Dataset, load_dataset

from trl_ext import RewardConfig, RewardTrainer  # the changed line: it said trl


def full_run() -> RewardTrainer:
    args = RewardConfig(output_dir="outputs/reward_trl_swap", learning_rate=1e-5, num_train_epochs=1)
    dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")
    return RewardTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", args=args, train_dataset=dataset)


def smoke_run(folder: str) -> RewardTrainer:
    from trl_ext.demo.model import tiny_reward_base

    args = RewardConfig(
        output_dir=f"{folder}/out",
        max_steps=5,
        per_device_train_batch_size=4,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    rows = [
        {"prompt": f"What is {a} + {b}? ", "chosen": str(a + b), "rejected": str(a + b + 1)}
        for a in range(8)
        for b in range(4)
    ]
    model = tiny_reward_base(f"{folder}/base", hidden_size=32)
    return RewardTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows))


def main(smoke: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = smoke_run(folder) if smoke else full_run()
        trainer.train()
        trainer.save_model()
        print("losses:", *(f"{entry['loss']:.6f}" for entry in trainer.state.log_history if "loss" in entry))


if __name__ == "__main__":
    main(smoke="--smoke" in sys.argv[1:])
