"""Train `trl.DPOTrainer` on preference pairs that come from the policy's samples.

    python examples/dpo_from_rejection_sampling.py            # with the model of reward_rankings.py; for a GPU
    python examples/dpo_from_rejection_sampling.py --smoke    # offline, a tiny model and a rule as the reward

For each prompt the best and the worst sample form a pair, if their scores differ. The same scored samples can also
become rows for `SFTTrainer` (`selection="top_per_prompt"`) or groups for `RewardTrainer` (`"ranked_groups"`).
"""

import sys
import tempfile

from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from trl_ext import rejection_sample


def share_of_vowels(prompts: list[str], completions: list[str], **kwargs) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / 12 for text in completions]


def full_run() -> tuple[str, Dataset, DPOConfig, LoraConfig | None]:
    model = "Qwen/Qwen2.5-0.5B-Instruct"
    prompts = load_dataset("trl-lib/ultrafeedback-prompt", split="train").select(range(5000))
    pairs = rejection_sample(
        model,
        "outputs/reward_rankings",
        prompts,
        output_dir="outputs/dpo_samples",
        num_generations=8,
        selection="best_worst_pairs",
        selection_kwargs={"min_margin": 0.5},
        temperature=0.8,
    )
    args = DPOConfig(output_dir="outputs/dpo", per_device_train_batch_size=4, gradient_accumulation_steps=8)
    return model, pairs, args, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def smoke_run(folder: str) -> tuple[str, Dataset, DPOConfig, LoraConfig | None]:
    from trl_ext.demo.model import tiny_reward_base

    model = tiny_reward_base(f"{folder}/base", hidden_size=32)
    prompts = Dataset.from_list([{"prompt": f"say {number}:"} for number in range(32)])
    pairs = rejection_sample(
        model,
        share_of_vowels,
        prompts,
        output_dir=f"{folder}/samples",
        selection="best_worst_pairs",
        max_completion_length=12,
        generation_batch_size=256,
    )
    args = DPOConfig(
        output_dir=f"{folder}/dpo",
        max_steps=8,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        logging_steps=2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    return model, pairs, args, None


def main(smoke: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, pairs, args, peft_config = smoke_run(folder) if smoke else full_run()
        print(f"{len(pairs)} pairs, mean margin {sum(pairs['score_margin']) / len(pairs):.3f}")
        columns = ["prompt", "chosen", "rejected"]
        trainer = DPOTrainer(model, args=args, train_dataset=pairs.select_columns(columns), peft_config=peft_config)
        trainer.train()
        print("losses:", *(f"{entry['loss']:.4f}" for entry in trainer.state.log_history if "loss" in entry))


if __name__ == "__main__":
    main(smoke="--smoke" in sys.argv[1:])
