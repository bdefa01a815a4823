"""What the head of each family is made of, and that it is trained, saved and complete or refused."""

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.models.helpers import make_trainer, nf4, tiny_base, train
from tests.tiny import DECODER_FAMILIES, ENCODER_FAMILIES, pair_rows, save_tiny_model, tiny_config, tiny_tokenizer
from trl_ext.models import HeadError, add_adapter, build_reward_model, head_modules, load_reward_model
from trl_ext.models.heads import Float32Linear, check_head_trains, head_parameters, make_head_exact
from trl_ext.models.loading import check_saved_head


# family -> modules of the head and its parameters: everything that a language-model checkpoint does not bring along
HEADS = {
    "llama": {"score": ["weight"]},
    "qwen2": {"score": ["weight"]},
    "qwen3": {"score": ["weight"]},
    "mistral": {"score": ["weight"]},
    "gemma2": {"score": ["weight"]},
    "gemma3_text": {"score": ["weight"]},
    "gpt2": {"score": ["weight"]},
    "opt": {"score": ["weight"]},
    "phi3": {"score": ["weight"]},
    "olmo2": {"score": ["weight"]},
    "mixtral": {"score": ["weight"]},
    "qwen3_moe": {"score": ["weight"]},
    "bert": {"classifier": ["weight", "bias"], "bert.pooler": ["dense.weight", "dense.bias"]},
    "roberta": {"classifier": ["dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"]},
    "deberta-v2": {"pooler": ["dense.weight", "dense.bias"], "classifier": ["weight", "bias"]},
    # the masked language model brings `head` along, so only `classifier` starts random; both are trained and saved
    "modernbert": {"head": ["dense.weight", "norm.weight"], "classifier": ["weight", "bias"]},
}
ATTENTION = {"gpt2": "c_attn", "phi3": "qkv_proj", "bert": "query", "roberta": "query", "deberta-v2": "query_proj"}
ATTENTION |= {"modernbert": "Wqkv"}


def test_the_table_has_every_family():
    assert set(HEADS) == {*DECODER_FAMILIES, *ENCODER_FAMILIES}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: tiny_base(folder / family, family) for family in HEADS}


@pytest.mark.parametrize("family", HEADS)
def test_head_of_the_family_is_trained_in_fp32(bases, family):
    expected = {f"{module}.{name}" for module, names in HEADS[family].items() for name in names}
    model, head = build_reward_model(bases[family], dtype="bfloat16")
    assert set(head) == set(HEADS[family])
    peft_model = add_adapter(model, LoraConfig(target_modules=[ATTENTION.get(family, "q_proj")]), head)
    check_head_trains(peft_model, head)
    parameters = head_parameters(peft_model, head)
    assert set(parameters) == expected
    assert all(p.dtype == torch.float32 and p.requires_grad for p in parameters.values())
    trained = {name for name, p in peft_model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert len(trained) == len(expected), f"trained beside LoRA and head: {trained}"


@pytest.mark.parametrize("family", HEADS)
def test_head_covers_what_the_checkpoint_lacks(bases, family):
    _, info = AutoModelForSequenceClassification.from_pretrained(
        bases[family], num_labels=1, output_loading_info=True, dtype=torch.float32
    )
    expected = {f"{module}.{name}" for module, names in HEADS[family].items() for name in names}
    assert info["missing_keys"], "a checkpoint that has a head already proves nothing"
    assert set(info["missing_keys"]) <= expected


@pytest.mark.parametrize("family", ["llama", "deberta-v2", "modernbert", "qwen3_moe"])
def test_all_linear_on_nf4_leaves_the_head_alone(bases, family):
    model, head = build_reward_model(bases[family], quantization_config=nf4())
    peft_model = add_adapter(model, LoraConfig(target_modules="all-linear", task_type="TOKEN_CLS"), head)
    check_head_trains(peft_model, head)
    adapted = {name for name, _ in peft_model.named_modules() if name.endswith("lora_A")}
    assert adapted and not [name for name in adapted if any(f".{h}." in name for h in head)]


def test_seed_decides_the_head_as_in_trl(bases, tmp_path):
    arguments = dict(report_to="none", bf16=False, use_cpu=True, seed=7)
    ours = make_trainer(bases["llama"], tmp_path, seed=7).model.score.weight
    data = Dataset.from_list(pair_rows(8))
    theirs = trl.RewardTrainer(bases["llama"], trl.RewardConfig(str(tmp_path), **arguments), train_dataset=data)
    assert torch.equal(ours, theirs.model.score.weight)


# ------------------------------------------------------------------------------------------------ trained exactly once
def _peft(model, **config):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], **config))


def test_frozen_head_is_refused(bases, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=1, dtype=torch.float32)
    with pytest.raises(HeadError, match=r"`score\.weight` is frozen.*modules_to_save=\['score'\]"):
        make_trainer(_peft(model), tmp_path)


def test_frozen_pooler_is_refused(bases, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(bases["deberta-v2"], num_labels=1, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query_proj"]))
    with pytest.raises(HeadError, match=r"`pooler\.dense\.weight` is frozen"):
        make_trainer(adapted, tmp_path, processing_class=tiny_tokenizer("bert"))


def test_two_trainable_copies_are_refused(bases):
    model = AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=1, dtype=torch.float32)
    adapted = _peft(model, modules_to_save=["score"])
    adapted.base_model.model.score.original_module.weight.requires_grad_(True)
    with pytest.raises(HeadError, match="trained in 2 copies"):
        check_head_trains(adapted, ["score"])


def test_adapter_of_another_name_is_refused_before_training(bases, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=1, dtype=torch.float32)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["score"])
    with pytest.raises(HeadError, match=r"adapters \['reward'\].*'default'"):
        make_trainer(get_peft_model(model, config, adapter_name="reward"), tmp_path)


