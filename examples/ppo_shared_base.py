"""Run PPO with policy, reference, reward model and critic on one frozen base.

    python examples/ppo_shared_base.py MODEL REWARD    # for a GPU: a base, and a reward adapter on it in 4 bits
    python examples/ppo_shared_base.py --smoke         # offline, a tiny model, on a CPU

The prompts are yours: `data/prompts.jsonl` with a column `prompt`.
The reference is the base with its adapters off. The critic starts from the reward model, is saved beside the policy,
and scores tokens like any other token-level reward model.
"""

import sys
import tempfile

from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_ext import PPOConfig, PPOTrainer, RewardScorer
from trl_ext.scoring import SharedBaseScorer


def train(model: str, reward: str, prompts: Dataset, args: PPOConfig, **kwargs) -> PPOTrainer:
    trainer = PPOTrainer(
        model,
        reward_funcs=SharedBaseScorer(reward, name="reward"),
        args=args,
        train_dataset=prompts,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        value_model=reward,
        **kwargs,
    )
    trainer.train()
    trainer.save_model()
    return trainer


def full_run(model: str, reward: str) -> PPOTrainer:
    args = PPOConfig("outputs/ppo_shared_base", learning_rate=1e-5, num_iterations=4, num_generations=2)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    prompts = load_dataset("json", data_files="data/prompts.jsonl", split="train")
    return train(model, reward, prompts, args, quantization_config=nf4)


def smoke_run(folder: str) -> PPOTrainer:
    from trl_ext import RewardConfig, RewardTrainer
    from trl_ext.demo.model import tiny_reward_base

    base = tiny_reward_base(f"{folder}/base", hidden_size=64)
    quiet = dict(use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, logging_steps=1, save_strategy="no")
    rows = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "x"} for a in range(5) for b in range(5)]
    reward = RewardTrainer(
        base,
        args=RewardConfig(f"{folder}/reward", max_steps=10, learning_rate=3e-3, **quiet),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
    )
    reward.train()
    reward.save_model()
    args = PPOConfig(
        f"{folder}/policy",
        max_steps=3,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        learning_rate=1e-3,
        **quiet,
    )
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
    return train(base, f"{folder}/reward", prompts, args)


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = smoke_run(folder) if "--smoke" in arguments else full_run(*arguments)
        for log in trainer.state.log_history:
            if "reward" in log:
                print(f"reward={log['reward']:.4f} value={log['critic/value_mean']:.4f} kl={log['kl']:.4f}")
        critic = RewardScorer(f"{trainer.args.output_dir}/critic/value")
        print("values:", *(f"{value:.4f}" for value in critic.score_tokens(["2+2="], ["4"])[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
