"""A reward model is loaded on the base it was trained on, or not at all; damaged sidecars are refused."""

import json
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from tests.models.helpers import int8, max_change, nf4, scores_of, tiny_base, train
from tests.tiny import save_tiny_model, tiny_tokenizer
from trl_ext.models import (
    BaseMismatchError,
    HeadError,
    SidecarError,
    get_sidecar,
    load_reward_model,
    merge_reward_model,
    read_sidecar,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


@pytest.fixture(scope="module")
def adapter(folder):
    """An NF4 adapter: (path, trainer)."""
    base = tiny_base(folder / "first")
    tiny_base(folder / "second", seed=1)
    path = folder / "adapter"
    return path, train(base, path, peft_config=LoraConfig(), quantization_config=nf4(), learning_rate=1e-2)


MISMATCHES = {
    "no quantization": ({"quantization_config": None}, "quantization .*nf4.*, asked for None"),
    "int8": ({"quantization_config": int8()}, "asked for .*load_in_8bit"),
    "double quantization": ({"quantization_config": nf4(bnb_4bit_use_double_quant=True)}, "use_double_quant': True"),
    "dtype": ({"dtype": torch.bfloat16}, "dtype float32, asked for torch.bfloat16"),
    "dtype by name": ({"dtype": "bfloat16"}, "dtype float32, asked for bfloat16"),
    "dtype by its old name": ({"torch_dtype": "bfloat16"}, "dtype float32, asked for bfloat16"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_another_quantization_or_dtype_is_refused(adapter, name):
    arguments, words = MISMATCHES[name]
    with pytest.raises(BaseMismatchError, match=words):
        load_reward_model(adapter[0], **arguments)


def test_another_base_is_refused(adapter, folder):
    with pytest.raises(BaseMismatchError, match="second.*allow_base_mismatch=True"):
        load_reward_model(adapter[0], base_model=str(folder / "second"))


def test_naming_what_was_recorded_is_no_mismatch(adapter, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for base in (str(folder / "first"), "first", folder / "first"):
        model = load_reward_model(adapter[0], base_model=base, quantization_config=nf4(), dtype="float32")
        assert max_change(scores_of(adapter[1].model), scores_of(model)) <= 1e-6


@pytest.mark.parametrize("name", ["no quantization", "int8", "dtype", "base"])
def test_opting_in_loads_and_says_how_far_the_scores_moved(adapter, folder, name, caplog):
    arguments = {"base_model": str(folder / "second")} if name == "base" else MISMATCHES[name][0]
    with caplog.at_level(logging.INFO, logger="trl_ext"):
        model = load_reward_model(adapter[0], allow_base_mismatch=True, **arguments)
    moved = max_change(scores_of(adapter[1].model), scores_of(model))
    assert moved > 0
    said = [r for r in caplog.records if "probes moved by at most" in r.getMessage()]
    assert len(said) == 1 and said[0].levelno == logging.WARNING
    assert "% of their standard deviation" in said[0].getMessage()
    if name == "base":
        assert moved > 0.3


def test_drift_is_logged_when_all_is_well(adapter, caplog):
    with caplog.at_level(logging.INFO, logger="trl_ext"):
        load_reward_model(adapter[0])
    said = [r for r in caplog.records if "probes moved by at most 0 " in r.getMessage()]
    assert len(said) == 1 and said[0].levelno == logging.INFO


@pytest.mark.parametrize("quantization", [None, nf4()], ids=["fp32", "nf4"])
def test_a_silently_replaced_base_is_caught_by_the_probes(tmp_path, quantization):
    base = tiny_base(tmp_path / "base")
    train(base, tmp_path / "adapter", peft_config=LoraConfig(), quantization_config=quantization)
    load_reward_model(tmp_path / "adapter")
    tiny_base(tmp_path / "base", seed=1)  # same path, other weights
    with pytest.raises(BaseMismatchError, match="probes moved by at most.*not the one it was trained on"):
        load_reward_model(tmp_path / "adapter")
    with pytest.raises(BaseMismatchError):
        merge_reward_model(tmp_path / "adapter", tmp_path / "merged")
    load_reward_model(tmp_path / "adapter", allow_base_mismatch=True)


def test_a_base_that_is_gone_says_what_to_do(tmp_path):
    base = tiny_base(tmp_path / "base")
    train(base, tmp_path / "adapter", peft_config=LoraConfig())
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(BaseMismatchError, match="which does not exist here.*`base_model=`"):
        load_reward_model(tmp_path / "adapter")
    model = load_reward_model(tmp_path / "adapter", base_model=str(tmp_path / "moved"), allow_base_mismatch=True)
    assert scores_of(model).isfinite().all()


@pytest.mark.parametrize("quantization", [None, nf4()], ids=["fp32", "nf4"])
def test_a_base_that_moved_is_compared_by_content(tmp_path, caplog, quantization):
    base = tiny_base(tmp_path / "base")
    trainer = train(base, tmp_path / "adapter", peft_config=LoraConfig(), quantization_config=quantization)
    shutil.move(base, tmp_path / "moved")
    caplog.clear()
    model = load_reward_model(tmp_path / "adapter", base_model=tmp_path / "moved")
    assert max_change(scores_of(trainer.model), scores_of(model)) <= 1e-6
    merge_reward_model(tmp_path / "adapter", tmp_path / "merged", base_model=tmp_path / "moved")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING and "trl_ext" in record.name]
    # another base, if only by a little: the drift of a kernel would let it pass
    file = tmp_path / "moved" / "model.safetensors"
    tensors = {key: tensor * 1.005 for key, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match="probes moved.*The base at .*moved' is not the one"):
        load_reward_model(tmp_path / "adapter", base_model=tmp_path / "moved")


def test_a_base_that_moved_and_cannot_be_compared_is_refused(tmp_path):
    base = tiny_base(tmp_path / "base")
    train(base, tmp_path / "adapter", peft_config=LoraConfig())
    shutil.move(base, tmp_path / "moved")
    sidecar = read_sidecar(tmp_path / "adapter")
    sidecar.probes = None  # as of a sharded run
    sidecar.save(tmp_path / "adapter")
    with pytest.raises(BaseMismatchError, match="without probes to compare"):
        load_reward_model(tmp_path / "adapter", base_model=tmp_path / "moved")
    load_reward_model(tmp_path / "adapter", base_model=tmp_path / "moved", allow_base_mismatch=True)


def test_a_base_of_another_shape_and_a_base_of_a_full_model_are_refused(tmp_path):
    train(tiny_base(tmp_path / "base"), tmp_path / "adapter", peft_config=LoraConfig())
    other = tiny_base(tmp_path / "other", hidden_size=128, head_dim=32)
    with pytest.raises((BaseMismatchError, HeadError), match="other|adapter"):
        load_reward_model(tmp_path / "adapter", base_model=other)
    train(tmp_path.joinpath("base").as_posix(), tmp_path / "full")
    with pytest.raises(ValueError, match="is a full checkpoint and needs no base"):
        load_reward_model(tmp_path / "full", base_model=other)


def test_a_relative_base_is_found_from_anywhere(tmp_path, monkeypatch):
    save_tiny_model(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    trainer = train("base", "adapter", peft_config=LoraConfig())
    monkeypatch.chdir("/")
    assert max_change(scores_of(trainer.model), scores_of(load_reward_model(tmp_path / "adapter"))) <= 1e-6


def test_tampered_lora_weights_are_caught_by_the_probes(adapter, tmp_path):
    shutil.copytree(adapter[0], tmp_path / "copy")
    file = tmp_path / "copy" / "adapter_model.safetensors"
    tensors = {key: tensor * 8 if "lora_B" in key else tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match="probes moved"):
        load_reward_model(tmp_path / "copy")


# ------------------------------------------------------------------------------------------------------------ sidecars
@pytest.fixture
def copy(adapter, tmp_path):
    """A copy of the adapter's folder, and a function that edits its sidecar."""
    shutil.copytree(adapter[0], tmp_path / "copy")
    file = tmp_path / "copy" / "reward_model.json"

    def edit(change):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return tmp_path / "copy", edit


def test_newer_schema_is_refused(copy):
    path, edit = copy
    edit(lambda content: content.update(schema_version=99))
    with pytest.raises(SidecarError, match="schema version 99.*Upgrade trl-ext"):
        load_reward_model(path)


@pytest.mark.parametrize("text", ["{", "[]", '"text"', '{"schema_version": 1, "base": "gpt2"}', "{}", "null"])
def test_unreadable_sidecar_is_refused(copy, text):
    path, _ = copy
    (path / "reward_model.json").write_text(text)
    with pytest.raises(SidecarError, match=r"reward_model\.json"):
        load_reward_model(path)


def test_binary_sidecar_is_refused(copy):
    path, _ = copy
    (path / "reward_model.json").write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(SidecarError, match="not valid JSON"):
        load_reward_model(path)


@pytest.mark.parametrize("field", ["base", "is_adapter", "head_modules", "token_policy", "schema_version"])
def test_missing_field_is_named(copy, field):
    path, edit = copy
    edit(lambda content: content.pop(field))
    with pytest.raises(SidecarError, match=field.replace("_", ".")):
        load_reward_model(path)


def test_unknown_keys_are_ignored_with_a_warning(copy, adapter, caplog):
    path, edit = copy

    def newer(content):
        content["colour"] = "blue"
        content["base"]["weight"] = 3

    edit(newer)
    with caplog.at_level(logging.WARNING, logger="trl_ext"):
        model = load_reward_model(path)
    assert "ignored unknown keys ['colour']" in caplog.text and "['weight']" in caplog.text
    assert max_change(scores_of(adapter[1].model), scores_of(model)) <= 1e-6


def test_sidecar_of_something_else_is_refused(copy):
    path, edit = copy
    edit(lambda content: content.update(is_adapter=False))
    with pytest.raises(SidecarError, match="describes a full model, but the folder holds an adapter"):
        load_reward_model(path)


def test_unknown_kind_is_refused(copy):
    path, edit = copy
    edit(lambda content: content.update(kind="hologram"))
    with pytest.raises(SidecarError, match="kind 'hologram'"):
        load_reward_model(path)


def test_sidecar_round_trip(copy):
    path, _ = copy
    sidecar = read_sidecar(path)
    sidecar.normalizer = {"mean": 0.5, "std": 2.0}
    sidecar.save(path)
    assert read_sidecar(path) == sidecar
    assert get_sidecar(load_reward_model(path)).normalizer == {"mean": 0.5, "std": 2.0}


# ----------------------------------------------------------------------------------------------------- without sidecar
def test_trl_trained_adapter_without_sidecar_loads(folder, tmp_path, adapter):
    base = str(folder / "first")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    trained = get_peft_model(model, LoraConfig(task_type="SEQ_CLS"))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    trained.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_reward_model(tmp_path)
    assert get_sidecar(loaded) is None
    assert max_change(scores_of(trained), scores_of(loaded)) <= 1e-6


def test_trl_trained_full_model_without_sidecar_loads(folder, tmp_path, adapter):
    model = AutoModelForSequenceClassification.from_pretrained(folder / "first", num_labels=1, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert max_change(scores_of(model), scores_of(load_reward_model(tmp_path))) <= 1e-6


def test_a_path_that_is_no_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_reward_model(tmp_path / "nothing")
