"""Train a policy on K-way rankings with LoRA, without a reward model (DPO with the Plackett-Luce loss).

    python examples/ranked_dpo.py            # your rankings, see below; for a GPU
    python examples/ranked_dpo.py --smoke    # offline, a tiny model, under a minute on a CPU

A row has a prompt, any number of completions, and a rating for each (higher is better; equal ratings are a tie). You
can also give `ranks`, where lower is better. The full run reads data/rankings/train.jsonl.
"""

import sys
import tempfile

from datasets import Dataset, load_dataset
from peft import LoraConfig

from trl_ext import RankedDPOConfig, RankedDPOTrainer


LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def full_run() -> RankedDPOTrainer:
    args = RankedDPOConfig(
        output_dir="outputs/ranked_dpo",
        loss_type="plackett_luce",
        learning_rate=1e-5,
        per_device_train_batch_size=4,  # prompts, each with all its completions
        gradient_accumulation_steps=4,
    )
    dataset = load_dataset("json", data_files="data/rankings/train.jsonl", split="train")
    return RankedDPOTrainer("Qwen/Qwen3-0.6B", args=args, train_dataset=dataset, peft_config=LORA)


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


def smoke_run(folder: str) -> RankedDPOTrainer:
    from trl_ext.demo.model import tiny_model, tiny_tokenizer

    tiny_model(hidden_size=32).save_pretrained(f"{folder}/base")
    tiny_tokenizer().save_pretrained(f"{folder}/base")
    args = RankedDPOConfig(
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
    rows = Dataset.from_list(smoke_rows())
    return RankedDPOTrainer(f"{folder}/base", args=args, train_dataset=rows, peft_config=LORA)


def main(smoke: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = smoke_run(folder) if smoke else full_run()
        trainer.train()
        trainer.save_model()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        print("losses:", *(f"{entry['loss']:.4f}" for entry in logs))
        print("pairs in the right order:", *(f"{entry['rewards/accuracies']:.3f}" for entry in logs))


if __name__ == "__main__":
    main(smoke="--smoke" in sys.argv[1:])
