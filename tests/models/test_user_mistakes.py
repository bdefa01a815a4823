"""What users write in `LoraConfig`, `model_init_kwargs` and launch commands: it works, or says why not."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
from transformers.utils import is_flash_attn_2_available

from tests.models.helpers import make_trainer, max_change, nf4, scores_of, tiny_base, train
from tests.tiny import tiny_tokenizer
from trl_ext.models import HeadError, build_reward_model, load_reward_model
from trl_ext.pipelines.generation.transformers_backend import load_policy


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: tiny_base(folder / family, family) for family in ("llama", "roberta")}


@pytest.mark.skipif(is_flash_attn_2_available(), reason="the package is installed")
@pytest.mark.parametrize("load", [build_reward_model, load_policy])
def test_an_attention_that_is_not_installed_is_said(bases, load):
    arguments = {"attn_implementation": "flash_attention_2"}
    with pytest.raises(ImportError, match="'flash_attention_2' cannot be used here.*Needed.*Install the package"):
        load(bases["llama"], arguments) if load is load_policy else load(bases["llama"], **arguments)


# ---------------------------------------------------------------------------------------------------------- LoraConfig
@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", ["q_proj", "score"]), ("roberta", ["query", "classifier.dense"]), ("roberta", ["query", "out_proj"])],
)
def test_a_target_that_names_the_head_is_said_and_the_head_trained_in_full(bases, tmp_path, family, targets, caplog):
    trainer = train(bases[family], tmp_path, peft_config=LoraConfig(target_modules=targets))
    assert f"names the reward head ['{targets[1]}']" in caplog.text
    adapted = {name.rsplit(".lora_A", 1)[0] for name, _ in trainer.model.named_modules() if name.endswith("lora_A")}
    assert adapted and all(name.endswith(targets[0]) for name in adapted)
    load_reward_model(tmp_path)
    with pytest.raises(ValueError, match=f"names the reward head .'{targets[1]}'. and nothing else"):
        make_trainer(bases[family], tmp_path, peft_config=LoraConfig(target_modules=targets[1:]))


def test_a_target_that_is_in_backbone_and_head_adapts_the_backbone_only(bases, tmp_path):
    trainer = train(bases["roberta"], tmp_path, peft_config=LoraConfig(target_modules=["dense"]))
    adapted = {name for name, _ in trainer.model.named_modules() if name.endswith("lora_A")}
    assert adapted and not any("classifier" in name for name in adapted)
    load_reward_model(tmp_path)


def test_prompt_tuning_is_refused(bases, tmp_path):
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="PromptTuningConfig cannot store a trained reward head"):
        make_trainer(bases["llama"], tmp_path, peft_config=config)


def test_adapter_path_with_another_peft_config_is_refused(bases, tmp_path):
    train(bases["llama"], tmp_path / "first", peft_config=LoraConfig())
    with pytest.raises(ValueError, match="has an adapter already.*merge it first"):
        make_trainer(str(tmp_path / "first"), tmp_path / "second", peft_config=LoraConfig())


@pytest.mark.parametrize("exclude", [r".*\.layers\.0\..*", ["layers.0.self_attn.q_proj"], None])
def test_the_users_exclusions_are_kept(bases, tmp_path, exclude):
    config = LoraConfig(target_modules=["q_proj"], exclude_modules=exclude)
    trainer = train(bases["llama"], tmp_path, peft_config=config)
    adapted = [name for name, _ in trainer.model.named_modules() if name.endswith("q_proj.lora_A")]
    assert len(adapted) == (2 if exclude is None else 1)
    given = LoraConfig(target_modules=["q_proj"], exclude_modules=exclude)
    assert config.to_dict() == given.to_dict(), "the user's config was changed"
    assert max_change(scores_of(trainer.model), scores_of(load_reward_model(tmp_path))) <= 1e-6


def test_pattern_targets_and_own_modules_to_save(bases, tmp_path):
    config = LoraConfig(target_modules=r".*", exclude_modules=["embed_tokens"], modules_to_save=["norm", "lm_head"])
    trainer = train(bases["llama"], tmp_path, peft_config=LoraConfig(target_modules=r".*\.(q_proj|score)"))
    assert not any("score.lora" in name for name, _ in trainer.model.named_modules())
    assert config.modules_to_save == ["norm", "lm_head"]
    trainer = train(
        bases["llama"], tmp_path / "b", peft_config=LoraConfig(modules_to_save=["norm"]), learning_rate=1e-2
    )
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("model.norm" in name for name in trained) and any("score" in name for name in trained)
    assert max_change(scores_of(trainer.model), scores_of(load_reward_model(tmp_path / "b"))) <= 1e-6


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(use_dora=True),
        LoraConfig(use_rslora=True, bias="lora_only"),
        IA3Config(),
        VeraConfig(target_modules=["q_proj"]),
    ],
    ids=["dora", "rslora", "ia3", "vera"],
)
def test_other_tuners_survive_a_reload(bases, tmp_path, config):
    trainer = train(bases["llama"], tmp_path, peft_config=config, learning_rate=1e-2)
    assert max_change(scores_of(trainer.model), scores_of(load_reward_model(tmp_path))) <= 1e-5


@pytest.mark.parametrize("quantization", [None, nf4()], ids=["fp32", "nf4"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "eva"])
def test_an_initialisation_that_cannot_be_loaded_again_is_refused(bases, tmp_path, init, quantization):
    config = LoraConfig(target_modules=["q_proj"])
    config.init_lora_weights = init  # as a config read from a file has it
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' .*Use init_lora_weights=True"):
        make_trainer(bases["llama"], tmp_path, peft_config=config, quantization_config=quantization)


def test_an_adapter_in_memory_that_cannot_be_loaded_again_is_refused(bases, tmp_path):
    def adapted(**kwargs):
        model = AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=1, dtype=torch.float32)
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["score"], **kwargs))

    with pytest.raises(ValueError, match="init_lora_weights='olora' changes the weights of the base"):
        make_trainer(adapted(init_lora_weights="olora"), tmp_path)
    trainer = train(adapted(init_lora_weights="eva"), tmp_path, learning_rate=1e-2)  # its data has been there
    assert max_change(scores_of(trainer.model), scores_of(load_reward_model(tmp_path))) <= 1e-6
    with pytest.raises(ValueError, match="layer_replication changes the number of layers"):
        make_trainer(bases["llama"], tmp_path, peft_config=LoraConfig(layer_replication=[[0, 2], [1, 2]]))


def test_lora_dropout_trains_and_reloads(bases, tmp_path):
    trainer = train(bases["llama"], tmp_path, peft_config=LoraConfig(lora_dropout=0.5))
    assert max_change(scores_of(trainer.model), scores_of(load_reward_model(tmp_path))) <= 1e-6


# --------------------------------------------------------------------------------------------------- model_init_kwargs
@pytest.mark.parametrize("name", ["auto", "balanced"])
def test_spreading_with_several_processes_is_refused_before_loading(monkeypatch, name):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=f"device_map='{name}' spreads one model"):
        build_reward_model("there/is-no-such-model", device_map=name)


def test_spreading_on_one_process_works(bases):
    model, head = build_reward_model(bases["llama"], device_map="auto")
    assert head == ["score"] and scores_of(model).isfinite().all()


def test_config_fields_among_the_init_kwargs(bases):
    model, _ = build_reward_model(bases["llama"], use_cache=False, attn_implementation="eager", attention_dropout=0.25)
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "eager"
    assert model.model.layers[0].self_attn.attention_dropout == 0.25


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_by_either_name(bases, key, dtype):
    model, _ = build_reward_model(bases["llama"], **{key: dtype})
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.score.weight.dtype == torch.float32


def test_unknown_dtype_is_refused(bases):
    with pytest.raises(ValueError, match="dtype='bf16' is not known.*'bfloat16'"):
        build_reward_model(bases["llama"], dtype="bf16")


def test_fp32_is_the_default_whatever_the_checkpoint_says(tmp_path):
    base = tiny_base(tmp_path, dtype=torch.bfloat16)
    assert build_reward_model(base)[0].model.embed_tokens.weight.dtype == torch.float32
    assert build_reward_model(base, dtype="auto")[0].model.embed_tokens.weight.dtype == torch.bfloat16


def test_the_dtype_auto_of_a_saved_model_is_that_of_training(tmp_path):
    base = tiny_base(tmp_path / "base", dtype=torch.bfloat16)
    trainer = make_trainer(base, tmp_path / "reward", peft_config=LoraConfig(target_modules=["q_proj"]))
    trainer.save_model()
    assert load_reward_model(tmp_path / "reward", dtype="auto").get_input_embeddings().weight.dtype == torch.float32


def test_two_labels_are_no_reward_model(bases, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=2, dtype=torch.float32)
    with pytest.raises(ValueError, match="num_labels"):
        make_trainer(model, tmp_path)


def test_quantization_in_init_kwargs_works_and_twice_is_refused(bases, tmp_path):
    trainer = make_trainer(
        bases["llama"], tmp_path, peft_config=LoraConfig(), model_init_kwargs={"quantization_config": nf4()}
    )
    assert trainer.model.get_base_model().is_quantized
    with pytest.raises(ValueError, match="given both"):
        make_trainer(
            bases["llama"],
            tmp_path,
            peft_config=LoraConfig(),
            quantization_config=nf4(),
            model_init_kwargs={"quantization_config": nf4()},
        )


# ---------------------------------------------------------------------------------------------------------- instances
@pytest.mark.parametrize("quantization", [None, nf4(llm_int8_skip_modules=["score"])], ids=["fp32", "nf4"])
def test_an_instance_trains_and_reloads(bases, tmp_path, quantization):
    model = AutoModelForSequenceClassification.from_pretrained(
        bases["llama"], num_labels=1, dtype=torch.float32, quantization_config=quantization
    )
    trainer = train(model, tmp_path, peft_config=LoraConfig(task_type="CAUSAL_LM"), learning_rate=1e-2)
    assert max_change(scores_of(trainer.model), scores_of(load_reward_model(tmp_path))) <= 1e-6


def test_quantized_base_without_adapter_is_refused(bases, tmp_path):
    with pytest.raises(
        ValueError, match="fine-tuning on a purely quantized model|attach trainable adapters|peft_config"
    ):
        make_trainer(bases["llama"], tmp_path, quantization_config=nf4())


def test_wrong_tokenizer_pad_does_not_break_the_head(bases, tmp_path):
    tokenizer = tiny_tokenizer("llama", pad=None)
    trainer = train(bases["llama"], tmp_path, peft_config=LoraConfig(), processing_class=tokenizer)
    assert trainer.processing_class.pad_token == tokenizer.eos_token
    assert max_change(scores_of(trainer.model), scores_of(load_reward_model(tmp_path))) <= 1e-6


def test_frozen_everything_is_refused(bases, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=1, dtype=torch.float32)
    model.requires_grad_(False)
    with pytest.raises(HeadError, match="frozen"):
        make_trainer(model, tmp_path)


# ------------------------------------------------------------------------------------------------------ what is loaded
def test_a_language_model_is_no_reward_model(bases):
    with pytest.raises(HeadError, match=r"is a language model \(LlamaForCausalLM\) without a reward head. Needed"):
        load_reward_model(bases["llama"])
    with pytest.raises(HeadError, match=r"is a language model \(RobertaForMaskedLM\) without a reward head"):
        load_reward_model(bases["roberta"])


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        build_reward_model(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"model_type": "martian"}')
    with pytest.raises(ValueError, match="cannot be loaded as a model: .*martian"):
        build_reward_model(str(tmp_path))
