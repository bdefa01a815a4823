"""What an ensemble's evaluation tells Weights & Biases, read from an offline run."""

import json
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig

from tests.tiny import ranked_rows
from tests.trainers.common.test_tracking import points_of, records_of
from tests.trainers.helpers import config, run_offline_wandb, trainer_for
from trl_ext import RewardEnsembleConfig, RewardEnsembleTrainer


def evaluate(base: str, folder: str) -> None:
    """Run in a process of its own, at whose end the run's file is complete."""
    kwargs = {"num_members": 2, "loss_type": "plackett_luce", "report_to": "wandb", "max_grad_norm": 0.75}
    args = config(Path(folder, "out"), RewardEnsembleConfig, **kwargs)
    data, peft = Dataset.from_list(ranked_rows(15, k=3)), LoraConfig(target_modules=["q_proj"], r=2)
    trainer = trainer_for(base, args, ranked_rows(8, k=3), RewardEnsembleTrainer, peft_config=peft, eval_dataset=data)
    trainer.train()
    assert trainer.args.max_grad_norm == 0.75
    print("RESULT", json.dumps(trainer.evaluate()), flush=True)


def test_disagreement_is_logged_as_histogram_and_by_decile_and_the_config_as_given(base, tmp_path):
    program = "from tests.trainers.common.test_ensemble_tracking import evaluate; evaluate({!r}, {!r})"
    run_offline_wandb(tmp_path, "-c", program.format(str(base), str(tmp_path)))
    (files,) = (tmp_path / "wandb").glob("offline-run-*/files")
    (point,) = [point for point in points_of(files) if "disagreement_histogram" in str(sorted(point))]
    assert any("disagreement_deciles" in name for name in point)
    assert list(files.rglob("*disagreement_deciles*.table.json"))
    noted = [update for record in records_of(files) if record.HasField("config") for update in record.config.update]
    assert {json.loads(update.value_json) for update in noted if update.key == "max_grad_norm"} == {0.75}
