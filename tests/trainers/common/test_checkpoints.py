"""A killed run that resumes ends where an uninterrupted one does; the best checkpoint is what comes back."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import BitsAndBytesConfig

from tests.models.helpers import max_change, scores_of
from tests.tiny import pair_rows, ranked_rows, save_tiny_model, tiny_tokenizer
from tests.trainers.helpers import (
    StopAt,
    config,
    head_of,
    history,
    largest_difference,
    lora,
    states,
    trainer_for,
    weights,
)
from tests.trainers.table import ENSEMBLES, SINGLE, rows_of, tiny_trainer
from trl_ext import RewardEnsemble, RewardScorer, load_reward_model
from trl_ext.models.heads import head_parameters
from trl_ext.models.sidecar import get_sidecar


NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
STEPS = 11
TWO = {"gradient_accumulation_steps": 2}
RESUMED = [  # the kind, what its trainer gets, its arguments
    pytest.param("reward", {}, {}, id="reward full"),
    pytest.param("reward", {"peft_config": lora()}, {}, id="reward lora"),
    pytest.param(
        "reward", {"peft_config": lora()}, {"gradient_accumulation_steps": 3}, id="reward lora, accumulation"
    ),
    pytest.param("reward", {"peft_config": lora(), "quantization_config": NF4}, {}, id="reward lora on nf4"),
    pytest.param("orm", {}, TWO, id="orm full"),
    pytest.param("prm", {"peft_config": lora()}, TWO, id="prm lora"),
    pytest.param(
        "prm", {"peft_config": lora(), "quantization_config": NF4}, TWO, id="prm nf4", marks=pytest.mark.slow
    ),
    pytest.param("segment", {"peft_config": lora()}, TWO, id="segment lora", marks=pytest.mark.slow),
    pytest.param("reward ensemble", {}, {"data_strategy": "shuffle", "branch_at": 0.5}, id="members, shuffle"),
    pytest.param("reward ensemble", {}, {"data_strategy": "bootstrap", "branch_at": 0.5}, id="members, bootstrap"),
    *(pytest.param(kind, {}, TWO, id=kind, marks=pytest.mark.slow) for kind in ENSEMBLES if kind != "reward ensemble"),
]


@pytest.mark.parametrize(("kind", "given", "arguments"), RESUMED)
def test_kill_and_resume_equals_an_uninterrupted_run(kind, given, arguments, base, tmp_path):
    def make(folder, **more):
        rows = rows_of(kind, 18)  # several epochs: the order of the rows must come back too
        run = dict(max_steps=STEPS, per_device_train_batch_size=2, lr_scheduler_type="cosine", warmup_steps=2)
        run |= dict(save_strategy="steps", save_steps=3)
        return tiny_trainer(kind, base, tmp_path / folder, rows, None, given | more, **(run | arguments))

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
    found, wanted = states(resumed), states(whole)
    assert len(found) == (3 if kind in ENSEMBLES else 1)
    for one, other in zip(found, wanted, strict=True):
        assert largest_difference(one, other) < 1e-6
    if given or kind in ENSEMBLES:
        assert any("lora_B" in name for name in found[0])
    assert any("score" in name for name in found[0])
    for one, other in zip(wanted, states(make("fresh")), strict=True):
        assert largest_difference(one, other) > 1e-3  # what is compared has been trained


@pytest.mark.parametrize("peft", [None, lora], ids=["full", "lora"])
@pytest.mark.parametrize("kind", SINGLE)
def test_every_checkpoint_is_a_reward_model(kind, peft, base, tmp_path):
    arguments = dict(save_strategy="steps", save_steps=2, max_length=200)
    kwargs = {"peft_config": None if peft is None else peft()}
    trainer = tiny_trainer(kind, base, tmp_path, trainer_kwargs=kwargs, **arguments)
    trainer.train()
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        content = json.loads((folder / "reward_model.json").read_text())
        assert content["kind"] == ("scalar" if kind == "reward" else trainer.kind)
        assert content["is_adapter"] == (peft is not None)
        assert content["head_modules"] == ["score"]
        assert content["max_length"] == 200
        assert (folder / "tokenizer.json").is_file()
        if kind == "reward":
            assert content["training"] == {"loss_type": "plackett_luce", "loss_kwargs": {}}
    loaded = load_reward_model(tmp_path / "checkpoint-4")
    trainer.save_model()
    assert get_sidecar(loaded).token_policy == get_sidecar(load_reward_model(tmp_path)).token_policy
    assert get_sidecar(loaded).token_policy["append_eos"] == (kind in ("reward", "orm"))
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

    members = tmp_path / "members"
    trainer = tiny_trainer("reward ensemble", base, members, num_members=2, save_strategy="steps", save_steps=4)
    trainer.train()
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    assert len(RewardEnsemble(tmp_path / "members")(["a"], ["b"])) == 1


EVALUATED = ["loss", "accuracy", "top1_agreement", "kendall_tau", "ndcg", "margin", "mean_reward", "min_reward"]
EVALUATED += ["max_reward", "length_accuracy", "length_correlation"]
BEST = [  # the kind, the metric, and whether there is an adapter
    *(("reward", metric, number % 2) for number, metric in enumerate(EVALUATED)),
    ("orm", "auc", False),
    ("orm", "best_of_n", True),
    ("orm", "loss", True),
    ("prm", "processbench_f1", True),
    ("prm", "auc_to_first_error", False),
    ("segment", "tone_spearman", True),
    ("segment", "length_r2", False),
    ("reward ensemble", "accuracy", True),
    ("reward ensemble", "loss", True),
    ("reward ensemble", "disagreement", True),
]


@pytest.mark.parametrize(("kind", "metric", "peft"), BEST)
def test_the_best_model_by_any_metric_comes_back(kind, metric, peft, base, tmp_path, caplog):
    smaller = metric in ("loss", "disagreement")
    trainer = tiny_trainer(
        kind,
        base,
        tmp_path,
        rows_of(kind, 24),
        rows_of(kind, 24, seed=5),
        {"peft_config": lora() if peft else None},
        max_steps=6,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=False if metric == "disagreement" else None,
    )
    trainer.train()
    values = history(trainer, f"eval_{metric}")
    assert len(values) == 3
    best = min(values) if smaller else max(values)
    assert trainer.state.best_metric == best
    assert trainer.state.best_global_step == 2 * (values.index(best) + 1)
    assert "Could not locate the best model" not in caplog.text
    if kind not in ENSEMBLES:
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


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", SINGLE)
def test_training_further_starts_from_the_saved_head(kind, peft, base, tmp_path):
    """The folder of a trained model or adapter is a model to start from: its head and adapter are trained on."""
    kwargs = {"peft_config": lora()} if peft else {}
    first = tiny_trainer(kind, base, tmp_path / "first", trainer_kwargs=kwargs)
    first.train()
    first.save_model()
    second = tiny_trainer(kind, tmp_path / "first", tmp_path / "second")
    assert largest_difference(head_of(second), head_of(first)) == 0
    assert max_change(scores_of(second.model), scores_of(first.model)) < 1e-5
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
