"""Run by `test_callback.py`, alone or in two processes: training with `EvaluationCallback`. The first prints JSON."""

import json
import os
import sys
from pathlib import Path

from accelerate.utils import gather_object
from datasets import Dataset

from tests.tiny import pair_rows
from tests.trainers.helpers import config, history, leave_together, trainer_for
from trl_ext import EvaluationCallback


NAME = "eval_probe_pair_accuracy"


def main(base: Path, folder: Path) -> dict:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = config(
        folder,
        per_device_train_batch_size=4 // processes,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model=NAME,
        max_steps=2,
        train_sampling_strategy="sequential",
    )
    callback = EvaluationCallback(pair_rows(16, seed=1), metrics=["pair_accuracy"], resamples=20)
    data = Dataset.from_list(pair_rows(4, seed=2))
    trainer = trainer_for(base, args, pair_rows(8), eval_dataset=data, callbacks=[callback])
    trainer.train()
    told = {"processes": processes, "history": history(trainer, NAME), "best": trainer.state.best_metric}
    told["ranks"] = gather_object([history(trainer, NAME)])
    if trainer.is_world_process_zero():
        print("RESULT " + json.dumps(told), flush=True)
    return told


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_together(Path(sys.argv[2]))
