"""The public behaviours of the PRMTrainer of TRL 1.13, one test each; the differences are at the end.

TRL 1.16 has no such class, so what it did is written down here: how it made token ids and labels from a row.
"""

import functools
import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    TrainerCallback,
)

from tests.trainers.helpers import config, history, lora
from tests.trainers.table import step_rows
from trl_ext import PRMConfig, PRMTrainer


ROW = {"prompt": "Which is larger?", "completions": ["good clear", "bad"], "labels": [True, False]}


def model_of(base, **kwargs):
    torch.manual_seed(0)
    return AutoModelForTokenClassification.from_pretrained(base, num_labels=2, **kwargs)


def make(base, folder, rows=None, model=None, given=None, **arguments):
    """A trainer as TRL's own examples make it: a model and a tokenizer in memory."""
    return PRMTrainer(
        model=model_of(base) if model is None else model,
        args=config(folder, PRMConfig, **({"max_steps": 2} | arguments)),
        train_dataset=Dataset.from_list(step_rows(12)) if rows is None else rows,
        processing_class=AutoTokenizer.from_pretrained(base),
        **(given or {}),
    )


def trains(trainer):
    """Train; the names of the parameters that changed."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert len(history(trainer, "loss")) == 2
    return {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}


def as_trl(tokenizer, row, separator="\n", max_length=None, max_completion_length=None, last_only=False):
    """Token ids and labels as TRL 1.13 made them: pieces are tokenized one by one and joined."""
    prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    end = tokenizer.encode(separator, add_special_tokens=False)
    ids, labels = [], []
    for place, (step, label) in enumerate(zip(row["completions"], row["labels"], strict=True)):
        piece = tokenizer(step, add_special_tokens=False)["input_ids"] + end
        shown = not last_only or place == len(row["labels"]) - 1
        ids += piece
        labels += [-100] * (len(piece) - 1) + [int(label) if shown else -100]
    if tokenizer.bos_token_id is not None:
        prompt = [tokenizer.bos_token_id, *prompt]
    if max_completion_length is not None:
        ids, labels = ids[:max_completion_length], labels[:max_completion_length]
    return (prompt + ids)[:max_length], ([-100] * len(prompt) + labels)[:max_length]


def prepared(trainer, dataset=None):
    """Token ids and labels of the first row, in TRL's form."""
    row = (trainer.train_dataset if dataset is None else dataset)[0]
    batch = trainer.data_collator([row])
    labels = batch["token_labels"].masked_fill(~batch["label_mask"], -100).flatten().long()
    return row["span_input_ids"], labels.tolist()


# ------------------------------------------------------------------------------------------------------------ training
@pytest.mark.parametrize("last_only", [False, True])
def test_a_model_in_memory_is_trained_in_full(last_only, base, tmp_path):
    trainer = make(base, tmp_path, train_on_last_step_only=last_only)
    assert trains(trainer) == {name for name, _ in trainer.model.named_parameters()}


def test_lora_trains_adapter_and_head_only(base, tmp_path):
    trainer = make(base, tmp_path, given={"peft_config": lora(task_type="TOKEN_CLS")})
    assert isinstance(trainer.model, PeftModel)
    changed = trains(trainer)
    assert changed and all("lora_" in name or "modules_to_save" in name for name in changed)


def test_a_peft_model_is_trained(base, tmp_path):
    model = get_peft_model(model_of(base), lora(task_type="TOKEN_CLS"))
    changed = trains(make(base, tmp_path, model=model))
    assert changed and all("lora_" in name or "modules_to_save" in name for name in changed)


def test_the_default_collator_of_trl_may_be_passed(base, tmp_path):
    collator = DataCollatorForTokenClassification(AutoTokenizer.from_pretrained(base))
    assert trains(make(base, tmp_path, given={"data_collator": collator}))


def test_what_peft_cannot_do_is_refused(base, tmp_path):
    with pytest.raises(TypeError, match="peft_config"):
        make(base, tmp_path, given={"peft_config": {"r": 4}})


