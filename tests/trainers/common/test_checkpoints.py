"""A killed run that resumes ends where an uninterrupted one does; the best checkpoint is what comes back."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import BitsAndBytesConfig

from tests.tiny import pair_rows, ranked_rows, save_tiny_model, tiny_tokenizer
from tests.trainers.helpers import StopAt, config, head_of, history, largest_difference, lora, trainer_for, weights
from trl_ext import (
    RewardEnsemble,
    RewardEnsembleConfig,
    RewardEnsembleTrainer,
    RewardScorer,
    load_reward_model,
)
from trl_ext.models.heads import head_parameters
from trl_ext.models.sidecar import get_sidecar


STEPS = 11


@pytest.mark.parametrize(
    ("peft", "accumulation", "nf4"),
    [(None, 1, False), (lora, 1, False), (lora, 3, False), (lora, 1, True)],
    ids=["full", "lora", "lora, accumulation", "lora on nf4"],
)
def test_kill_and_resume_equals_an_uninterrupted_run(peft, accumulation, nf4, base, tmp_path):
    def make(folder, callbacks=None):
        args = config(
            tmp_path / folder,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            save_strategy="steps",
            save_steps=3,
            loss_type="plackett_luce",
        )
        rows = ranked_rows(18, k=3)  # several epochs: the order of the rows must come back too
        four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32) if nf4 else None
        adapter = None if peft is None else peft()
        return trainer_for(base, args, rows, peft_config=adapter, quantization_config=four_bit, callbacks=callbacks)

    whole = make("whole")
    whole.train()

    killed = make("killed", callbacks=[StopAt(8)])
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    resumed = make("killed")
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == STEPS
    assert history(resumed, "loss") == pytest.approx(history(whole, "loss"), abs=1e-6)
    assert largest_difference(head_of(resumed), head_of(whole)) < 1e-6
    assert largest_difference(weights(resumed), weights(whole)) < 1e-6
    if peft is not None:
        assert any("lora_B" in name for name in weights(resumed))
    moved = largest_difference(weights(whole), weights(make("fresh")))
    assert moved > 1e-3  # what is compared has been trained


@pytest.mark.parametrize("peft", [None, lora], ids=["full", "lora"])
def test_every_checkpoint_is_a_reward_model(peft, base, tmp_path):
    args = config(tmp_path, save_strategy="steps", save_steps=2, max_length=200)
    trainer = trainer_for(base, args, peft_config=None if peft is None else peft())
    trainer.train()
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        content = json.loads((folder / "reward_model.json").read_text())
        assert content["is_adapter"] == (peft is not None)
        assert content["head_modules"] == ["score"]
        assert content["max_length"] == 200
        assert content["training"] == {"loss_type": "bradley_terry", "loss_kwargs": {}}
    loaded = load_reward_model(tmp_path / "checkpoint-4")
    assert get_sidecar(loaded).token_policy == trainer._tokenization.to_dict()
    saved = {name: p for name, p in loaded.named_parameters() if name in weights(trainer)}
    assert largest_difference(saved, weights(trainer)) == 0


def test_what_describes_a_checkpoint_is_pushed_with_its_weights(base, tmp_path):
    """Trainer copies weights to the output folder and pushes that; here is only what it calls before."""
    trainer = trainer_for(base, config(tmp_path, save_strategy="steps", save_steps=4), peft_config=lora())
    trainer.train()
    assert not (tmp_path / "reward_model.json").exists()
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    written = (tmp_path / "reward_model.json").read_text()
    assert written == (tmp_path / "checkpoint-4" / "reward_model.json").read_text()

    args = config(tmp_path / "members", RewardEnsembleConfig, num_members=2, save_strategy="steps", save_steps=4)
    trainer = trainer_for(base, args, trainer_class=RewardEnsembleTrainer, peft_config=lora())
    trainer.train()
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    assert len(RewardEnsemble(tmp_path / "members")(["a"], ["b"])) == 1


EVALUATED = ["loss", "accuracy", "top1_agreement", "kendall_tau", "ndcg", "margin", "mean_reward", "min_reward"]
EVALUATED += ["max_reward", "length_accuracy", "length_correlation"]


@pytest.mark.parametrize("metric", EVALUATED)
def test_the_best_model_by_any_metric_comes_back(metric, base, tmp_path):
    peft = lora() if EVALUATED.index(metric) % 2 else None
    args = config(
        tmp_path,
        max_steps=6,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        loss_type="plackett_luce",
    )
    data = Dataset.from_list(ranked_rows(12, k=4, seed=5))
    trainer = trainer_for(base, args, ranked_rows(24, k=4), eval_dataset=data, peft_config=peft)
    trainer.train()
    values = history(trainer, f"eval_{metric}")
    assert len(values) == 3
    best = min(values) if metric == "loss" else max(values)
    assert trainer.state.best_metric == best
    assert trainer.state.best_global_step == 2 * (values.index(best) + 1)
    reloaded = load_reward_model(trainer.state.best_model_checkpoint, is_trainable=True)
    expected = {name: p for name, p in reloaded.named_parameters() if name in weights(trainer)}
    assert largest_difference(weights(trainer), expected) == 0
    assert set(head_of(trainer)) == {"score.weight"}
    assert trainer.evaluate()[f"eval_{metric}"] == pytest.approx(best, abs=1e-6)


def test_every_metric_of_an_evaluation_is_in_the_table(base, tmp_path):
    data = Dataset.from_list(ranked_rows(8, k=4))
    trainer = trainer_for(base, config(tmp_path, loss_type="plackett_luce"), pair_rows(8), eval_dataset=data)
    found = {name.removeprefix("eval_") for name in trainer.evaluate()}
    about_time = {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens", "epoch"}
    assert found - about_time == set(EVALUATED)


def test_the_scores_survive_training_further_from_a_checkpoint(base, tmp_path):
    """The folder of a trained adapter is a model to start from: its head and adapter are trained on."""
    first = trainer_for(base, config(tmp_path / "first"), peft_config=lora())
    first.train()
    first.save_model()
    second = trainer_for(tmp_path / "first", config(tmp_path / "second"))
    assert largest_difference(head_of(second), head_of(first)) == 0
    second.train()
    assert largest_difference(head_of(second), head_of(first)) > 1e-4
    second.save_model()
    loaded = head_parameters(load_reward_model(tmp_path / "second"), ["score"])
    assert largest_difference(head_of(second), loaded) == 0


def test_a_save_without_a_head_tensor_fails(base, tmp_path, monkeypatch):
    """The code that saves checks what it saved."""
    trainer = trainer_for(base, config(tmp_path))
    save = type(trainer.model).save_pretrained

    def forgetful(model, folder, state_dict=None, **kwargs):
        state = {name: value for name, value in model.state_dict().items() if not name.startswith("score")}
        save(model, folder, state_dict=state, **kwargs)

    monkeypatch.setattr(type(trainer.model), "save_pretrained", forgetful)
    with pytest.raises(ValueError, match="score.weight"):
        trainer.save_model()


def test_a_full_model_takes_the_place_of_an_earlier_adapter(base, tmp_path, caplog):
    """Whoever loads a folder with both gets the adapter."""
    trainer_for(base, config(tmp_path), pair_rows(8), peft_config=lora()).save_model()
    full = trainer_for(base, config(tmp_path, seed=1), pair_rows(8))
    full.save_model()
    assert "has the adapter of an earlier run" in caplog.text
    assert (tmp_path / "adapter_model.safetensors.earlier").is_file()  # nothing is lost
    assert largest_difference(head_of(full), head_parameters(load_reward_model(tmp_path), ["score"])) == 0


def test_pad_as_eos_is_said_once(tmp_path, caplog):
    base = save_tiny_model(tmp_path / "eos", tokenizer=tiny_tokenizer("llama", pad="eos"))
    trainer = trainer_for(base, config(tmp_path / "out", save_strategy="steps", save_steps=1))
    trainer.train()
    trainer.save_model()
    assert len([record for record in caplog.records if "The pad token is EOS" in record.message]) == 1
    assert json.loads((tmp_path / "out" / "reward_model.json").read_text())["pad_is_eos"] is True


def test_a_model_in_memory_is_scored_as_in_training_before_it_is_saved(base, tmp_path):
    """The sidecar is on the model from the start, and replaces the one it was loaded with."""
    trainer = trainer_for(base, config(tmp_path, max_steps=2), pair_rows(8), peft_config=lora())
    trainer.train()
    rows = pair_rows(4, seed=5)
    predictions = trainer.predict(Dataset.from_list(rows)).predictions
    scorer = RewardScorer(trainer.model, trainer.processing_class)
    prompts = [row["prompt"] for row in rows]
    assert scorer(prompts, [row["chosen"] for row in rows]) == pytest.approx(predictions[:, 0].tolist(), abs=1e-5)
    assert scorer(prompts, [row["rejected"] for row in rows]) == pytest.approx(predictions[:, 1].tolist(), abs=1e-5)
    trainer.save_model()
    RewardScorer(tmp_path).fit_normalizer(prompts, [row["chosen"] for row in rows])
    further = trainer_for(str(tmp_path), config(tmp_path / "further"), pair_rows(8))
    assert get_sidecar(further.model).normalizer is None  # of other weights
