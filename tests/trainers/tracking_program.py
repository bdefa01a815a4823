"""Run by `test_tracking.py` in a process of its own: trainers that report to W&B offline. Prints JSON.

W&B keeps one run per process and TRL decides at import whether it is there, so none of this can run inside pytest.
"""

import json
import sys
import warnings
from pathlib import Path

import wandb
from datasets import Dataset
from wandb.sdk.wandb_run import Run

from tests.tiny import pair_rows, save_tiny_model
from tests.trainers.helpers import config, trainer_for
from trl_ext.trainers.common import tracking


def main(folder: Path) -> dict:
    base = save_tiny_model(folder / "base")
    steps_given: list = []
    log = Run.log

    def watched(run, data, step=None, commit=None):
        steps_given.append(step)
        return log(run, data, step=step, commit=commit)

    Run.log = watched

    def trainer(name, **kwargs):
        args = config(
            folder / name,
            run_name=name,
            report_to="wandb",
            eval_strategy="steps",
            eval_steps=2,
            log_table_size=3,
            save_strategy="steps",
            save_steps=2,
            **kwargs,
        )
        return trainer_for(base, args, eval_dataset=Dataset.from_list(pair_rows(9)))

    told: dict = {"stages": [], "user": {}, "failures": {}}

    # three stages in one process
    first = None
    for name in ("one", "two", "three"):
        stage = trainer(name)
        stage.train()
        run = wandb.run
        stage.evaluate()
        stage.predict(Dataset.from_list(pair_rows(4)))
        told["stages"].append(
            {
                "name": run.name,
                "group": run.group,
                "id": run.id,
                "same_run_after_training": wandb.run is run,
                "directory": run.dir,
                "history": list(stage.state.log_history),
            }
        )
        first = first or stage
        del stage  # the next trainer may get its address
    third = wandb.run.id
    first.evaluate()  # an earlier trainer is used again: its own run, not that of the third
    told["again"] = {"id": wandb.run.id, "third": third, "directory": wandb.run.dir}

    # a run that the user opened
    wandb.finish()
    mine = wandb.init(project="mine", name="by hand")
    for name in ("four", "five"):
        trainer(name).train()
        told["user"][name] = wandb.run is mine
    mine.log({"after": 1.0})  # raises if it was closed
    told["user"]["directory"] = mine.dir
    mine.finish()

    # failures: of logging, of opening, of a missing package
    def fails(*args, **kwargs):
        raise OSError("no space left")

    messages: list[str] = []
    tracking.logger.warning = lambda message, *args: messages.append(message)
    Run.log = fails
    failing = trainer("six")
    failing.train()
    told["failures"]["log"] = {"steps": failing.state.global_step, "messages": messages.copy()}
    Run.log = watched
    wandb.finish()

    messages.clear()
    init, wandb.init = wandb.init, fails
    failing = trainer("seven")
    failing.train()
    told["failures"]["init"] = {
        "steps": failing.state.global_step,
        "messages": messages.copy(),
        "report_to": failing.args.report_to,
    }
    wandb.init = init

    messages.clear()
    tracking.is_wandb_available = lambda: False
    missing = trainer("eight")
    missing.train()
    told["failures"]["missing"] = {
        "steps": missing.state.global_step,
        "messages": messages.copy(),
        "report_to": missing.args.report_to,
        "run": wandb.run is not None,
    }
    tracking.is_wandb_available = lambda: True

    last = trainer("last")
    last.train()  # and the program ends
    told["last"] = {"directory": wandb.run.dir}
    told["steps_given"] = sorted({str(step) for step in steps_given})
    told["points"] = len(steps_given)
    return told


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print("RESULT " + json.dumps(main(Path(sys.argv[1]))))
