"""What a run says when it starts, and which metrics a command's terminal shows."""

import logging

import pytest
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback

from tests.tiny import pair_rows
from tests.trainers.helpers import config, lora, trainer_for
from trl_ext import ORMConfig, ORMTrainer, RewardEnsembleConfig, RewardEnsembleTrainer, WeakToStrongConfig
from trl_ext.trainers.common.console import ShortPrinterCallback, important, show_important_metrics
from trl_ext.trainers.weak_to_strong.trainer import WeakToStrongTrainer


OUTCOMES = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}", "label": n % 2 == 0} for n in range(8)]


def starts(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if " starts\n" in record.getMessage()]


def test_a_reward_trainer_says_once_what_it_trains_and_how(base, tmp_path, caplog):
    rows = [*pair_rows(16), {"chosen": "long " * 400, "rejected": "a"}]
    args = config(tmp_path, max_steps=1, gradient_accumulation_steps=2, max_length=64, center_rewards_coefficient=0.1)
    trainer = trainer_for(base, args, rows, peft_config=lora())
    with caplog.at_level(logging.INFO, "trl_ext"):
        trainer.train()
        trainer.train()
    [text] = starts(caplog)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    facts = dict(line.strip().split("  ", 1) for line in text.splitlines()[1:])
    facts = {name.strip(): fact.strip() for name, fact in facts.items()}
    assert text.startswith("RewardTrainer starts")
    assert facts["model"] == f"LlamaForSequenceClassification from {base}, adapter: LORA, rank 4"
    assert facts["trained"].startswith(f"{trained:,} of ")
    assert facts["head"] == "score: 1 output, trained and saved in float32"
    assert facts["precision"] == "float32 weights, trained in float32, autocast: none"
    assert facts["shared prefix"].startswith("on: flat and padded hidden states differ by at most")
    assert facts["data"] == "train: 16 of 17 rows kept"
    assert facts["loss"] == "bradley_terry (center_rewards_coefficient=0.1)"
    assert facts["batch"] == "4 rows x 2 accumulated x 1 processes = 8 rows for each step"
    assert facts["metrics"] == f"trainer_state.json in {tmp_path}"


def test_the_other_trainers_say_it_too(base, tmp_path, caplog):
    orm = trainer_for(base, config(tmp_path, ORMConfig, max_steps=1, shared_prefix=False), OUTCOMES, ORMTrainer)
    ensemble = trainer_for(
        base,
        config(tmp_path, RewardEnsembleConfig, max_steps=1, num_members=2),
        trainer_class=RewardEnsembleTrainer,
        peft_config=lora(),
    )
    texts = Dataset.from_list([{"prompt": "2 + 2 =", "completion": " 4"}] * 4)
    args = config(tmp_path, WeakToStrongConfig, max_steps=1, kd_schedule="linear")
    student = WeakToStrongTrainer(str(base), str(base), args, train_dataset=texts)
    with caplog.at_level(logging.INFO, "trl_ext"):
        for trainer in (orm, ensemble, student):
            trainer.train()
    first, second, third = starts(caplog)
    assert "bce" in first and "averaged over" in first and "off: shared_prefix=False" in first
    assert "2 adapters: LORA, rank 4" in second
    assert "cross-entropy to the data + 1 (linear) x KL(weak || strong)" in third and f"teacher    {base}" in third


@pytest.mark.parametrize("prefix", ["", "eval_"])
def test_a_terminal_shows_the_metrics_that_tell_most(prefix):
    names = ["loss", "accuracy", "margin", "kendall_tau", "ndcg", "length_accuracy", "grad_norm", "min_reward"]
    logs = {**{f"{prefix}{name}": 1.0 for name in names}, "epoch": 0.5}
    assert list(important(logs)) == [
        *(f"{prefix}{name}" for name in ("loss", "accuracy", "margin", "grad_norm", "length_accuracy")),
        "epoch",
    ]
    few = {"loss": 1.0, "ndcg": 2.0, "epoch": 1.0}
    assert important(few) == few
    unknown = {f"mine_{number}": 1.0 for number in range(9)}
    assert important(unknown) == unknown


def test_what_the_terminal_leaves_out_is_kept(base, tmp_path, capsys):
    trainer = trainer_for(base, config(tmp_path, max_steps=1))
    trainer.add_callback(PrinterCallback)
    show_important_metrics(trainer)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert ShortPrinterCallback in kinds and PrinterCallback not in kinds and ProgressCallback not in kinds
    trainer.train()
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "ndcg" not in shown
    assert "ndcg" in trainer.state.log_history[0]
