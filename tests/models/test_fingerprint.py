"""The identity of a model: every file that changes its outputs changes it, and nothing else does."""

import json
import os
import shutil

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from tokenizers import pre_tokenizers, processors
from transformers import AutoModelForCausalLM

from tests.tiny import save_tiny_model, tiny_tokenizer
from trl_ext.models.fingerprint import fingerprint, model_identity, path_identity, tokenizer_identity


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with its weights in two forms, and an adapter on it in two forms."""
    root = tmp_path_factory.mktemp("models")
    full = save_tiny_model(root / "full", "llama")
    model = AutoModelForCausalLM.from_pretrained(full)
    torch.save(model.state_dict(), full / "pytorch_model.bin")
    (full / "chat_template.jinja").write_text("{{ messages }}")
    (full / "additional_chat_templates").mkdir()
    (full / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (full / "modeling_own.py").write_text("# code that comes with the model\n")
    adapted = PeftModel(model, LoraConfig(r=2, target_modules="all-linear"))
    adapted.save_pretrained(root / "adapter")
    adapted.save_pretrained(root / "adapter", safe_serialization=False)
    return root


FILES = {
    "full": (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "modeling_own.py",
    ),
    "adapter": ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
}


@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind, files in FILES.items() for file in files])
def test_every_file_of_a_model_belongs_to_it(kind, file, folders, tmp_path):
    folder = shutil.copytree(folders / kind, tmp_path / "copy")
    before = model_identity(folder)
    content = (folder / file).read_bytes()
    # as many bytes as before; of JSON that is read, a space more
    changed = content + b" " if file == "adapter_config.json" else content[:-1] + bytes([content[-1] ^ 1])
    (folder / file).write_bytes(changed)
    assert model_identity(folder) != before
    (folder / file).unlink()
    assert model_identity(folder) != before


def test_the_folder_on_which_an_adapter_is_loaded_belongs_to_it(folders, tmp_path):
    base = shutil.copytree(folders / "full", tmp_path / "base")
    folder = shutil.copytree(folders / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    before = model_identity(folder)
    (base / "pytorch_model.bin").write_bytes(b"other weights")
    assert model_identity(folder) != before


def test_a_place_a_date_and_other_files_do_not(folders, tmp_path):
    for kind in FILES:
        copy = shutil.copytree(folders / kind, tmp_path / kind)
        for path in copy.rglob("*"):
            os.utime(path, (1, 1))
        for name in ("trainer_state.json", "training_args.bin", "optimizer.bin", "README.md", "report.json"):
            (copy / name).write_text("something")
        assert model_identity(copy) == model_identity(str(folders / kind)) == fingerprint(folders / kind)


def test_a_model_in_memory_is_its_tensors(folders):
    models = [AutoModelForCausalLM.from_pretrained(folders / "full") for _ in range(2)]
    assert model_identity(models[0]) == model_identity(models[1])
    with torch.no_grad():
        models[0].lm_head.weight[0] += 1
    assert model_identity(models[0]) != model_identity(models[1])


def test_a_model_of_the_hub_is_its_name_and_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for commit in ("0" * 40, "1" * 40):
        (tmp_path / "models--org--name" / "snapshots" / commit).mkdir(parents=True)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("1" * 40)
    assert model_identity("org/name") == f"org/name@{'1' * 40}"
    assert model_identity("org/name", "0" * 40) == f"org/name@{'0' * 40}"
    with pytest.raises(FileNotFoundError, match="org/other is not a folder here"):
        model_identity("org/other")


def test_a_path_is_its_content_and_a_name_is_itself(folders, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("one")
    one = path_identity(template)
    template.write_text("two")
    assert path_identity(template) != one
    assert path_identity(folders / "full") == fingerprint(folders / "full")
    assert path_identity("org/name") == "org/name"


def test_a_tokenizer_is_the_ids_that_it_makes_and_where_a_text_ends():
    def change(name, value):
        tokenizer = tiny_tokenizer()
        setattr(tokenizer, name, value)
        return tokenizer_identity(tokenizer)

    before = tokenizer_identity(tiny_tokenizer())
    word = next(token for token in sorted(tiny_tokenizer().get_vocab()) if token.isalpha())
    changed = [change("eos_token", word), change("bos_token", word), change("chat_template", "{{ messages }}")]
    framed = tiny_tokenizer()
    framed.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")  # no BOS
    split = tiny_tokenizer()
    split.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    changed += [tokenizer_identity(framed), tokenizer_identity(split)]
    assert len({before, *changed}) == 6

    used = tiny_tokenizer()
    used(["a", "b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_identity(used) == change("pad_token", word) == change("padding_side", "left") == before


def test_of_a_model_in_memory_the_way_lora_is_applied_counts(folders):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders / "full"), folders / "adapter")
    before = model_identity(model)
    assert model_identity(model) == before
    with model.disable_adapter():
        assert model_identity(model) != before
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(2.0)
    assert model_identity(model) != before


def test_of_a_model_in_memory_its_config_and_its_end_tokens_count_and_its_place_does_not(folders, tmp_path):
    def load(folder=folders / "full", **changes):
        return AutoModelForCausalLM.from_pretrained(folder, **changes)

    before = model_identity(load())
    assert model_identity(load(shutil.copytree(folders / "full", tmp_path / "moved"))) == before
    assert model_identity(load(rms_norm_eps=0.5)) != before
    model = load()
    model.config.use_cache, model.config.pad_token_id = False, 3  # as a trainer sets them
    assert model_identity(model) == before
    model.generation_config.eos_token_id = [1, 2]
    assert model_identity(model) != before
