"""A GRPO script with another class: rounds of sampling, selection by a reward, and supervised fine-tuning.

    python examples/rejection_sampling.py            # GSM8K with a verifier; for a GPU
    python examples/rejection_sampling.py --smoke    # offline, a tiny model that learns to write vowels

After an interruption, run it again to continue. For a random control set `selection="random_per_prompt"`.
"""

import sys
import tempfile

from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl.rewards import accuracy_reward

from trl_ext import RejectionSamplingConfig, RejectionSamplingTrainer  # was: trl's GRPOConfig and GRPOTrainer


def full_run() -> RejectionSamplingTrainer:
    def prepare(row: dict) -> dict:
        question = row["question"] + "\nPut the answer in \\boxed{}."
        solution = "\\boxed{" + row["answer"].split("#### ")[1] + "}"
        return {"prompt": [{"role": "user", "content": question}], "solution": solution}

    rows = load_dataset("openai/gsm8k", "main").map(prepare, remove_columns=["question", "answer"])
    args = RejectionSamplingConfig(
        output_dir="outputs/rejection_sampling",
        num_rounds=3,
        num_generations=8,
        max_completion_length=512,
        temperature=0.8,
        selection="budget_by_difficulty",  # right solutions of questions that are neither always nor never solved
        selection_kwargs={"min_score": 1.0, "n": 4},
        num_train_epochs=1,
        learning_rate=1e-4,
        report_to="wandb",
    )
    return RejectionSamplingTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=accuracy_reward,  # needs math-verify: pip install "trl-ext[math]"
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"].select(range(200)),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )


def share_of_vowels(prompts: list[str], completions: list[str], **kwargs) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / 12 for text in completions]


def smoke_run(folder: str) -> RejectionSamplingTrainer:
    from trl_ext.demo.model import tiny_reward_base

    args = RejectionSamplingConfig(
        output_dir=f"{folder}/out",
        num_rounds=2,
        num_generations=8,
        max_completion_length=12,
        generation_batch_size=256,
        max_steps=12,
        learning_rate=5e-3,
        per_device_train_batch_size=16,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    rows = Dataset.from_list([{"prompt": f"say {number}:"} for number in range(32)])
    model = tiny_reward_base(f"{folder}/base", hidden_size=32)
    # evaluated on the training prompts: a smoke run does not test generalisation
    return RejectionSamplingTrainer(model, share_of_vowels, args, train_dataset=rows, eval_dataset=rows)


def main(smoke: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = smoke_run(folder) if smoke else full_run()
        trainer.train()
        print("rewards:", *(f"{row['eval_reward']:.4f}" for row in trainer.history))
        for row in trainer.history[1:]:
            means = f"{row['reward']:.4f}, of selected samples {row['selected_reward']:.4f}"
            print(f"round {row['round']}: kept {row['rows']} rows, mean reward of all samples {means}")


if __name__ == "__main__":
    main(smoke="--smoke" in sys.argv[1:])
