"""Train an ensemble of reward models on one base in one run, and score with its mean, worst case and fusion.

    python examples/reward_ensemble.py            # your rankings, see below; for a GPU
    python examples/reward_ensemble.py --smoke    # offline, a tiny model, under a minute on a CPU

A row has a prompt, candidate completions, and a rating for each. The full run reads data/rankings/train.jsonl and
calibration.jsonl. The two files must not share rows.
"""

import sys
import tempfile
from importlib.util import find_spec

from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_ext import RewardEnsemble, RewardEnsembleConfig, RewardEnsembleTrainer


LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def full_run() -> tuple[RewardEnsembleTrainer, list[dict]]:
    args = RewardEnsembleConfig(
        output_dir="outputs/reward_ensemble",
        loss_type="plackett_luce",
        num_members=4,
        data_strategy="bootstrap",  # members share batches, so the layers below the adapters run once
        branch_at=0.75,  # adapters in the last quarter of the layers
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=16,
    )
    trainer = RewardEnsembleTrainer(
        model="Qwen/Qwen3-0.6B",
        args=args,
        train_dataset=load_dataset("json", data_files="data/rankings/train.jsonl", split="train"),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        peft_config=LORA,
    )
    return trainer, load_dataset("json", data_files="data/rankings/calibration.jsonl", split="train").to_list()


def smoke_rows() -> list[dict]:
    """Sums of two digits with three answers: the right one, one that is off by one, and one that is far off."""
    return [
        {
            "prompt": f"{a}+{b}=",
            "completions": [str(a + b + 7), str(a + b), str(a + b + 1)],
            "ratings": [0.0, 2.0, 1.0],
        }
        for a in range(10)
        for b in range(10)
    ]


def smoke_run(folder: str) -> tuple[RewardEnsembleTrainer, list[dict]]:
    from trl_ext.demo.model import tiny_reward_base

    args = RewardEnsembleConfig(
        output_dir=f"{folder}/out",
        loss_type="plackett_luce",
        num_members=3,
        max_steps=20,
        learning_rate=3e-3,
        per_device_train_batch_size=10,
        logging_steps=5,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    rows = smoke_rows()
    trainer = RewardEnsembleTrainer(
        model=tiny_reward_base(f"{folder}/base", hidden_size=32),
        args=args,
        train_dataset=Dataset.from_list([row for number, row in enumerate(rows) if number % 5]),
        peft_config=LORA,
    )
    return trainer, rows[::5]


def main(smoke: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer, held_out = smoke_run(folder) if smoke else full_run()
        trainer.train()
        trainer.save_model()
        print("losses:", *(f"{entry['loss']:.4f}" for entry in trainer.state.log_history if "loss" in entry))

        # the ensemble loads from its folder: one copy of the base, and one pass for all members
        ensemble = RewardEnsemble(trainer.args.output_dir)
        flat = [(row["prompt"], text) for row in held_out for text in row["completions"]]
        ensemble.fit_normalizer([prompt for prompt, _ in flat], [text for _, text in flat])

        ways = {"worst case": dict(reduce="min"), "mean - std": dict(reduce="mean_minus_std", coefficient=1.0)}
        if find_spec("sklearn") is None:
            print("fusion: left out (pip install 'trl-ext[fusion]')")
        else:  # fit the members' weights on held-out preferences
            pairs = [(row["prompt"], *_best_and_worst(row)) for row in held_out]
            weights = ensemble.fit_fusion(*(list(column) for column in zip(*pairs, strict=True)))
            print("fusion:", *(f"{weight:.3f}" for weight in weights))
            ways = {"fusion": dict(reduce="fusion", weights=weights), **ways}

        candidates = ["7", "8", "14"]
        prompts = ["3+4="] * len(candidates)
        members = ensemble.score_members(prompts, candidates)
        for name, settings in ways.items():
            ensemble.set_reducer(**settings)
            print(f"{name}:", *(f"{score:+.3f}" for score in ensemble.combine(members)))
        ensemble.set_reducer("mean")
        for candidate, (reward, lower, upper) in zip(
            candidates, ensemble.score_with_interval(prompts, candidates), strict=True
        ):
            print(f"3+4={candidate}  {reward:+.3f}  members from {lower:+.3f} to {upper:+.3f}")


def _best_and_worst(row: dict) -> tuple[str, str]:
    ranked = sorted(zip(row["ratings"], row["completions"], strict=True))
    return ranked[-1][1], ranked[0][1]


if __name__ == "__main__":
    main(smoke="--smoke" in sys.argv[1:])
