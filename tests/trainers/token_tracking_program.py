"""Run by `test_token_tracking.py` in a process of its own: token-level trainers that report to W&B offline."""

import json
import sys
import warnings
from pathlib import Path

import wandb

from tests.tiny import save_tiny_model
from tests.trainers.table import KINDS, token_trainer


def main(folder: Path) -> dict:
    base = save_tiny_model(folder / "base")
    told = {}
    for kind in KINDS:
        trainer = token_trainer(
            kind,
            base,
            folder / kind,
            eval_rows=KINDS[kind][2](9),
            run_name=kind,
            report_to="wandb",
            eval_strategy="steps",
            eval_steps=2,
            log_table_size=3,
            per_device_eval_batch_size=2,
        )
        trainer.train()
        told[kind] = {"name": wandb.run.name, "id": wandb.run.id, "directory": wandb.run.dir}
    return told


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print("RESULT " + json.dumps(main(Path(sys.argv[1]))))
