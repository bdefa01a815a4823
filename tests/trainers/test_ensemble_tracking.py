"""What an ensemble's evaluation tells Weights & Biases, read from an offline run."""

import json
import os
import subprocess
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig

from tests.tiny import ranked_rows
from tests.trainers.helpers import config, trainer_for
from tests.trainers.test_tracking import points_of, records_of
from trl_ext import RewardEnsembleConfig, RewardEnsembleTrainer


ROOT = Path(__file__).resolve().parents[2]


def evaluate(base: str, folder: str) -> None:
    """Run in a process of its own, at whose end the run's file is complete."""
    kwargs = {"num_members": 2, "loss_type": "plackett_luce", "report_to": "wandb", "max_grad_norm": 0.75}
    args = config(Path(folder, "out"), RewardEnsembleConfig, **kwargs)
    data, peft = Dataset.from_list(ranked_rows(15, k=3)), LoraConfig(target_modules=["q_proj"], r=2)
    trainer = trainer_for(base, args, ranked_rows(8, k=3), RewardEnsembleTrainer, peft_config=peft, eval_dataset=data)
    trainer.train()
    assert trainer.args.max_grad_norm == 0.75
    trainer.evaluate()


def test_disagreement_is_logged_as_histogram_and_by_decile_and_the_config_as_given(base, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    code = f"from tests.trainers.test_ensemble_tracking import evaluate; evaluate({str(base)!r}, {str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    (files,) = (tmp_path / "wandb").glob("offline-run-*/files")
    (point,) = [point for point in points_of(files) if "disagreement_histogram" in str(sorted(point))]
    assert any("disagreement_deciles" in name for name in point)
    assert list(files.rglob("*disagreement_deciles*.table.json"))
    noted = [update for record in records_of(files) if record.HasField("config") for update in record.config.update]
    assert {json.loads(update.value_json) for update in noted if update.key == "max_grad_norm"} == {0.75}
