"""Train a reward model from K-way rankings with LoRA, then reload it from its folder and rank new answers.

    python examples/reward_rankings.py            # your rankings, see below; for a GPU
    python examples/reward_rankings.py --smoke    # offline, a tiny model, under a minute on a CPU

A row has a prompt, any number of candidate completions, and a rating for each (higher is better; equal ratings are a
tie). You can also give `ranks`, where lower is better. The full run reads data/rankings/train.jsonl.
"""

import sys
import tempfile

from datasets import Dataset, load_dataset
from peft import LoraConfig

from trl_ext import RewardConfig, RewardScorer, RewardTrainer


LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def full_run() -> RewardTrainer:
    args = RewardConfig(
        output_dir="outputs/reward_rankings",
        loss_type="plackett_luce",
        num_train_epochs=1,
        per_device_train_batch_size=4,  # prompts, each with all its candidates
        gradient_accumulation_steps=16,
    )
    dataset = load_dataset("json", data_files="data/rankings/train.jsonl", split="train")
    return RewardTrainer(model="Qwen/Qwen3-0.6B", args=args, train_dataset=dataset, peft_config=LORA)


def smoke_rows() -> list[dict]:
    """Sums of two digits with four answers: right, off by one (rated lower), and two far off (tied last)."""
    return [
        {
            "prompt": f"{a}+{b}=",
            "completions": [str(a + b + 7), str(a + b), str(a + b + 1), str(a + b + 9)],
            "ratings": [0.0, 2.0, 1.0, 0.0],
        }
        for a in range(10)
        for b in range(10)
    ]


def smoke_run(folder: str) -> RewardTrainer:
    from trl_ext.demo.model import tiny_reward_base

    args = RewardConfig(
        output_dir=f"{folder}/out",
        loss_type="plackett_luce",
        max_steps=20,
        learning_rate=3e-3,
        per_device_train_batch_size=10,
        logging_steps=5,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    model = tiny_reward_base(f"{folder}/base", hidden_size=32)
    return RewardTrainer(model=model, args=args, train_dataset=Dataset.from_list(smoke_rows()), peft_config=LORA)


def main(smoke: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = smoke_run(folder) if smoke else full_run()
        trainer.train()
        trainer.save_model()
        print("losses:", *(f"{entry['loss']:.4f}" for entry in trainer.state.log_history if "loss" in entry))

        # the folder holds adapter, head and tokenizer, and names their base
        scorer = RewardScorer(trainer.args.output_dir)
        candidates = ["7", "8", "14"]
        scores = scorer(prompts=["3+4="] * len(candidates), completions=candidates)
        for score, candidate in sorted(zip(scores, candidates, strict=True), reverse=True):
            print(f"{score:+.4f}  3+4={candidate}")


if __name__ == "__main__":
    main(smoke="--smoke" in sys.argv[1:])