def test_model_init_makes_the_model(base, tmp_path):
    trainer = PRMTrainer(
        model_init=lambda: model_of(base),
        args=config(tmp_path, PRMConfig, max_steps=2),
        train_dataset=Dataset.from_list(step_rows(12)),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    assert trains(trainer)


def test_dropout_is_off_unless_it_is_asked_for(base, tmp_path):
    for disabled in (True, False):
        model = model_of(base)
        model.dropout = torch.nn.Dropout(0.5)
        make(base, tmp_path, model=model, disable_dropout=disabled)
        assert model.dropout.p == (0.0 if disabled else 0.5)


def test_callbacks_and_optimizers_are_used(base, tmp_path):
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

    count, model = Count(), model_of(base)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make(base, tmp_path, model=model, given={"callbacks": [count], "optimizers": (optimizer, None)})
    trainer.train()
    assert count.steps == 2 and trainer.optimizer.optimizer is optimizer


# ---------------------------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize(
    ("arguments", "as_before"),
    [
        ({}, {}),
        ({"train_on_last_step_only": True}, {"last_only": True}),
        ({"step_separator": "\n\n"}, {"separator": "\n\n"}),
        ({"step_separator": "good clear\n"}, {"separator": "good clear\n"}),
        ({"max_completion_length": 20}, {"max_completion_length": 20}),
    ],
)
def test_token_ids_and_labels_of_a_row(arguments, as_before, base, tmp_path):
    trainer = make(base, tmp_path, Dataset.from_list([ROW] * 4), **arguments)
    assert prepared(trainer) == as_trl(trainer.processing_class, ROW, **as_before)


def test_evaluation_judges_every_step(base, tmp_path):
    rows = Dataset.from_list([ROW] * 4)
    trainer = make(base, tmp_path, rows, train_on_last_step_only=True, given={"eval_dataset": rows})
    assert prepared(trainer, trainer.eval_dataset) == as_trl(trainer.processing_class, ROW)


# ---------------------------------------------------------------------------------------------------------- evaluation
def test_accuracy_is_the_metric_without_compute_metrics(base, tmp_path):
    trainer = make(base, tmp_path, given={"eval_dataset": Dataset.from_list(step_rows(6, seed=1))})
    metrics = trainer.evaluate()
    found = trainer.predict(trainer.eval_dataset)
    assert found.predictions.shape[-1] == 2
    labelled = found.label_ids != -100
    right = (found.predictions.argmax(-1) == found.label_ids)[labelled]
    assert metrics["eval_accuracy"] == pytest.approx(right.mean())


def test_several_evaluation_sets_by_name(base, tmp_path):
    sets = {name: Dataset.from_list(step_rows(4, seed=seed)) for seed, name in enumerate(("one", "other"))}
    metrics = make(base, tmp_path, given={"eval_dataset": sets}).evaluate()
    assert {"eval_one_accuracy", "eval_other_accuracy"} <= metrics.keys()


# -------------------------------------------------------------------------------------------------------------- saving
def test_a_saved_model_is_a_plain_classifier_with_the_tags_and_a_card(base, tmp_path):
    trainer = make(base, tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    model = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert torch.equal(model.score.weight, trainer.model.score.weight)
    assert {"trl", "prm"} <= set(trainer.model.model_tags)
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        assert "- prm" in (folder / "README.md").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(trainer.model).__name__]


def test_a_run_resumes(base, tmp_path):
    whole = make(base, tmp_path, save_strategy="steps", save_steps=1)
    whole.train()
    resumed = make(base, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert history(resumed, "loss") == pytest.approx(history(whole, "loss"), abs=1e-6)


# --------------------------------------------------------------------------------------------------------- differences
def test_difference_rows_above_max_length_are_dropped(base, tmp_path):
    """TRL cut them, and with them the labels at the end."""
    long = ROW | {"completions": ["good " * 40, "bad"]}
    assert len(make(base, tmp_path, Dataset.from_list([ROW, ROW, ROW, long]), max_length=64).train_dataset) == 3


def test_difference_tokenized_rows_are_refused(base, tmp_path):
    """TRL took `input_ids` and `labels`. They do not say where a step begins, which metrics and scoring need."""
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, -100, 1]}] * 4)
    with pytest.raises(ValueError, match="input_ids"):
        make(base, tmp_path, rows)


def test_difference_the_tokenizer_and_the_arguments_may_be_left_out(base, tmp_path, monkeypatch):
    """TRL needed both."""
    monkeypatch.chdir(tmp_path)
    on_cpu = functools.partial(PRMConfig, use_cpu=True, bf16=False)  # the defaults need a GPU, as TRL's did
    monkeypatch.setattr(PRMTrainer, "config_class", staticmethod(on_cpu))
    trainer = PRMTrainer(model_of(base), train_dataset=Dataset.from_list(step_rows(4)))
    assert trainer.processing_class.vocab_size == AutoTokenizer.from_pretrained(base).vocab_size
    assert trainer.args.output_dir == "tiny-llama-PRM"


def test_difference_raw_rows_are_evaluated(base, tmp_path):
    """TRL's `evaluate` wanted prepared rows."""
    assert 0 <= make(base, tmp_path).evaluate(Dataset.from_list(step_rows(4)))["eval_accuracy"] <= 1
