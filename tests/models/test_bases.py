"""What is in memory when an adapter is trained is what its path holds; adapters of language models as `model`."""

import shutil

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.models.helpers import int8, make_trainer, max_change, nf4, scores_of, tiny_base, train
from tests.tiny import pair_rows
from trl_ext import RewardEnsembleConfig, RewardEnsembleTrainer
from trl_ext.models import BaseMismatchError, HeadError, load_reward_model
from trl_ext.models.bases import describe_base


LORA = LoraConfig(target_modules=["q_proj"])
SKIP = {"llm_int8_skip_modules": ["score"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base"))


def in_memory(base, **kwargs):
    return AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, **({"dtype": torch.float32} | kwargs)
    )


def with_merged_adapter(model):
    """As SFT leaves it: LoRA on one projection only, merged."""
    adapted = get_peft_model(model, LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    return adapted.merge_and_unload()


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "nested nf4", "int8"])
def test_a_base_is_compared_with_what_its_path_holds(base, tmp_path, kind):
    config = {"nf4": nf4(**SKIP), "nested nf4": nf4(bnb_4bit_use_double_quant=True, **SKIP), "int8": int8(**SKIP)}
    kwargs = {"bf16": {"dtype": torch.bfloat16}, "fp32": {}}.get(kind) or (
        {"quantization_config": config[kind]} if kind in config else {}
    )
    trainer = train(in_memory(base, **kwargs), tmp_path / "adapter", peft_config=LORA)
    reloaded = load_reward_model(tmp_path / "adapter")
    assert max_change(scores_of(trainer.model), scores_of(reloaded)) <= 1e-5
    with pytest.raises(
        BaseMismatchError, match="differs from the files in .*: `model.layers.0.self_attn.v_proj.weight` and 1 more"
    ):
        make_trainer(with_merged_adapter(in_memory(base, **kwargs)), tmp_path, peft_config=LORA)


def test_every_way_to_an_adapter_on_a_changed_base_is_refused(base, tmp_path):
    merged = with_merged_adapter(in_memory(base))
    adapted = get_peft_model(merged, LoraConfig(target_modules=["q_proj"], modules_to_save=["score"]))
    with pytest.raises(BaseMismatchError, match="Save the model without an adapter.*and train on that folder"):
        make_trainer(adapted, tmp_path)
    args = RewardEnsembleConfig(str(tmp_path), num_members=2, report_to="none", bf16=False, use_cpu=True)
    rows = Dataset.from_list(pair_rows(4))
    merged, tokenizer = with_merged_adapter(in_memory(base)), AutoTokenizer.from_pretrained(base)
    with pytest.raises(BaseMismatchError, match="differs from the files"):
        RewardEnsembleTrainer(merged, args, train_dataset=rows, processing_class=tokenizer, peft_config=LORA)
    nowhere = AutoModelForSequenceClassification.from_config(in_memory(base).config)
    nowhere.config.name_or_path = ""
    with pytest.raises(BaseMismatchError, match="was not loaded from a folder or Hub repository"):
        make_trainer(nowhere, tmp_path, peft_config=LORA, processing_class=tokenizer)
    train(nowhere, tmp_path / "full", processing_class=tokenizer)  # a full model is saved with all its weights
    load_reward_model(tmp_path / "full")


def test_the_cure_works(base, tmp_path):
    merged = with_merged_adapter(in_memory(base))
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "merged")
    trainer = train(str(tmp_path / "merged"), tmp_path / "adapter", peft_config=LORA)
    assert max_change(scores_of(trainer.model), scores_of(load_reward_model(tmp_path / "adapter"))) <= 1e-6


def test_resized_embeddings_and_trained_biases_are_no_change(base, tmp_path):
    model = in_memory(base)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    trainer = train(model, tmp_path / "resized", peft_config=LORA)
    assert max_change(scores_of(trainer.model), scores_of(load_reward_model(tmp_path / "resized"))) <= 1e-6
    gpt2 = tiny_base(tmp_path / "gpt2", "gpt2")
    train(gpt2, tmp_path / "bias", peft_config=LoraConfig(bias="all"), learning_rate=1e-2)
    further = train(load_reward_model(tmp_path / "bias", is_trainable=True), tmp_path / "further",
                    processing_class=AutoTokenizer.from_pretrained(gpt2))  # fmt: skip
    assert max_change(scores_of(further.model), scores_of(load_reward_model(tmp_path / "further"))) <= 1e-6


# ---------------------------------------------------------------------------------------- adapters of language models
@pytest.fixture(scope="module")
def sft(base, tmp_path_factory):
    """The folder of an adapter as SFT saves it."""
    folder = tmp_path_factory.mktemp("sft")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_the_adapter_of_a_language_model_is_merged_and_trained_in_full(base, sft, tmp_path, caplog):
    trainer = make_trainer(str(sft), tmp_path)
    assert f"It is merged into {base} in memory, and the model gets a new reward head" in caplog.text
    language = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(language, sft).merge_and_unload()
    for name, weight in merged.model.named_parameters():
        assert torch.equal(weight, trainer.model.model.get_parameter(name)), name
    trainer.train()
    trainer.save_model()
    assert max_change(scores_of(trainer.model), scores_of(load_reward_model(tmp_path))) <= 1e-6


def test_an_adapter_on_the_adapter_of_a_language_model_is_refused_with_the_cure(sft, tmp_path):
    said = r"is the adapter of a language model.*AutoPeftModelForCausalLM.*merge_and_unload.*pass the folder"
    for kwargs in ({}, {"quantization_config": nf4()}):
        with pytest.raises(ValueError, match=said):
            make_trainer(str(sft), tmp_path, peft_config=LORA, **kwargs)
    args = RewardEnsembleConfig(str(tmp_path), num_members=2, report_to="none", bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match=said):
        RewardEnsembleTrainer(str(sft), args, train_dataset=Dataset.from_list(pair_rows(4)), peft_config=LORA)
    with pytest.raises(HeadError, match="adapter of a language model.*RewardTrainer takes this folder as `model`"):
        load_reward_model(sft)
    language = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path / "b")), LORA)
    with pytest.raises(HeadError, match="is a language model.*merge_and_unload"):
        make_trainer(language, tmp_path)


def test_a_value_head_is_named(sft, tmp_path, caplog):
    folder = tmp_path / "llama-factory"
    shutil.copytree(sft, folder)
    save_file({"v_head.summary.weight": torch.zeros(1, 64)}, folder / "value_head.safetensors")
    with pytest.raises(HeadError, match=r"value head \(value_head.safetensors\), as LlamaFactory saves it"):
        load_reward_model(folder)
    make_trainer(str(folder), tmp_path / "out")
    assert "the value head beside the adapter is ignored" in caplog.text


@pytest.mark.parametrize("in_cache", [True, False])
def test_a_base_from_the_cache_of_the_hub_is_recorded_by_its_id(base, tmp_path, monkeypatch, in_cache):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path if in_cache else tmp_path / "elsewhere"))
    model = in_memory(base)
    folder = tmp_path / "models--somebody--tiny" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    model.config._name_or_path = str(folder)
    found = describe_base(model)
    assert (found.id, found.revision) == (("somebody/tiny", "0123abcd") if in_cache else (str(folder), None))
