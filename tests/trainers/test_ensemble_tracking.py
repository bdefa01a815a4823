"""What an ensemble's evaluation tells Weights & Biases, read from an offline run."""

import wandb
from datasets import Dataset
from peft import LoraConfig

from tests.tiny import ranked_rows
from tests.trainers.helpers import config, trainer_for
from tests.trainers.test_tracking import points_of
from trl_ext import RewardEnsembleConfig, RewardEnsembleTrainer


def test_disagreement_is_logged_as_histogram_and_by_decile(base, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_DISABLED")
    run = wandb.init(mode="offline", dir=str(tmp_path), project="testing")
    try:
        args = config(tmp_path / "out", RewardEnsembleConfig, num_members=2, loss_type="plackett_luce")
        data = Dataset.from_list(ranked_rows(15, k=3))
        peft = LoraConfig(target_modules=["q_proj"], r=2)
        trainer = trainer_for(
            base, args, ranked_rows(8, k=3), RewardEnsembleTrainer, peft_config=peft, eval_dataset=data
        )
        trainer.args.report_to = ["wandb"]
        trainer.evaluate()
        folder = run.dir
        print("RT", trainer.args.report_to, wandb.run, trainer._disagreements)
    finally:
        run.finish()
    points = points_of(folder)
    print("PTS", [sorted(p) for p in points], folder)
    (point,) = [point for point in points if "eval/disagreement_histogram" in str(sorted(point))]
    assert any("disagreement_deciles" in name for name in point)
    tables = list((tmp_path / "wandb").rglob("*disagreement_deciles*.table.json"))
    assert len(tables) == 1
