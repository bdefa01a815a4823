"""What all trainers of language models share: adapters that last, right references, logs, cards, arguments."""

import json
import logging
from dataclasses import fields
from datetime import datetime

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import pair_rows, save_tiny_model
from tests.trainers.helpers import APPLIED_BY_TRAINER, SMALL
from trl_ext import (
    DenseGRPOConfig,
    DenseGRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RankedDPOConfig,
    RankedDPOTrainer,
    WeakToStrongConfig,
    WeakToStrongTrainer,
)
from trl_ext.models.bases import BaseMismatchError
from trl_ext.trainers.common import tracking
from trl_ext.trainers.common.health import NotFiniteError
from trl_ext.trainers.common.inherited_arguments import FULL_EVALUATION
from trl_ext.trainers.policy import config as grpo_config
from trl_ext.trainers.policy import ranked_dpo_config


COMMON = SMALL | {"max_steps": 1, "seed": 3}
SAMPLED = {"num_generations": 4, "max_completion_length": 6}
TEXTS = Dataset.from_list([{"prompt": text, "completion": " yes"} for text in ("one", "two", "three", "four")])
CLASSES = {
    "ranked dpo": (RankedDPOTrainer, RankedDPOConfig, {}),
    "dense grpo": (DenseGRPOTrainer, DenseGRPOConfig, {**SAMPLED, "beta": 0.1}),
    "ppo": (PPOTrainer, PPOConfig, SAMPLED),
    "weak to strong": (WeakToStrongTrainer, WeakToStrongConfig, {"kd_weight": 0.0}),
}
REFERENCED = ("ranked dpo", "dense grpo", "ppo")


def letters(completions, **columns):
    return [float(sum(map(ord, text)) % 7) for text in completions]


def whole(completions, **columns):
    return [[(0, len(text), 1.0)] if text else None for text in completions]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("policy"), "qwen2", seed=5))


