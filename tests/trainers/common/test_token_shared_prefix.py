"""Token-level training on flat rows: the losses, metrics and files are those of padded rows."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForTokenClassification, BitsAndBytesConfig, TrainerCallback

from tests.tiny import save_tiny_model
from tests.trainers.helpers import history, largest_difference, lora, weights
from tests.trainers.table import KINDS, token_trainer
from trl_ext import load_reward_model
from trl_ext.models.sidecar import read_sidecar
from trl_ext.trainers.common import head_training
from trl_ext.trainers.token import model as token_model
from trl_ext.trainers.token import trainer as trainer_module


METRICS = ("loss", "accuracy", "num_tokens", "grad_norm")


def rows_of(kind, n=24, seed=0):
    """Four rows with the same long prompt follow each other."""
    rows = KINDS[kind][2](n, seed=seed)
    return [{**row, "prompt": f"Question {i // 4}: tell me about the city {i // 4}.\n"} for i, row in enumerate(rows)]


@pytest.fixture
def passes(monkeypatch):
    """How many forward passes took which route since it was last cleared."""
    counts = {"flat": 0, "padded": 0}
    for name, function in (("flat", "flat_token_logits"), ("padded", "run_with_head_output")):
        route = vars(token_model)[function]

        def counted(*args, _route=route, _name=name, **kwargs):
            counts[_name] += 1
            return _route(*args, **kwargs)

        monkeypatch.setattr(token_model, function, counted)
    return counts


def train(kind, base, folder, **arguments):
    trainer = token_trainer(kind, base, folder, rows_of(kind), **({"optim": "sgd", "learning_rate": 1e-2} | arguments))
    trainer.train()
    return trainer


def flat_and_padded(passes, kind, base, folder, peft=None, **arguments):
    trainers = []
    for shared in (True, False):
        passes.update(flat=0, padded=0)
        more = {**arguments, "trainer_kwargs": {**arguments.get("trainer_kwargs", {}), "peft_config": peft and peft()}}
        trainers.append(train(kind, base, folder / str(shared), shared_prefix=shared, **more))
        assert passes["flat" if shared else "padded"] > passes["padded" if shared else "flat"]
        assert shared or not passes["flat"]
    return trainers


def assert_same_training(one, other, tolerance=1e-5):
    for name in METRICS:
        expected = history(other, name)
        if name == "accuracy" and not expected:
            continue  # numbers are not right or wrong
        assert len(expected) == 4
        assert history(one, name) == pytest.approx(expected, abs=tolerance, rel=1e-4 if name == "grad_norm" else 0)
    assert largest_difference(weights(one), weights(other)) < tolerance


CHECKPOINTING = {
    kind: {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": kind == "reentrant"}}
    for kind in ("reentrant", "non-reentrant")
}
SCRIPTS = {
    "orm": ("orm", {}),
    "orm, rows together": ("orm", {"group_by_prompt": True}),
    "orm, lora, both checkpointings": ("orm", {"peft": lora}),
    "prm, accumulation": ("prm", {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}),
    "prm, by sequence": ("prm", {"averaging": "sequence"}),
    "prm, labels before": ("prm", {"label_placement": "before"}),
    "segment, lora": ("segment", {"peft": lora}),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_gradients_and_weights_equal_padded_rows(script, base, tmp_path, passes):
    kind, arguments = SCRIPTS[script]
    variants = CHECKPOINTING.values() if "checkpointings" in script else [{}]
    for number, more in enumerate(variants):
        assert_same_training(*flat_and_padded(passes, kind, base, tmp_path / str(number), **{**arguments, **more}))


@pytest.mark.parametrize("averaging", ["token", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_of_a_batch_equal_padded_rows(kind, averaging, base, tmp_path):
    trainer = token_trainer(kind, base, tmp_path, rows_of(kind), averaging=averaging, shared_prefix=True)
    prepared = [
        trainer.train_dataset[number] for number in (3, 0, 1, 9, 2, 11)
    ]  # rows of a prompt do not stand together
    found = []
    for shared in (True, False):
        trainer.data_collator.spans.shared_prefix = shared
        batch = trainer.data_collator(prepared)
        assert ("prefix_layout" in batch) == shared
        trainer.model.zero_grad()
        loss = trainer.training_step(trainer.model.train(), batch, torch.tensor(5))
        found.append((loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}))
    (flat, flat_gradients), (padded, gradients) = found
    assert flat == pytest.approx(padded, abs=1e-5) and padded > 1e-3
    assert max(value.abs().max() for value in gradients.values()) > 1e-2
    assert largest_difference(flat_gradients, gradients) < 1e-5


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_other_families(family, tmp_path, passes):
    base = save_tiny_model(tmp_path / "base", family)
    assert_same_training(*flat_and_padded(passes, "prm", base, tmp_path), tolerance=2e-5)


def test_lora_on_an_nf4_base(tmp_path, passes):
    base = save_tiny_model(tmp_path / "base", "llama", hidden_size=64, intermediate_size=128)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    kwargs = {"trainer_kwargs": {"quantization_config": four_bit}}
    assert_same_training(*flat_and_padded(passes, "orm", base, tmp_path, peft=lora, **kwargs))


def test_a_token_classification_decoder(base, tmp_path, passes):
    """An instance of the user's own, whose head is not pooled."""
    trainers = []
    for shared in (True, False):
        torch.manual_seed(0)
        model = AutoModelForTokenClassification.from_pretrained(base, num_labels=2)
        model.dropout.p = 0.0
        trainers.append(train("prm", model, tmp_path / str(shared), shared_prefix=shared))
    assert passes["flat"] == passes["padded"] == 4
    assert_same_training(*trainers)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_table_and_predictions_equal_padded_rows(kind, base, tmp_path, passes, monkeypatch):
    found = []
    monkeypatch.setattr(head_training, "open_run", lambda trainer: None)
    data = Dataset.from_list(rows_of(kind, 11, seed=5))
    for shared in (True, False):
        tables = []
        monkeypatch.setattr(trainer_module, "log_table", lambda *args, to=tables: to.append(args[1:]))
        trainer = token_trainer(kind, base, tmp_path, rows_of(kind), data, shared_prefix=shared)
        trainer.args.report_to = ["wandb"]
        metrics = {
            name: value
            for name, value in trainer.evaluate().items()
            if not name.endswith(("runtime", "per_second", "preparation_time"))
        }
        found.append((metrics, tables[0], trainer.predict(data)))
        assert trainer.model.config._attn_implementation == "sdpa"
    assert min(passes.values()) > 2
    (flat, (_, rows, scores, _), predicted), (padded, (_, other_rows, other_scores, _), other) = found
    assert len(padded) >= 5 and flat == pytest.approx(padded, abs=1e-5)
    assert scores == pytest.approx(other_scores, abs=1e-5) and len(scores) > 11
    assert len(rows) == len(other_rows) == 11
    for (*row, values, labels), (*other_row, other_values, other_labels) in zip(rows, other_rows, strict=True):
        assert (row, labels) == (other_row, other_labels)  # the text has the scores with two digits
        assert json.loads(values) == pytest.approx(json.loads(other_values), abs=1e-5)
    assert predicted.predictions == pytest.approx(other.predictions, abs=1e-5)
    assert (predicted.label_ids == other.label_ids).all()


