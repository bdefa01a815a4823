"""Run by `test_ensemble_processes.py`, alone or in two processes: trains and saves ensembles; prints JSON."""

import json
import os
import sys
from pathlib import Path

from datasets import Dataset

from tests.tiny import ranked_rows
from tests.trainers.helpers import config, history, leave_together, lora, trainer_for
from tests.trainers.table import step_rows
from trl_ext import PRMEnsembleConfig, PRMEnsembleTrainer, RewardEnsembleConfig, RewardEnsembleTrainer


GROUPS = (
    RewardEnsembleTrainer,
    RewardEnsembleConfig,
    lambda n, seed=0: ranked_rows(n, k=4, ragged=True, ties=True, seed=seed),
)
STEPS = (PRMEnsembleTrainer, PRMEnsembleConfig, step_rows)
RUNS = {
    "shuffle": (GROUPS, {"loss_type": "plackett_luce"}),
    "bootstrap": (
        GROUPS,
        {
            "loss_type": "plackett_luce",
            "gradient_accumulation_steps": 2,
            "branch_at": 0.5,
            "gradient_checkpointing": True,
        },
    ),
    "steps, shuffle": (STEPS, {}),
    "steps, bootstrap": (STEPS, {"gradient_accumulation_steps": 2, "branch_at": 0.5}),
}
TIMES = ("runtime", "samples_per_second", "steps_per_second", "epoch")


def main(base: Path, folder: Path) -> dict:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    told: dict = {"processes": processes}
    for name, ((trainer_class, config_class, make_rows), kwargs) in RUNS.items():
        strategy = name.split()[-1]
        args = config(
            folder / name,
            config_class,
            num_members=3,
            data_strategy=strategy,
            max_steps=5,
            max_grad_norm=0.1,
            per_device_train_batch_size=4 // processes,
            **({"train_sampling_strategy": "sequential"} if strategy != "shuffle" else {}),
            **kwargs,
        )
        data = Dataset.from_list(make_rows(9, seed=3))
        trainer = trainer_for(base, args, make_rows(24), trainer_class, eval_dataset=data, peft_config=lora())
        trainer.train()
        trainer.save_model()
        evaluation = trainer.evaluate()
        metrics = [f"{what}_member_{member}" for what in ("loss", "accuracy") for member in range(3)]
        told[name] = {metric: history(trainer, metric) for metric in ("loss", "accuracy", *metrics)}
        told[name]["evaluation"] = {n: v for n, v in evaluation.items() if n.removeprefix("eval_") not in TIMES}
        told[name]["predictions"] = trainer.predict(data).predictions.flatten().tolist()  # members' outputs too
        assert {"eval_loss_member_2", "eval_disagreement"} <= evaluation.keys()
    if trainer.is_world_process_zero():
        print("RESULT " + json.dumps(told), flush=True)
    return told


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_together(Path(sys.argv[2]))