@pytest.fixture(scope="module")
def adapter(policy, tmp_path_factory):
    """The folder of an SFT adapter that changes what the base says, with its tokenizer."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    get_peft_model(AutoModelForCausalLM.from_pretrained(policy), lora(init_lora_weights=False)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}of the adapter"
    tokenizer.save_pretrained(folder)
    return str(folder)


def lora(**kwargs):
    return LoraConfig(**({"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | kwargs))


def make(kind, model, folder, **more):
    trainer_class, config_class, arguments = CLASSES[kind]
    names = ("peft_config", "processing_class", "ref_model", "dense_reward_funcs", "train_dataset")
    given = {name: more.pop(name) for name in names if name in more}
    if kind in ("dense grpo", "ppo"):
        given["reward_funcs"] = letters
    rows = Dataset.from_list(pair_rows(8)) if kind == "ranked dpo" else TEXTS
    args = config_class(output_dir=str(folder), **{**COMMON, **arguments, **more})
    return trainer_class(model, args=args, **({"train_dataset": rows} | given))


# ------------------------------------------------------------------------------------------------------------ adapters
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("init", ["pissa_niter_4", "eva"])
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is .eva.:UserWarning")
def test_an_adapter_that_would_load_as_another_one_is_refused(kind, init, policy, tmp_path):
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'"):
        make(kind, policy, tmp_path, peft_config=lora(init_lora_weights=init))


@pytest.mark.parametrize("kind", REFERENCED)
@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "all"}])
def test_an_adapter_that_changes_the_reference_is_refused(kind, settings, policy, tmp_path):
    with pytest.raises(ValueError, match="the reference is the base with its adapters off"):
        make(kind, policy, tmp_path, peft_config=lora(**settings))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(policy), lora(**settings))
    with pytest.raises(ValueError, match="the reference is the base with its adapters off"):
        make(kind, model, tmp_path)


def test_without_a_reference_pissa_may_stay(policy, tmp_path):
    make("dense grpo", policy, tmp_path, peft_config=lora(init_lora_weights="pissa"), beta=0.0)
    reference = AutoModelForCausalLM.from_pretrained(policy)
    make("ranked dpo", policy, tmp_path, peft_config=lora(init_lora_weights="pissa"), ref_model=reference)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_folder_of_an_adapter_is_trained_further(kind, policy, adapter, tmp_path):
    trainer = make(kind, adapter, tmp_path)
    assert isinstance(trainer.model, PeftModel)
    assert "of the adapter" in trainer.processing_class.chat_template
    start = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy), adapter)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(trainer.model.eval()(ids).logits, start.eval()(ids).logits)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == policy


@pytest.mark.parametrize("kind", CLASSES)
def test_an_adapter_folder_that_cannot_be_the_policy_is_refused(kind, policy, adapter, tmp_path):
    with pytest.raises(ValueError, match="merge it first"):
        make(kind, adapter, tmp_path, peft_config=lora())
    get_peft_model(AutoModelForCausalLM.from_pretrained(policy), lora(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another kind of model"):
        make(kind, str(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("kind", CLASSES)
def test_a_base_that_was_merged_in_memory_is_refused(kind, policy, adapter, tmp_path):
    def merged():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy), adapter).merge_and_unload()

    with pytest.raises(BaseMismatchError, match="differs from the files"):
        make(kind, merged(), tmp_path, peft_config=lora())
    with pytest.raises(BaseMismatchError, match="differs from the files"):
        make(kind, get_peft_model(merged(), lora()), tmp_path)
    if kind == "weak to strong":
        make(kind, merged(), tmp_path)
    else:  # TRL would load the reference from the path: the base before the merge
        with pytest.raises(BaseMismatchError, match="The reference is loaded"):
            make(kind, merged(), tmp_path)


def test_a_merged_policy_with_a_reference_of_its_own_is_taken(policy, adapter, tmp_path):
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy), adapter).merge_and_unload()
    make("ranked dpo", merged, tmp_path, ref_model=AutoModelForCausalLM.from_pretrained(policy))
    make("ranked dpo", merged, tmp_path, precompute_ref_log_probs=True)
    make("dense grpo", merged, tmp_path, beta=0.0)


@pytest.mark.parametrize("kind", ["dense grpo", "ppo"])
@pytest.mark.parametrize(("file", "cure"), [("adapter_config.json", "Scorer"), ("reward_ensemble.json", "Ensemble")])
def test_the_folder_of_a_reward_adapter_is_refused_as_a_reward(kind, file, cure, policy, tmp_path):
    (tmp_path / file).write_text("{}")
    trainer_class, config_class, arguments = CLASSES[kind]
    args = config_class(output_dir=str(tmp_path / "out"), **{**COMMON, **arguments})
    with pytest.raises(ValueError, match=cure):
        trainer_class(policy, str(tmp_path), args=args, train_dataset=TEXTS)


# ----------------------------------------------------------------------------------------------------------- tokenizer
@pytest.mark.parametrize("kind", CLASSES)
def test_a_pad_token_without_an_embedding_is_replaced(kind, policy, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = AutoModelForCausalLM.from_pretrained(policy)
    trainer = make(kind, model, tmp_path, processing_class=tokenizer)
    assert "is used instead" in caplog.text
    assert trainer.processing_class.pad_token_id < model.config.vocab_size
    assert trainer.model.config.pad_token_id < model.config.vocab_size


@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")
def test_ranked_dpo_uses_the_pad_token_that_is_asked_for(policy, tmp_path):
    wanted = AutoTokenizer.from_pretrained(policy).convert_ids_to_tokens(7)
    trainer = make("ranked dpo", policy, tmp_path, pad_token=wanted)
    assert trainer.processing_class.pad_token_id == trainer.model.config.pad_token_id == 7
    assert trainer._collator.pad_token_id == 7
    with pytest.raises(ValueError, match="not in the vocabulary"):
        make("ranked dpo", policy, tmp_path, pad_token="<nowhere>")


@pytest.mark.parametrize("kind", CLASSES)
def test_a_date_in_the_template_is_frozen(kind, policy, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    tokenizer.chat_template = (
        "{{ strftime_now('%Y') }}{% for message in messages %}{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    trainer = make(kind, policy, tmp_path, processing_class=tokenizer)
    assert str(datetime.now().year) in trainer.processing_class.chat_template
    assert "strftime_now" not in trainer.processing_class.chat_template


# ------------------------------------------------------------------------------------------------------ logs and cards
@pytest.mark.parametrize("kind", CLASSES)
def test_it_says_once_what_it_trains_and_writes_a_card(kind, policy, tmp_path, caplog):
    more = {"dense_reward_funcs": whole} if kind == "dense grpo" else {}
    trainer = make(kind, policy, tmp_path, peft_config=lora(), save_strategy="steps", save_steps=1, **more)
    trainer.dataset_name = "me/prompts"
    with caplog.at_level(logging.INFO, "trl_ext"):
        trainer.train()
        trainer.train()
    [text] = [r.getMessage() for r in caplog.records if " starts\n" in r.getMessage()]
    facts = dict(line.strip().split("  ", 1) for line in text.splitlines()[1:])
    facts = {name.strip(): fact.strip() for name, fact in facts.items()}
    assert facts["model"] == f"Qwen2ForCausalLM from {policy}, adapter: LORA, rank 4"
    special = {
        "ranked dpo": ("reference", "the base with its adapters off"),
        "dense grpo": ("rewards", "letters x 1, whole x 1 (dense)"),
        "ppo": ("critic", "an adapter on the policy's base"),
        "weak to strong": ("loss", "cross-entropy to the data"),
    }[kind]
    assert facts[special[0]].startswith(special[1])
    if kind in ("dense grpo", "ppo"):
        assert facts["completions"] == "4 of each prompt, up to 6 tokens"
        assert facts["batch"].startswith("4 completions x 1 accumulated")
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        card = (folder / "README.md").read_text()
        assert policy in card and "me/prompts" in card and "AutoPeftModelForCausalLM" in card
        assert f"{type(trainer).__name__}` of trl_ext" in card and "## Metrics" in card


@pytest.mark.parametrize("kind", CLASSES)
def test_a_wandb_that_is_missing_stops_no_policy(kind, policy, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tracking, "is_wandb_available", lambda: False)
    trainer = make(kind, policy, tmp_path, report_to="wandb")
    assert trainer.args.report_to == [] and "Nothing goes to it" in caplog.text


@pytest.mark.parametrize("kind", CLASSES)
def test_a_loss_that_is_nan_stops(kind, policy, tmp_path):
    trainer = make(kind, AutoModelForCausalLM.from_pretrained(policy), tmp_path)
    with torch.no_grad():
        trainer.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises((NotFiniteError, RuntimeError), match="NaN|nan"):
        trainer.train()


# ----------------------------------------------------------------------------------------------------------- arguments
def names(text):
    return text.split()


# Where an argument takes effect: in code of transformers or TRL that our trainers call and do not replace.
TRAINER = APPLIED_BY_TRAINER + names(
    """
    per_device_train_batch_size max_grad_norm neftune_noise_alpha include_num_input_tokens_seen seed data_seed
    accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    length_column_name fsdp deepspeed model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout
    pad_to_multiple_of beta sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
    """
)
SCRIPTS = ["do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank"]  # for scripts to read
DPO = names(
    """
    max_length dataset_num_proc precompute_ref_log_probs precompute_ref_batch_size loss_type activation_offloading
    pad_token train_sampling_strategy prediction_loss_only
    """
)
OTHER_VALUES = {
    "label_names": ["labels"],
    "label_smoothing_factor": 0.1,
    "average_tokens_across_devices": False,
    "logging_nan_inf_filter": False,
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 2,
    "prediction_loss_only": True,
    "train_sampling_strategy": "group_by_length",
    "gamma": 0.9,
    "min_form_temperature": 0.5,
    "shrinkage": 2.0,
    "low_reward": 0.1,
    "outcome_weight": 0.5,
    "dense_weight": 0.5,
    "scale_rewards": "none",
    "multi_objective_aggregation": "normalize_then_sum",
    "gae_lambda": 0.5,
    "potential": "min",
    "value_learning_rate": 1e-3,
    "vf_coef": 0.5,
    "cliprange_value": 0.5,
    "kl_in": "loss",
    "kl_estimator": "k3",
    "whiten_advantages": False,
    "whiten_rewards": True,
    "length_control": True,
}


def test_the_tables_have_every_argument():
    inherited = {field.name for field in fields(trl.DPOConfig)}
    known = [*TRAINER, *SCRIPTS, *DPO, *ranked_dpo_config.UNUSED, *ranked_dpo_config.WITHOUT_EFFECT, *FULL_EVALUATION]
    assert len(known) == len(set(known))
    assert inherited == set(known)
    of_trainer = {field.name for field in fields(trl.GRPOConfig)} & {f.name for f in fields(trl.RewardConfig)}
    known = {*TRAINER, *SCRIPTS, *grpo_config.WITHOUT_EFFECT, *FULL_EVALUATION}  # the others are GRPO's own
    assert of_trainer <= known


WITHOUT_EFFECT = [
    ("ranked dpo", {}, set(ranked_dpo_config.WITHOUT_EFFECT)),
    (
        "dense grpo",
        {"dense_reward_funcs": whole},
        {*grpo_config.WITHOUT_EFFECT, *names("gamma shrinkage potential gae_lambda")},
    ),
    ("dense grpo", {}, {*grpo_config.WITHOUT_EFFECT, *names("outcome_weight dense_weight low_reward gamma")}),
    ("dense grpo", {"dense_reward_funcs": whole, "advantage": "shaped"}, {"scale_rewards", "shrinkage"}),
    ("ppo", {}, {*grpo_config.WITHOUT_EFFECT, *names("scale_rewards multi_objective_aggregation dense_weight")}),
    ("ppo", {"kl_in": "loss"}, {"kl_estimator", "potential"}),
    ("ppo", {"advantage": "outcome"}, set(names("gae_lambda vf_coef kl_in whiten_rewards value_learning_rate"))),
    ("weak to strong", {}, {"logging_nan_inf_filter"}),
]


@pytest.mark.parametrize("kind", CLASSES)
def test_an_evaluation_leaves_the_weights_as_they_are(kind, policy, tmp_path, caplog):
    trainer = make(kind, policy, tmp_path, bf16_full_eval=True)
    assert "bf16_full_eval=True has no effect: an evaluation has the precision of training" in caplog.text
    trainer.evaluate(trainer.train_dataset)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("kind", "more", "without"), WITHOUT_EFFECT)
def test_arguments_without_effect_are_warned_about(kind, more, without, policy, tmp_path, caplog):
    make(kind, policy, tmp_path, **more, **{name: OTHER_VALUES[name] for name in without})
    warned = {record.getMessage().split("=")[0] for record in caplog.records if "has no effect" in record.getMessage()}
    assert warned == without
    caplog.clear()
    make(kind, policy, tmp_path, **more)
    assert "has no effect" not in caplog.text


@pytest.mark.parametrize("name", ["label_smoothing_factor", "label_smoothing"])
def test_ranked_dpo_refuses_smoothing(name, tmp_path):
    with pytest.raises(ValueError, match="preference_probability"):
        RankedDPOConfig(str(tmp_path), **{name: 0.1})


def test_ranked_dpo_refuses_compute_metrics_at_once(policy, tmp_path):
    args = RankedDPOConfig(str(tmp_path), **COMMON)
    with pytest.raises(ValueError, match="compute_metrics"):
        RankedDPOTrainer(
            policy, args=args, train_dataset=Dataset.from_list(pair_rows(4)), compute_metrics=lambda prediction: {}
        )


def test_a_resumed_stream_warns(policy, tmp_path, caplog):
    rows = Dataset.from_list(pair_rows(4)).to_iterable_dataset()
    make("ranked dpo", policy, tmp_path, train_dataset=rows, max_steps=2, save_strategy="steps", save_steps=1).train()
    again = make("ranked dpo", policy, tmp_path, train_dataset=rows, max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "the batches differ from those of an uninterrupted run" in caplog.text