def test_the_attention_comes_back_and_is_not_saved(base, tmp_path, passes):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.config._attn_implementation)

    probes = []
    for shared in (True, False):
        folder = tmp_path / str(shared)
        more = {"save_strategy": "steps", "save_steps": 2, "trainer_kwargs": {"callbacks": [Look()]}}
        trainer = train("orm", base, folder, shared_prefix=shared, **more)
        trainer.save_model(str(folder / "last"))
        for saved in (folder / "checkpoint-2", folder / "last"):
            assert "trl_ext_shared_prefix" not in "".join(path.read_text() for path in saved.glob("*config.json"))
            load_reward_model(saved)  # compares the probes' scores
        probes.append(read_sidecar(folder / "last").probes)
    assert seen == ["sdpa"] * 8 and passes["flat"] == 4
    assert probes[0]["input_ids"] == probes[1]["input_ids"]
    assert probes[0]["scores"] == pytest.approx(probes[1]["scores"], abs=1e-4)


def test_the_attention_comes_back_after_an_error(base, tmp_path, monkeypatch):
    trainer = token_trainer("orm", base, tmp_path, rows_of("orm"), rows_of("orm", 4), shared_prefix=True)

    def fails(self, *args, **kwargs):
        raise RuntimeError("out of something")

    monkeypatch.setattr(type(trainer.model.model.norm), "forward", fails)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(RuntimeError, match="out of something"):
            run()
        assert trainer.model.config._attn_implementation == "sdpa"


def test_encoders_and_padding_to_a_multiple_stay_padded(base, tmp_path, passes):
    bert = save_tiny_model(tmp_path / "bert", "bert")
    train("prm", bert, tmp_path, learning_rate=1e-3)
    train("prm", base, tmp_path, pad_to_multiple_of=8)
    assert passes == {"flat": 0, "padded": 8}
    train("prm", base, tmp_path)
    assert passes == {"flat": 4, "padded": 8}  # the default
    with pytest.raises(ValueError, match="shared_prefix=True is not possible: .* no decoder"):
        token_trainer("prm", bert, tmp_path, shared_prefix=True)
    with pytest.raises(ValueError, match="does not work with .* pad_to_multiple_of"):
        token_trainer("prm", base, tmp_path, shared_prefix=True, pad_to_multiple_of=8)


def test_a_collator_of_the_users_own_decides_itself(base, tmp_path, passes):
    collator = trainer_module.TokenRewardCollator(trainer_module.SpanCollator(0), "outcome")
    trainer = train("orm", base, tmp_path, trainer_kwargs={"data_collator": collator})
    assert passes == {"flat": 0, "padded": 4} and trainer.data_collator is collator