def test_peft_model_with_modules_to_save_trains(bases, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=1, dtype=torch.bfloat16)
    trainer = train(_peft(model, modules_to_save=["score"]), tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert saved.dtype == torch.float32
    assert torch.equal(saved, head_parameters(trainer.model, ["score"])["score.weight"].detach())


def test_language_model_instance_is_refused(bases, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float32)
    with pytest.raises(HeadError, match="LlamaForCausalLM is a language model.*AutoModelForSequenceClassification"):
        make_trainer(model, tmp_path)


def test_quantized_head_of_an_instance_is_refused(bases, tmp_path):
    config = nf4(llm_int8_skip_modules=["lm_head"])
    model = AutoModelForSequenceClassification.from_pretrained(
        bases["llama"], num_labels=1, quantization_config=config
    )
    with pytest.raises(HeadError, match=r"`score` is a quantized `Linear4bit`.*llm_int8_skip_modules=\['score'\]"):
        make_trainer(model, tmp_path, peft_config=LoraConfig())


def test_checkpoint_without_backbone_weights_is_refused(tmp_path):
    base = save_tiny_model(tmp_path)
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HeadError, match=r"lacks weights.*model\.layers\.1\.mlp\.up_proj\.weight"):
        build_reward_model(str(base))


def test_head_with_another_number_of_labels_is_refused(tmp_path):
    config = tiny_config("llama", 300, num_labels=5, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(HeadError, match=r"`score\.weight` \(5, 32\), needed \(1, 32\).*num_labels=1"):
        build_reward_model(str(tmp_path))


# ---------------------------------------------------------------------------------------------------- saved and loaded
@pytest.fixture(scope="module")
def saved(bases, tmp_path_factory):
    """The folder and model of an adapter on DeBERTa, whose head is made of two modules, and of a full Llama."""
    folder = tmp_path_factory.mktemp("saved")
    config = LoraConfig(target_modules=["query_proj"])
    adapter = train(bases["deberta-v2"], folder / "adapter", peft_config=config)
    full = train(bases["llama"], folder / "full")
    return {"adapter": (folder / "adapter", adapter.model), "full": (folder / "full", full.model)}


TENSORS = {
    "adapter": ("adapter_model.safetensors", "base_model.model.pooler.dense.weight", "pooler.dense.weight"),
    "full": ("model.safetensors", "score.weight", "score.weight"),
}


@pytest.mark.parametrize("damage", ["missing", "empty"])
@pytest.mark.parametrize("kind", TENSORS)
def test_missing_or_empty_head_tensor_fails_on_save_and_load(saved, kind, damage):
    folder, model = saved[kind]
    name, key, plain = TENSORS[kind]
    file = folder / name
    whole = file.read_bytes()
    tensors = load_file(file)
    if damage == "missing":
        del tensors[key]
    else:
        tensors[key] = torch.empty(0)
    save_file(tensors, file, metadata={"format": "pt"})
    try:
        with pytest.raises(HeadError, match=f"`{plain}`.* (missing or|or is) empty"):
            check_saved_head(model, head_modules(model), folder)
        with pytest.raises(HeadError, match=f"`{plain}`"):
            load_reward_model(folder)
    finally:
        file.write_bytes(whole)
    load_reward_model(folder)


def test_head_saved_with_other_values_fails(saved):
    folder, model = saved["full"]
    with torch.no_grad():
        model.score.weight.add_(1.0)
    try:
        with pytest.raises(HeadError, match=r"`score\.weight` differs from the one in memory"):
            check_saved_head(model, ["score"], folder)
    finally:
        with torch.no_grad():
            model.score.weight.copy_(load_file(folder / "model.safetensors")["score.weight"])


def test_old_full_weights_beside_an_adapter_do_not_count(saved, tmp_path):
    folder, model = saved["full"]
    train(str(folder), tmp_path, peft_config=LoraConfig(), seed=3)
    stale = {key: tensor + 1.0 for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(stale, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_reward_model(tmp_path)


def test_plain_trl_adapter_without_head_names_the_key(bases, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=1, dtype=torch.float32)
    get_peft_model(model, LoraConfig()).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(HeadError, match=r"no reward head: `score\.weight` is missing.*trained again"):
        load_reward_model(tmp_path)


# ---------------------------------------------------------------------------------------------------------- the layer
@pytest.mark.parametrize("bias", [True, False])
def test_float32_linear_ignores_autocast_and_input_dtype(bias):
    linear = torch.nn.Linear(16, 3, bias=bias, dtype=torch.bfloat16)
    exact = Float32Linear.from_linear(linear)
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    expected = torch.nn.functional.linear(x.float(), linear.weight.float(), None if not bias else linear.bias.float())
    assert torch.equal(exact(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = exact(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, expected)
    assert set(exact.state_dict()) == set(linear.state_dict())


def test_a_head_that_was_rounded_since_becomes_fp32_again(bases):
    model, head = build_reward_model(bases["llama"])
    layer = model.score
    model.to(torch.bfloat16)
    make_head_exact(model, head)
    assert model.score is layer and layer.weight.dtype == torch.float32
