"""A model makes up tasks from a few seeds, and is fine-tuned on them.

    python examples/self_instruct.py            # a 0.6B base model; for a GPU
    python examples/self_instruct.py --smoke    # offline, a tiny model with random weights, which makes no task

After an interruption, run it again to continue. Needs rapidfuzz: pip install "trl-ext[self-instruct]".
"""

import json
import sys
import tempfile
from pathlib import Path

from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from trl_ext import self_instruct


SEEDS = Path(__file__).resolve().parents[1] / "docs" / "data" / "self_instruct" / "seed_tasks.jsonl"


def main(model: str, folder: str, **options) -> None:
    rows = self_instruct(model, SEEDS, f"{folder}/tasks", style="completion", **options)
    report = json.loads(Path(folder, "tasks", "report.json").read_text())
    print(f"{report['instructions']} instructions, {report['kept']} kept, dropped: {report['dropped']}")
    if len(rows):
        trainer = SFTTrainer(
            model,
            args=SFTConfig(output_dir=f"{folder}/sft", num_train_epochs=2, learning_rate=1e-4),
            train_dataset=rows.select_columns(["prompt", "completion"]),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        )
        trainer.train()
        trainer.save_model()


if __name__ == "__main__":
    if "--smoke" in sys.argv:
        from trl_ext.demo.model import tiny_reward_base

        with tempfile.TemporaryDirectory() as folder:
            base = tiny_reward_base(f"{folder}/base", hidden_size=32)
            main(base, folder, num_tasks=4, max_rounds=1, prompts_per_round=2, max_completion_length=32)
    else:
        main("Qwen/Qwen3-0.6B-Base", "outputs/self_instruct", num_tasks=1000)
