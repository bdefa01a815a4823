"""Label in rounds: train a reward model, choose the rows that teach it most, have them labelled, train again.

    python examples/active_choice.py            # your pool, see below; for a GPU
    python examples/active_choice.py --smoke    # offline, a tiny model, an exact annotator

A row of the pool has a prompt and two or more completions, or `chosen` and `rejected`. The full run reads
data/pool/train.jsonl; replace `annotate` by what sends rows to your annotators and waits for their ranks.
"""

import sys
import tempfile

from datasets import Dataset, concatenate_datasets, load_dataset
from peft import LoraConfig

from trl_ext import RewardConfig, RewardScorer, RewardTrainer, choose


LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
ADDED = ["choice_order", "choice_value", "choice_row"]


def annotate(rows: Dataset) -> Dataset:
    raise NotImplementedError("Send the rows to your annotators; return them with `ratings` (or `ranks`).")


def full_run() -> dict:
    pool = load_dataset("json", data_files="data/pool/train.jsonl", split="train")
    training = dict(output_dir="outputs/active_choice", num_train_epochs=1, per_device_train_batch_size=4)
    return dict(model="Qwen/Qwen3-0.6B", pool=pool, annotate=annotate, training=training, rounds=4, batch=500)


def smoke_run(folder: str) -> dict:
    """Sums of two digits: the annotator rates the right one higher than one that is far off."""
    from trl_ext.demo.model import tiny_reward_base

    sums = [(a, b) for a in range(10) for b in range(10)]
    pool = Dataset.from_list(
        [{"prompt": f"{a}+{b}=", "completions": [str(a + b), str((a * 7 + b * 3) % 40)]} for a, b in sums]
    )

    def by_sum(rows: Dataset) -> Dataset:
        def rate(row: dict) -> dict:
            a, b = row["prompt"].rstrip("=").split("+")
            return {"ratings": [-float(abs(int(a) + int(b) - int(answer))) for answer in row["completions"]]}

        return rows.map(rate)

    training = dict(
        output_dir=f"{folder}/out",
        max_steps=5,
        learning_rate=3e-3,
        per_device_train_batch_size=8,
        logging_steps=5,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    model = tiny_reward_base(f"{folder}/base", hidden_size=32)
    return dict(model=model, pool=pool, annotate=by_sum, training=training, rounds=3, batch=8)


def main(smoke: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = smoke_run(folder) if smoke else full_run()
        pool, labelled, scorer = run["pool"], None, None
        for number in range(run["rounds"]):
            # nothing is known before the first round
            strategy = "random" if scorer is None else "fisher"
            chosen = choose(scorer, pool, run["batch"], strategy)
            new = run["annotate"](chosen.remove_columns(ADDED))
            labelled = new if labelled is None else concatenate_datasets([labelled, new])
            taken = set(chosen["choice_row"])
            pool = pool.select([row for row in range(len(pool)) if row not in taken])

            args = RewardConfig(loss_type="plackett_luce", **run["training"])
            trainer = RewardTrainer(model=run["model"], args=args, train_dataset=labelled, peft_config=LORA)
            trainer.train()
            trainer.save_model()
            scorer = RewardScorer(args.output_dir)
            about = scorer.fit_uncertainty(labelled)  # so that the next choice knows what is labelled
            value = sum(chosen["choice_value"]) / len(chosen)
            print(
                f"round {number}: {strategy}, {len(labelled)} labelled, {len(pool)} left, mean value {value:.3f}, "
                f"prior precision {about['prior_precision']:.3g}"
            )


if __name__ == "__main__":
    main(smoke="--smoke" in sys.argv[1:])
