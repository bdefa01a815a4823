"""Token-level trainers at work: what moves and what does not, encoders, streams, chats, NaN, and what is refused."""

import math

import pytest
import torch
from datasets import Dataset, Value
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
    GraniteConfig,
)

from tests.models.helpers import tiny_base
from tests.tiny import save_tiny_model
from tests.trainers.helpers import config, history, lora
from tests.trainers.table import TOKEN, outcome_rows, rows_of, segment_rows, step_rows, tiny_trainer
from trl_ext import ORMTrainer, PRMConfig, RewardConfig
from trl_ext.data.validation import DataError
from trl_ext.models.heads import Float32Linear, HeadError
from trl_ext.models.sidecar import read_sidecar
from trl_ext.trainers.common.health import NotFiniteError
from trl_ext.trainers.token.trainer import TokenRewardTrainer


def state(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def moved(trainer, before):
    return {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("kind", TOKEN)
def test_two_steps_of_full_training_move_everything(kind, base, tmp_path):
    trainer = tiny_trainer(kind, base, tmp_path, max_steps=2)
    before = state(trainer)
    trainer.train()
    assert moved(trainer, before) == set(before)
    assert all(math.isfinite(loss) and loss > 0 for loss in history(trainer, "loss"))


@pytest.mark.parametrize("nf4", [False, True], ids=["fp32", "nf4"])
@pytest.mark.parametrize("kind", TOKEN)
def test_two_steps_of_lora_move_adapter_and_head_and_nothing_else(kind, nf4, base, tmp_path):
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if nf4 else None
    kwargs = {"peft_config": lora(), "quantization_config": four_bit}
    trainer = tiny_trainer(kind, base, tmp_path, trainer_kwargs=kwargs, max_steps=2)
    before = state(trainer)
    trainer.train()
    expected = {name for name in before if "lora_" in name or "modules_to_save" in name}
    assert moved(trainer, before) == expected
    assert sum("modules_to_save" in name for name in expected) == 1
    assert all(before[name].dtype == torch.float32 for name in expected)


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
@pytest.mark.parametrize("kind", TOKEN)
def test_encoders_get_their_token_class(kind, family, tmp_path):
    trainer = tiny_trainer(kind, save_tiny_model(tmp_path / "base", family), tmp_path / "out", max_steps=2)
    assert "ForTokenClassification" in type(trainer.model).__name__
    before = state(trainer)
    trainer.train()
    unused = {name for name in before if "rel_embeddings" in name or "token_type" in name or "position" in name}
    assert moved(trainer, before) >= set(before) - unused
    assert {"classifier.weight", "classifier.bias"} <= moved(trainer, before)


@pytest.mark.parametrize("kind", TOKEN)
def test_bf16_autocast_leaves_head_and_loss_in_fp32(kind, base, tmp_path):
    trainer = tiny_trainer(kind, base, tmp_path, bf16=True, max_steps=2)
    seen = []
    trainer.model.score.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    trainer.train()
    assert {logits.dtype for logits in seen} == {torch.float32}
    # numbers that bf16 cannot hold
    assert any((logits.bfloat16().float() != logits).any() for logits in seen)


def test_the_head_of_a_quantized_base_moves_at_a_small_learning_rate(base, tmp_path):
    """After 100 steps at 2e-5 at least 99 % of the head's entries have changed."""
    kwargs = {
        "peft_config": lora(),
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }
    arguments = dict(max_steps=100, learning_rate=2e-5, logging_steps=100, lr_scheduler_type="constant")
    trainer = tiny_trainer("prm", base, tmp_path, trainer_kwargs=kwargs, bf16=True, **arguments)
    head = dict(trainer.model.named_parameters())["base_model.model.score.modules_to_save.default.weight"]
    before = head.detach().clone()
    trainer.train()
    assert (head != before).float().mean() >= 0.99


@pytest.mark.parametrize("kind", TOKEN)
def test_streams_train_and_evaluate_as_data_sets_do(kind, base, tmp_path):
    rows, extra = rows_of(kind, 16), dict(categories=["length", "tone"]) if kind == "segment" else {}
    data = Dataset.from_list(rows)
    arguments = dict(train_sampling_strategy="sequential", max_steps=3, **extra)
    whole = tiny_trainer(kind, base, tmp_path, data, data, **arguments)
    stream = tiny_trainer(kind, base, tmp_path, data.to_iterable_dataset(), data.to_iterable_dataset(), **arguments)
    for trainer in (whole, stream):
        trainer.train()
    assert history(stream, "loss") == pytest.approx(history(whole, "loss"), abs=1e-6)
    one, other = whole.evaluate(), stream.evaluate()
    timed = ("runtime", "per_second", "epoch")  # how long an epoch is, a stream does not say
    assert {k: v for k, v in one.items() if not k.endswith(timed)} == pytest.approx(
        {k: v for k, v in other.items() if not k.endswith(timed)}, abs=1e-6
    )


@pytest.mark.parametrize("kind", TOKEN)
def test_chats_train(kind, base, tmp_path):
    rows = rows_of(kind, 12)
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        if kind != "prm":
            row["completion"] = [{"role": "assistant", "content": row["completion"]}]
    trainer = tiny_trainer(kind, base, tmp_path, rows, rows, max_steps=2)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    text = trainer.processing_class.decode(trainer.train_dataset[0]["span_input_ids"])
    assert text == trainer.processing_class.apply_chat_template(
        [
            *rows[0]["prompt"],
            *(
                rows[0]["completion"]
                if kind != "prm"
                else [{"role": "assistant", "content": "".join(step + "\n" for step in rows[0]["completions"])}]
            ),
        ],
        tokenize=False,
    )


@pytest.mark.parametrize("kind", TOKEN)
def test_only_outcomes_end_with_eos(kind, base, tmp_path):
    """A label is put on EOS only where the whole completion is judged; steps must score the same in a prefix."""
    trainer = tiny_trainer(kind, base, tmp_path)
    ids = trainer.train_dataset[0]["span_input_ids"]
    assert (ids[-1] == trainer.processing_class.eos_token_id) == (kind == "orm")
    trainer.save_model()
    assert read_sidecar(tmp_path).token_policy["append_eos"] == (kind == "orm")


@pytest.mark.parametrize("kind", TOKEN)
def test_nan_stops_and_names_the_rows(kind, base, tmp_path):
    trainer = tiny_trainer(kind, base, tmp_path, rows_of(kind, 8), per_device_train_batch_size=2)
    trainer.model.score.weight.data[0, 0] = math.nan
    with pytest.raises(NotFiniteError, match=r"row\(s\) \["):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer = tiny_trainer(kind, base, tmp_path, rows_of(kind, 8), rows_of(kind, 8))
    trainer.model.score.weight.data[0, 0] = math.nan
    with pytest.raises(NotFiniteError, match=r"row\(s\) \["):
        trainer.evaluate()


def test_dropped_rows_are_counted_and_logged_once(base, tmp_path):
    rows = outcome_rows(12)
    for row in rows[:3]:
        row["completion"] *= 20
    for row in rows[3:5]:
        row["label"] = None
    data = Dataset.from_list(rows).cast_column("label", Value("bool"))
    trainer = tiny_trainer("orm", base, tmp_path, data, max_length=30)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "data/train/kept" in entry]
    assert len(logs) == 1
    assert {name.rpartition("/")[2]: n for name, n in logs[0].items() if name.startswith("data/train/")} == {
        "rows": 12, "kept": 7, "dropped": 5, "over_long_rows": 3, "unlabelled_rows": 2, "unannotated": 2
    }  # fmt: skip
    with pytest.raises(DataError, match="7 of 12 rows kept"):
        tiny_trainer("orm", base, tmp_path, data, max_length=30, min_survival=0.7)


# -------------------------------------------------------------------------------------------------- what is refused
def test_families_without_a_head_class_are_refused_in_a_sentence(base, tmp_path):
    model = AutoModelForCausalLM.from_config(
        GraniteConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    )
    model.save_pretrained(tmp_path / "granite")
    tiny_trainer("orm", base, tmp_path).processing_class.save_pretrained(tmp_path / "granite")
    with pytest.raises(HeadError, match="no sequence or token-classification class for 'granite' models"):
        tiny_trainer("orm", tmp_path / "granite", tmp_path / "out")


def test_instances_of_the_wrong_class_or_width_are_refused(base, tmp_path):
    pooled = AutoModelForSequenceClassification.from_pretrained(
        save_tiny_model(tmp_path / "bert", "bert"), num_labels=2
    )
    with pytest.raises(HeadError, match="pools the tokens before its head.*AutoModelForTokenClassification"):
        tiny_trainer("prm", pooled, tmp_path / "out")
    three = AutoModelForTokenClassification.from_pretrained(base, num_labels=3)
    with pytest.raises(HeadError, match="has 3 outputs. Needed: 2"):
        tiny_trainer("prm", three, tmp_path / "out")
    with pytest.raises(HeadError, match="language model"):
        tiny_trainer("prm", AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")


def test_instances_of_both_classes_train(base, tmp_path):
    for auto in (AutoModelForTokenClassification, AutoModelForSequenceClassification):
        trainer = tiny_trainer("prm", auto.from_pretrained(base, num_labels=2), tmp_path, max_steps=2)
        assert isinstance(trainer.model.score, Float32Linear)
        assert all(module.p == 0 for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout))
        trainer.train()
    again = tiny_trainer("prm", None, tmp_path, trainer_kwargs={"model_init": lambda: trainer.model}, max_steps=1)
    assert again.model is trainer.model


@pytest.mark.parametrize(
    ("kind", "rows", "arguments", "error", "match"),
    [
        ("orm", None, dict(loss_type="ce"), ValueError, r"`ce` needs 2 or 3 output"),
        ("orm", None, dict(loss_type="bcee"), ValueError, "bce"),
        ("orm", None, dict(loss_kwargs={"margin": 1}), ValueError, "cannot be called with"),
        ("orm", None, dict(class_weights=[1, 2, 3]), ValueError, "2 finite class weights"),
        ("orm", None, dict(class_weights=[1, 2], loss_kwargs={"class_weights": [1, 2]}), ValueError, "twice"),
        ("orm", None, dict(averaging="row"), ValueError, "averaging='row'"),
        ("orm", None, dict(center_rewards_coefficient=0.1), ValueError, "does not apply"),
        ("orm", None, dict(activation_offloading=True), ValueError, "does not apply"),
        ("orm", None, dict(label_placement="before"), ValueError, "before"),
        ("prm", None, dict(num_labels=1), ValueError, r"`ce` needs 2 or 3 output"),
        ("prm", None, dict(num_labels=4), ValueError, "num_labels=4"),
        ("prm", None, dict(step_separator=5), ValueError, "step_separator=5 is no text"),
        ("prm", step_rows(4, classes=3), {}, DataError, "num_labels=3"),
        ("segment", None, dict(loss_type="mse", class_weights=[1, 2]), ValueError, "class weights"),
        ("segment", None, dict(categories=["tone", "tone"]), ValueError, "different names"),
        ("segment", None, dict(categories=["tone"]), DataError, "unknown category 'length'"),
        ("segment", segment_rows(9), dict(loss_type="bce"), DataError, r"row \d.*'segments'.*labels in \[0, 1\]"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_at_construction(kind, rows, arguments, error, match, base, tmp_path):
    with pytest.raises(error, match=match):
        tiny_trainer(kind, base, tmp_path, rows, **arguments)


def test_labels_that_a_hinge_loss_would_confuse_are_refused(base, tmp_path):
    rows = segment_rows(4, binary=True)
    rows[0]["segments"] = [{"start": 0, "end": 3, "score": -1.0, "category": "tone"}]
    with pytest.raises(DataError, match="-1 beside 0|not all three"):
        tiny_trainer("segment", base, tmp_path, rows, loss_type="hinge")
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = tiny_trainer("segment", base, tmp_path, stream, loss_type="hinge", categories=["length", "tone"])
    with pytest.raises((DataError, ValueError), match="-1 beside 0|not all three"):
        trainer.train()


def test_arguments_of_another_class_are_refused(base, tmp_path):
    for args in (config(tmp_path, RewardConfig), config(tmp_path, PRMConfig)):
        with pytest.raises(TypeError, match="Needed: a `ORMConfig`"):
            ORMTrainer(model=str(base), args=args, train_dataset=Dataset.from_list(outcome_rows(4)))
    with pytest.raises(TypeError, match="abstract"):
        TokenRewardTrainer(model=str(base))
    with pytest.raises(ValueError, match="needs a `model`"):
        ORMTrainer()


def test_a_loss_of_your_own(base, tmp_path):
    """A callable as `loss_type`: trained with, named in the checkpoint, and the arguments still pickle."""

    def squared_hinge(logits, labels, mask, *, power=2):
        sign = labels * 2 - 1
        terms = (1 - sign * logits[..., 0].float()).relu() ** power
        return torch.where(mask, terms, 0.0).sum((1, 2))

    rows = outcome_rows(12)
    trainer = tiny_trainer("orm", base, tmp_path, rows, rows, loss_type=squared_hinge, loss_kwargs={"power": 3})
    trainer.train()
    trainer.save_model()
    assert trainer.evaluate()["eval_auc"] >= 0
    content = (tmp_path / "reward_model.json").read_text()
    assert "squared_hinge" in content
    assert '"power": 3' in content

    def reduced(logits, labels, mask):
        return logits.sum()

    with pytest.raises(ValueError, match="returned .* for 2 sequences"):
        tiny_trainer("orm", base, tmp_path, rows, loss_type=reduced)


def test_a_plain_base_on_which_bitsandbytes_runs(tmp_path):
    """Quantized bases: int8 and NF4, 1 to 3 outputs, two steps, a finite head gradient that is not 0."""
    path = tiny_base(tmp_path / "base")
    for quantization in (BitsAndBytesConfig(load_in_8bit=True), BitsAndBytesConfig(load_in_4bit=True)):
        for labels in (1, 2, 3):
            trainer = tiny_trainer(
                "prm", path, tmp_path / "out", step_rows(8, classes=3 if labels == 3 else 2), num_labels=labels,
                loss_type="bce" if labels == 1 else "ce", max_steps=2,
                trainer_kwargs={"peft_config": lora(), "quantization_config": quantization},
            )  # fmt: skip
            trainer.train()
            assert all(0 < norm < math.inf for norm in history(trainer, "grad_norm"))
