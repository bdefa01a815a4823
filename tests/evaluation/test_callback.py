"""`EvaluationCallback` in a real `RewardTrainer` on a tiny model, alone and in two processes."""

import os
from pathlib import Path

import pytest
import trl
from accelerate.utils import gather_object
from datasets import Dataset
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.utils import filter_repo_objects

from tests.program import TORCHRUN, run_program
from tests.tiny import pair_rows, save_tiny_model
from tests.trainers.helpers import config, history, trainer_for
from trl_ext import EvaluationCallback, evaluate_reward_model
from trl_ext.scoring import RewardScorer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base") / "llama", "llama")


def test_the_numbers_are_logged_and_choose_the_best_model(base, tmp_path):
    rows, held_out = pair_rows(16), pair_rows(24, seed=1)
    args = config(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_probe_pair_accuracy",
        greater_is_better=True,
        learning_rate=5e-3,
    )
    callback = EvaluationCallback(held_out, metrics=["pair_accuracy", "length_accuracy"], resamples=20)
    trainer = trainer_for(base, args, rows, eval_dataset=Dataset.from_list(held_out), callbacks=[callback])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_probe_pair_accuracy" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3]
    values = [entry["eval_probe_pair_accuracy"] for entry in logged]
    assert trainer.state.best_metric == max(values)
    assert set(logged[0]) == {"eval_probe_pair_accuracy", "eval_probe_length_accuracy", "epoch", "step"}
    # what was logged is the accuracy of the model that was saved then
    report = evaluate_reward_model(str(tmp_path / "checkpoint-3"), held_out, probes=False, resamples=20, device="cpu")
    assert values[2] == report.metrics["pair_accuracy"]
    best = values.index(max(values)) + 1
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert values[best - 1] == pytest.approx(accuracy_of(trainer, held_out))
    # evaluated again after training: the best model, whose step is the last one's
    assert trainer.evaluate()["eval_probe_pair_accuracy"] == values[best - 1]


def accuracy_of(trainer, rows):
    scorer = RewardScorer(trainer.model, trainer.processing_class)
    return evaluate_reward_model(scorer, rows, probes=False, resamples=20).metrics["pair_accuracy"]


def test_two_data_sets_of_a_trainer_are_one_evaluation(base, tmp_path, monkeypatch):
    held_out = pair_rows(8, seed=1)
    callback = EvaluationCallback(held_out, metrics=["accuracy"], resamples=20)
    args = config(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=1)
    sets = {"one": Dataset.from_list(pair_rows(4)), "two": Dataset.from_list(pair_rows(4, seed=2))}
    trainer = trainer_for(base, args, pair_rows(8), eval_dataset=sets, callbacks=[callback])
    evaluated = []
    run = callback._evaluate
    monkeypatch.setattr(callback, "_evaluate", lambda *given: evaluated.append(1) or run(*given))
    metrics = trainer.evaluate()
    assert len(evaluated) == 1
    assert {"eval_one_loss", "eval_two_loss", "eval_probe_accuracy"} <= set(metrics)
    trainer.evaluate()
    assert len(evaluated) == 2


def test_a_trainer_of_trl_keeps_the_numbers_in_its_history(base, tmp_path):
    callback = EvaluationCallback(pair_rows(8, seed=1), metrics=["accuracy"], resamples=20)
    args = config(tmp_path, trl.RewardConfig, eval_strategy="no")
    trainer = trainer_for(
        base, args, pair_rows(8), trl.RewardTrainer, eval_dataset=Dataset.from_list(pair_rows(4)), callbacks=[callback]
    )
    assert "eval_probe_accuracy" in trainer.evaluate()
    assert "eval_probe_accuracy" in trainer.state.log_history[-1]
    callback.follow(trainer)
    trainer.evaluate()
    assert "eval_probe_accuracy" in trainer.state.log_history[-1]


