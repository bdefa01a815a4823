"""Run by `test_processes.py`, alone or in two processes: training, saving, evaluation. The first prints JSON."""

import json
import os
import sys
from pathlib import Path

from accelerate.utils import gather_object
from datasets import Dataset

from tests.tiny import pair_rows, ranked_rows
from tests.trainers.helpers import config, history, leave_together, lora, trainer_for


TIME = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def without_time(metrics):
    return {name: value for name, value in metrics.items() if not name.endswith(TIME)}


def main(base: Path, folder: Path) -> dict:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    told: dict = {"processes": processes}

    runs = {
        "pairs": (pair_rows(24), dict(per_device_train_batch_size=8 // processes), None),
        "rankings": (
            ranked_rows(24, k=4, ragged=True, ties=True),
            dict(per_device_train_batch_size=4 // processes, gradient_accumulation_steps=2, loss_type="plackett_luce"),
            lora(),
        ),
        "by tokens": (  # two epochs of six batches
            ranked_rows(21, k=4, ragged=True, seed=7),
            dict(
                max_tokens_per_batch=190,
                gradient_accumulation_steps=2 // processes,
                loss_type="pairwise",
                max_steps=-1,
                num_train_epochs=2,
            ),
            None,
        ),
    }
    for name, (rows, kwargs, peft) in runs.items():
        defaults = dict(max_steps=6, train_sampling_strategy="sequential", logging_steps=2)
        args = config(folder / name, **(defaults | kwargs))
        data = Dataset.from_list(ranked_rows(9, k=2 if name == "pairs" else 4, ragged=True, seed=3))
        trainer = trainer_for(base, args, rows, eval_dataset=data, peft_config=peft)
        seen: list[list[int]] = []  # rows of each batch of this process
        collator = trainer.data_collator

        def noted(rows, seen=seen, collator=collator):
            seen.append([row["row_index"] for row in rows])
            return collator(rows)

        trainer.data_collator = noted
        trainer.train()
        trainer.data_collator = collator
        trainer.save_model()
        metrics = ("loss", "grad_norm", "accuracy", "kendall_tau", "margin", "min_reward", "mean_reward", "num_tokens")
        told[name] = {metric: history(trainer, metric) for metric in metrics}
        told[name]["rows"] = gather_object([seen])
        told[name]["evaluations"] = []
        for size, shards in ((1, 1), (2, 2), (8, 3)):
            trainer.args.per_device_eval_batch_size = size
            stream = data.to_iterable_dataset(num_shards=shards)
            told[name]["evaluations"].append(without_time(trainer.evaluate()))
            told[name]["evaluations"].append(without_time(trainer.evaluate(stream)))
        told[name]["predictions"] = trainer.predict(data).predictions.tolist()
    if trainer.is_world_process_zero():
        print("RESULT " + json.dumps(told), flush=True)
    return told


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_together(Path(sys.argv[2]))
