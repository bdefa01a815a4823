"""Run by `test_ensemble_processes.py`, alone or in two processes: trains and saves ensembles; prints JSON."""

import json
import os
import sys
from pathlib import Path

from datasets import Dataset

from tests.tiny import ranked_rows
from tests.trainers.helpers import config, history, leave_together, lora, trainer_for
from trl_ext import RewardEnsembleConfig, RewardEnsembleTrainer


RUNS = {
    "shuffle": {},
    "bootstrap": {"gradient_accumulation_steps": 2, "branch_at": 0.5, "gradient_checkpointing": True},
}


def main(base: Path, folder: Path) -> dict:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    told: dict = {"processes": processes}
    for strategy, kwargs in RUNS.items():
        args = config(
            folder / strategy,
            RewardEnsembleConfig,
            num_members=3,
            data_strategy=strategy,
            loss_type="plackett_luce",
            max_steps=5,
            max_grad_norm=0.1,
            per_device_train_batch_size=4 // processes,
            **({"train_sampling_strategy": "sequential"} if strategy != "shuffle" else {}),
            **kwargs,
        )
        rows = ranked_rows(24, k=4, ragged=True, ties=True)
        data = Dataset.from_list(ranked_rows(9, k=4, ragged=True, seed=3))
        trainer = trainer_for(base, args, rows, RewardEnsembleTrainer, eval_dataset=data, peft_config=lora())
        trainer.train()
        trainer.save_model()
        evaluation = trainer.evaluate()
        names = [f"{what}_member_{member}" for what in ("loss", "accuracy") for member in range(3)]
        told[strategy] = {name: history(trainer, name) for name in ("loss", "accuracy", *names)}
        told[strategy]["evaluation"] = [evaluation[f"eval_{n}"] for n in ("loss", "accuracy", "disagreement", *names)]
    if trainer.is_world_process_zero():
        print("RESULT " + json.dumps(told), flush=True)
    return told


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_together(Path(sys.argv[2]))