def test_what_cannot_be_evaluated_is_refused(base, tmp_path):
    with pytest.raises(TypeError, match="is an iterator"):
        EvaluationCallback(row for row in pair_rows(4))
    for wrong in ({"max_lenght": 8}, {"base_model": "x"}):
        with pytest.raises(TypeError, match=f"EvaluationCallback got {[*wrong]}".replace("[", r"\[")):
            EvaluationCallback(pair_rows(4), **wrong)
    callback = EvaluationCallback(pair_rows(4), metrics=["accuracies"], resamples=20)
    trainer = trainer_for(
        base, config(tmp_path), pair_rows(8), eval_dataset=Dataset.from_list(pair_rows(4)), callbacks=[callback]
    )
    with pytest.raises(ValueError, match=r"\['accuracies'\]; these rows have accuracy"):
        trainer.evaluate()


def test_options_of_the_scorer_reach_it(base, tmp_path):
    held_out = pair_rows(8, seed=1)
    data = Dataset.from_list(pair_rows(4))
    callback = EvaluationCallback(held_out, metrics=["margin"], resamples=20, max_length=6)
    trainer = trainer_for(base, config(tmp_path), pair_rows(8), eval_dataset=data, callbacks=[callback])
    found = trainer.evaluate()["eval_probe_margin"]
    cut = RewardScorer(trainer.model, trainer.processing_class, max_length=6)
    assert found == pytest.approx(evaluate_reward_model(cut, held_out, probes=False, resamples=20).metrics["margin"])
    assert cut.num_truncated > 0


def test_a_card_written_anew_keeps_its_evaluation(base, tmp_path):
    trainer = trainer_for(base, config(tmp_path), pair_rows(8))
    trainer.create_model_card()
    report = evaluate_reward_model(lambda prompts, completions, **columns: [1.0] * len(completions), pair_rows(4))
    report.update_model_card(tmp_path)
    trainer.create_model_card(model_name="mine")
    card = Path(tmp_path, "README.md").read_text()
    assert card.count("Results of") == 1


def test_the_evaluation_is_pushed_with_the_model(base, tmp_path, monkeypatch):
    """The Hub's two calls are replaced; what they get is what would leave the machine."""
    pushed = {}

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **kwargs):
        names = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        pushed[repo_id] = {
            name: Path(folder_path, name).read_bytes()
            for name in filter_repo_objects(names, ignore_patterns=ignore_patterns)
        }

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **kwargs: RepoUrl(f"https://huggingface.co/{name}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    trainer = trainer_for(base, config(tmp_path, hub_model_id="me/reward"), pair_rows(8))
    trainer.save_model()
    report = evaluate_reward_model(str(tmp_path), pair_rows(8, seed=1), probes=False, resamples=20, device="cpu")
    report.update_model_card(tmp_path)
    trainer.push_to_hub()
    card = pushed["me/reward"]["README.md"].decode()
    assert card.count("## Evaluation") == 1
    assert f"| pair_accuracy | {report.metrics['pair_accuracy']:.3g} |" in card
    assert 'RewardScorer("me/reward")' in card  # written anew for the repository, around the section
    assert {"reward_model.json", "model.safetensors"} <= pushed["me/reward"].keys()


NAME = "eval_probe_pair_accuracy"


def train(folder, base):
    """What a training in this process, or in this and another one, logs and picks."""
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
    trainer = trainer_for(Path(base), args, pair_rows(8), eval_dataset=data, callbacks=[callback])
    trainer.train()
    told = {"processes": processes, "history": history(trainer, NAME), "best": trainer.state.best_metric}
    return told | {"ranks": gather_object([history(trainer, NAME)])}


def test_two_processes_agree_and_do_not_wait_for_each_other(base, tmp_path):
    one = train(tmp_path / "one", base)
    two = run_program(train, tmp_path / "two", base, launcher=TORCHRUN, timeout=180)
    assert two["processes"] == 2
    assert two["best"] == max(two["history"])
    assert two["ranks"][0] == two["ranks"][1] == two["history"]
    assert len(one["history"]) == len(two["history"]) == 2
    assert one["history"] == pytest.approx(two["history"], abs=0.05)
