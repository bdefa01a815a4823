"""Run by `test_token_processes.py`, alone or in two processes: training, saving, evaluation. The first prints JSON."""

import json
import os
import sys
from pathlib import Path

from datasets import Dataset

from tests.trainers.helpers import history, leave_together, lora
from tests.trainers.process_program import without_time
from tests.trainers.table import KINDS, token_trainer


def main(base: Path, folder: Path) -> dict:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    told: dict = {"processes": processes}
    for kind, (_, _, make_rows) in KINDS.items():
        data = Dataset.from_list(make_rows(9, seed=3))
        trainer = token_trainer(
            kind,
            base,
            folder / kind,
            make_rows(24),
            data,
            max_steps=3,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=4 // processes,
            gradient_accumulation_steps=2,
            averaging="sequence" if kind == "segment" else "token",
            optim="sgd",
            learning_rate=1e-2,
            trainer_kwargs={"peft_config": lora() if kind == "prm" else None},
        )
        trainer.train()
        trainer.save_model()
        metrics = ("loss", "grad_norm", "accuracy", "num_tokens")
        told[kind] = {metric: history(trainer, metric) for metric in metrics}
        told[kind]["evaluations"] = []
        for size, shards in ((1, 1), (2, 2), (8, 3)):
            trainer.args.per_device_eval_batch_size = size
            stream = data.to_iterable_dataset(num_shards=shards)
            told[kind]["evaluations"].append(without_time(trainer.evaluate()))
            told[kind]["evaluations"].append(without_time(trainer.evaluate(stream)))
        told[kind]["predictions"] = trainer.predict(data).predictions.flatten().tolist()
    if trainer.is_world_process_zero():
        print("RESULT " + json.dumps(told), flush=True)
    return told


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_together(Path(sys.argv[2]))
