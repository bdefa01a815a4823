"""Token heads: what is saved scores the same in a process that did not train it."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests.models.helpers import fresh_scores, int8, max_change, nf4, scores_of, sequences, table
from tests.tiny import save_tiny_model
from tests.trainers.helpers import lora
from tests.trainers.table import logits_of, outcome_rows, segment_rows, step_rows, tiny_trainer
from trl_ext import load_reward_model, merge_reward_model
from trl_ext.models.heads import HeadError
from trl_ext.models.sidecar import SidecarError, get_sidecar, read_sidecar


QUANTIZED = {"fp32": None, "nf4": nf4(), "int8": int8()}
LIMITS = {"fp32": 1e-5, "nf4": 1e-2, "int8": 1e-2}
DECODERS = ("llama", "qwen3", "gemma3_text", "olmo2", "opt", "gpt2")
ENCODERS = ("bert", "deberta-v2")
LABELS = (1, 2, 3)

# Every family; the bases and the numbers of labels take turns. The full product is the slow test.
SHORT = [
    (family, base, LABELS[(i + j) % 3])
    for i, family in enumerate((*DECODERS, *ENCODERS))
    for j, base in enumerate(QUANTIZED)
    if (i + 2 * j) % 3 == 0 or family == "llama"
]
FULL = [(family, base, n) for family in (*DECODERS, *ENCODERS) for base in QUANTIZED for n in LABELS]


def wide(family):
    """Config arguments that make a tiny model of `family` quantizable on a CPU: widths divisible by 64."""
    if family == "gpt2":
        return dict(n_embd=64)
    if family == "opt":
        return dict(hidden_size=64, ffn_dim=128, word_embed_proj_dim=64)
    extra = dict(pooler_hidden_size=64) if family == "deberta-v2" else {}
    heads = dict(head_dim=16) if family in ("llama", "qwen3", "gemma3_text") else {}
    return dict(hidden_size=64, intermediate_size=128) | extra | heads


def matrix(cases, folder):
    bases = {family: save_tiny_model(folder / family, family, **wide(family)) for family, _, _ in cases}
    table_rows, before = [], []
    for family, base, labels in cases:
        path = folder / f"{family}-{base}-{labels}"
        trainer = tiny_trainer(
            "prm",
            bases[family],
            path,
            step_rows(8, classes=3 if labels == 3 else 2),
            num_labels=labels,
            loss_type="bce" if labels == 1 else "ce",
            max_steps=2,
            learning_rate=1e-2,
            trainer_kwargs={
                "peft_config": LoraConfig(target_modules="all-linear"),
                "quantization_config": QUANTIZED[base],
            },
        )
        trainer.train()
        trainer.save_model()
        before.append(scores_of(trainer.model))
        moved = [p for name, p in trainer.model.named_parameters() if "modules_to_save" in name]
        assert all(p.dtype == torch.float32 for p in moved)
        table_rows.append({"family": family, "base": base, "outputs": labels, "path": str(path)})
    after = fresh_scores([{"path": row.pop("path"), "ids": sequences()} for row in table_rows])
    for row, old, new in zip(table_rows, before, after, strict=True):
        assert "scores" in new, (row, new)
        assert len(new["scores"]) == len(sequences()) * row["outputs"]
        row["std"] = old.std().item()
        row["max_change"] = max_change(old, new["scores"])
    return table_rows


def check(rows):
    assert [row for row in rows if not row["max_change"] <= LIMITS[row["base"]]] == []
    assert all(row["std"] > 0.02 for row in rows), rows


def test_token_heads_survive_a_reload_in_a_fresh_process_with_another_seed(tmp_path, capsys):
    rows = matrix(SHORT, tmp_path)
    assert len(rows) == 10
    assert {row["base"] for row in rows} == set(QUANTIZED)
    assert {row["outputs"] for row in rows} == set(LABELS)
    check(rows)
    print(table("Token heads: change of outputs after a reload", rows))


@pytest.mark.slow
def test_the_full_matrix_of_token_heads(tmp_path):
    rows = matrix(FULL, tmp_path)
    assert len(rows) == 72
    check(rows)
    print(table("Token heads, in full: change of outputs after a reload", rows))


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_the_sidecar_says_what_the_outputs_are(family, peft, tmp_path):
    base = save_tiny_model(tmp_path / "base", family)
    targets = ["query", "value"] if family == "bert" else ["q_proj", "v_proj"]
    kwargs = {"peft_config": LoraConfig(target_modules=targets)} if peft else {}
    head_class = "token" if family == "bert" else "sequence"
    shared = {"is_adapter": peft, "head_class": head_class, "schema_version": 1}
    head = "classifier" if family == "bert" else "score"
    want = {
        "orm": {
            "kind": "outcome", "num_labels": 1, "outputs_per_category": 1, "categories": None, "loss_type": "bce",
            "label_placement": "all", "step_separator": None, "label_meaning": "log-odds of right",
        },
        "prm": {
            "kind": "process", "num_labels": 3, "outputs_per_category": 3, "categories": None, "loss_type": "ce",
            "label_placement": "last", "step_separator": "\n\n", "label_meaning": "class logits: -1, 0, 1",
        },
        "segment": {
            "kind": "segment", "num_labels": 4, "outputs_per_category": 2, "categories": ["length", "tone"],
            "loss_type": "ce", "label_placement": "all", "step_separator": None,
            "label_meaning": "class logits: wrong, right",
        },
    }  # fmt: skip
    arguments = {
        "orm": (outcome_rows(8), {}),
        "prm": (step_rows(8, classes=3), dict(num_labels=3, step_separator="\n\n")),
        "segment": (segment_rows(8, binary=True), dict(loss_type="ce", num_labels=2, label_placement="all")),
    }
    for kind, (rows, config) in arguments.items():
        trainer = tiny_trainer(kind, base, tmp_path / kind, rows, trainer_kwargs=kwargs, max_steps=1, **config)
        trainer.train()
        trainer.save_model()
        found = json.loads((tmp_path / kind / "reward_model.json").read_text())
        assert found["head_modules"] == [head]
        assert {name: found[name] for name in {**shared, **want[kind]}} == {**shared, **want[kind]}
        loaded = load_reward_model(tmp_path / kind)
        assert get_sidecar(loaded) == read_sidecar(tmp_path / kind)
        row = trainer.train_dataset[0]
        assert max_change(logits_of(loaded, row), logits_of(trainer, row)) < 1e-5


@pytest.mark.parametrize("kind", ["orm", "prm", "segment"])
@pytest.mark.parametrize("quantized", [False, True], ids=["fp32", "nf4"])
def test_merged_adapters_give_the_same_outputs(kind, quantized, base, tmp_path):
    """Also where the adapter was trained on a 4-bit base."""
    kwargs = {"peft_config": lora(), "quantization_config": nf4() if quantized else None}
    trainer = tiny_trainer(kind, base, tmp_path / "adapter", trainer_kwargs=kwargs, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    report = merge_reward_model(tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    assert report["max_change"] < 1e-4
    merged = load_reward_model(tmp_path / "merged")
    sidecar = get_sidecar(merged)
    assert not sidecar.is_adapter
    assert (sidecar.kind, sidecar.categories) == (trainer.kind, get_sidecar(trainer.model).categories)
    assert max_change(scores_of(merged), scores_of(trainer.model)) < 1e-4


def test_another_width_or_other_categories_are_refused(base, tmp_path, caplog):
    for kwargs, folder in (({}, "full"), ({"peft_config": lora()}, "lora")):
        tiny_trainer("prm", base, tmp_path / folder, trainer_kwargs=kwargs, num_labels=2).save_model()
        with pytest.raises(HeadError, match="num_labels=3|Needed: 3"):
            tiny_trainer("prm", tmp_path / folder, tmp_path, step_rows(4, classes=3), num_labels=3)
    tiny_trainer("segment", base, tmp_path / "segment").save_model()
    with pytest.raises(
        ValueError, match=r"the categories \['length', 'tone'\], but `categories` is \['tone', 'length'\]"
    ):
        tiny_trainer("segment", tmp_path / "segment", tmp_path, categories=["tone", "length"])
    again = tiny_trainer("segment", tmp_path / "segment", tmp_path, rows=None)
    assert get_sidecar(again.model).categories == ["length", "tone"]
    caplog.clear()
    tiny_trainer("prm", tmp_path / "segment", tmp_path)
    assert "trained as 'segment' and is now trained further as 'process'" in caplog.text


def test_a_scalar_outcome_checkpoint_is_a_plain_sequence_classification_model(base, tmp_path):
    """Plain transformers gives the trainer's score, as the pad token is dedicated."""
    rows = outcome_rows(12)
    trainer = tiny_trainer("orm", base, tmp_path, rows, max_steps=3, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    plain, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert plain.config.num_labels == 1
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(12)])
    with torch.no_grad():
        scores = plain.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    want = [logits_of(trainer, trainer.train_dataset[i])[-1, 0].item() for i in range(12)]
    assert scores.tolist() == pytest.approx(want, abs=1e-5)
    assert scores.std() > 0.01


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_token_classification_models_of_others_load(peft, base, tmp_path):
    """A PRM checkpoint of TRL <= 1.13: a token-classification model without a sidecar, full or with LoRA."""
    model = AutoModelForTokenClassification.from_pretrained(base, num_labels=2)
    trainer = tiny_trainer("prm", model, tmp_path, trainer_kwargs={"peft_config": lora()} if peft else {})
    trainer.train()
    trainer.save_model()
    assert read_sidecar(tmp_path).head_class == "token"
    with_sidecar = scores_of(load_reward_model(tmp_path))
    assert max_change(with_sidecar, scores_of(trainer.model)) < 1e-5
    (tmp_path / "reward_model.json").unlink()
    loaded = load_reward_model(tmp_path)
    assert type(loaded.get_base_model() if peft else loaded).__name__ == "LlamaForTokenClassification"
    assert max_change(scores_of(loaded), with_sidecar) == 0


def test_a_kind_of_the_future_is_refused(base, tmp_path):
    tiny_trainer("orm", base, tmp_path).save_model()
    path = tmp_path / "reward_model.json"
    path.write_text(path.read_text().replace('"outcome"', '"hologram"'))
    with pytest.raises(SidecarError, match="'hologram'"):
        load_reward_model(tmp_path)


def test_a_lost_output_is_noticed(base, tmp_path):
    """The probes hold every output of the head, not only the first."""
    data = Dataset.from_list(step_rows(8, classes=3))
    tiny_trainer("prm", base, tmp_path, data, num_labels=3).save_model()
    path = tmp_path / "reward_model.json"
    content = json.loads(path.read_text())
    assert len(content["probes"]["scores"]) == 3 * len(content["probes"]["input_ids"])
    content["probes"]["scores"][2] += 10
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="probes moved"):
        load_reward_model(tmp_path)
