"""Token-level trainers: kill and resume, the best model by any metric, and every checkpoint complete."""

import json
import math

import pytest
from datasets import Dataset
from transformers import BitsAndBytesConfig

from tests.trainers.helpers import StopAt, head_of, history, largest_difference, lora, weights
from tests.trainers.table import KINDS, segment_rows, token_trainer
from trl_ext import load_reward_model


STEPS = 7
RUNS = [
    pytest.param("orm", False, False, id="orm full"),
    pytest.param("prm", True, False, id="prm lora"),
    pytest.param("prm", True, True, id="prm nf4", marks=pytest.mark.slow),
    pytest.param("segment", True, False, id="segment lora", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "peft", "nf4"), RUNS)
def test_kill_and_resume_equals_an_uninterrupted_run(kind, peft, nf4, base, tmp_path):
    def make(folder, callbacks=None):
        four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if nf4 else None
        return token_trainer(
            kind,
            base,
            tmp_path / folder,
            KINDS[kind][2](18),  # several epochs: the order of the rows must come back too
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            lr_scheduler_type="cosine",
            save_strategy="steps",
            save_steps=2,
            trainer_kwargs={
                "peft_config": lora() if peft else None,
                "quantization_config": four_bit,
                "callbacks": callbacks,
            },
        )

    whole = make("whole")
    whole.train()
    killed = make("killed", callbacks=[StopAt(5)])
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    resumed = make("killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert history(resumed, "loss") == pytest.approx(history(whole, "loss"), abs=1e-6)
    assert largest_difference(head_of(resumed), head_of(whole)) < 1e-6
    assert largest_difference(weights(resumed), weights(whole)) < 1e-6
    assert largest_difference(weights(whole), weights(make("fresh"))) > 1e-3


METRICS = [
    ("orm", "auc", None),
    ("orm", "best_of_n", lora),
    ("orm", "loss", lora),
    ("prm", "processbench_f1", lora),
    ("prm", "auc_to_first_error", None),
    ("segment", "tone_spearman", lora),
    ("segment", "length_r2", None),
]


@pytest.mark.parametrize(("kind", "metric", "peft"), METRICS)
def test_the_best_model_by_any_metric_comes_back(kind, metric, peft, base, tmp_path):
    trainer = token_trainer(
        kind,
        base,
        tmp_path,
        KINDS[kind][2](24),
        KINDS[kind][2](24, seed=5),
        max_steps=12,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        trainer_kwargs={"peft_config": None if peft is None else peft()},
    )
    trainer.train()
    values = history(trainer, f"eval_{metric}")
    assert len(values) == 3
    best = min(values) if metric == "loss" else max(values)
    assert trainer.state.best_metric == best
    assert trainer.state.best_global_step == 4 * (values.index(best) + 1)
    reloaded = load_reward_model(trainer.state.best_model_checkpoint, is_trainable=True)
    expected = {name: p for name, p in reloaded.named_parameters() if name in weights(trainer)}
    assert largest_difference(weights(trainer), expected) == 0
    assert trainer.evaluate()[f"eval_{metric}"] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("peft", [None, lora], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_checkpoint_is_a_reward_model(kind, peft, base, tmp_path):
    arguments = dict(save_strategy="steps", save_steps=2, max_length=200)
    kwargs = {"peft_config": None if peft is None else peft()}
    trainer = token_trainer(kind, base, tmp_path, trainer_kwargs=kwargs, **arguments)
    trainer.train()
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        content = json.loads((folder / "reward_model.json").read_text())
        assert content["kind"] == trainer.kind
        assert content["is_adapter"] == (peft is not None)
        assert content["max_length"] == 200
        assert (folder / "tokenizer.json").is_file()
    loaded = load_reward_model(tmp_path / "checkpoint-4")
    saved = {name: p for name, p in loaded.named_parameters() if name in weights(trainer)}
    assert largest_difference(saved, weights(trainer)) == 0


def test_several_data_sets_are_evaluated_by_name(base, tmp_path):
    rows = {"one": KINDS["prm"][2](9, seed=1), "two": KINDS["prm"][2](7, seed=2)}

    data = {name: Dataset.from_list(given) for name, given in rows.items()}
    trainer = token_trainer("prm", base, tmp_path, eval_rows=data, eval_strategy="steps", eval_steps=4)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_two_loss" in entry]
    assert len(logged) == 1
    again = trainer.evaluate(data)  # rows as they were given
    assert again["eval_one_loss"] == pytest.approx(trainer.evaluate()["eval_one_loss"], abs=1e-6)
    alone = trainer.evaluate(data["two"], metric_key_prefix="alone")
    assert alone["alone_balanced_accuracy"] == again["eval_two_balanced_accuracy"]


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_the_outputs_of_all_tokens(kind, base, tmp_path):
    rows = KINDS[kind][2](5)
    trainer = token_trainer(kind, base, tmp_path, eval_rows=rows)

    output = trainer.predict(Dataset.from_list(rows))
    width = max(len(row["span_input_ids"]) for row in trainer.eval_dataset)
    shape = {"orm": (5, width, 1), "prm": (5, width, 2), "segment": (5, width, 2, 1)}[kind]
    assert output.predictions.shape == shape
    assert output.label_ids.shape == (shape[:2] if kind != "segment" else shape[:3])
    labelled = sum(len(row["label_positions"]) for row in trainer.eval_dataset)
    assert (output.label_ids != -100).sum() == labelled
    assert output.metrics["test_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)
    assert all(math.isfinite(value) for value in output.metrics.values())


def test_metrics_do_not_depend_on_the_batch_size(base, tmp_path):
    """9 rows give the same values at batch 1, 2 and 8."""
    for kind in KINDS:
        rows = segment_rows(9) if kind == "segment" else KINDS[kind][2](9)
        for averaging in ("token", "sequence"):
            trainer = token_trainer(kind, base, tmp_path, eval_rows=rows, averaging=averaging)
            found = []
            for size in (1, 2, 8):
                trainer.args.per_device_eval_batch_size = size
                metrics = trainer.evaluate().items()
                found.append(
                    {k: v for k, v in metrics if not k.endswith(("runtime", "per_second", "preparation_time"))}
                )
            assert len(found[0]) >= 5
            assert found[1] == pytest.approx(found[0], abs=1e-6)
            assert found[2] == pytest.approx(found[0], abs=1e-6)
