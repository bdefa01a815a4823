"""From a trainer's arguments to a model that can be trained, with an exact head, an adapter and a tokenizer.

It gives `model`, `processing_class`, `quantization_config`, `peft_config`, `chat_template_path` and related arguments
the meaning that they have in TRL's trainer. It knows nothing of data, losses or training.
"""

import copy
import logging
import os
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import trl
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments
from transformers.utils import find_adapter_config_file

from trl_ext.logs import follow_transformers
from trl_ext.models.adapters import add_adapter, check_adapter_config
from trl_ext.models.bases import check_base_is_saved
from trl_ext.models.building import build_reward_model, is_quantized, keep_4bit_exact_on_cpu, name_problem
from trl_ext.models.heads import HeadClass, head_modules, make_head_exact
from trl_ext.models.inputs import freeze_date, text_tokenizer, use_known_pad_token
from trl_ext.models.loading import (
    how_to_merge,
    is_language_adapter,
    load_reward_model,
    local_folder,
    merge_language_adapter,
)
from trl_ext.models.sidecar import get_sidecar, vocab_size


logger = logging.getLogger(__name__)


class TrainableModel(NamedTuple):
    """A model that can be trained, its tokenizer, and the names of the head's modules."""

    model: nn.Module
    processing_class: PreTrainedTokenizerBase
    head: list[str]


def set_up_model(
    model: str | nn.Module,
    args: trl.RewardConfig,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    quantization_config: BitsAndBytesConfig | None,
    peft_config: PeftConfig | None,
    *,
    num_labels: int = 1,
    head: HeadClass | Literal["per_token"] = "sequence",
) -> TrainableModel:
    """
    Load model and tokenizer as `trl.RewardTrainer` does, with a head that stays exact and is trained and saved.

    For a model that is given by its path, `num_labels` and `head` are those of
    [`~trl_ext.models.build_reward_model`].

    Raises:
        TypeError: if `peft_config` is not a PEFT configuration.
        ValueError: if arguments contradict each other, or the tokenizer cannot pad.
    """
    follow_transformers(args.get_process_log_level())  # what is logged from here on
    check_offloading(args)
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"`peft_config` is a {type(peft_config).__name__}. Needed: a PEFT configuration, e.g. `peft.LoraConfig`."
        )
    init_kwargs = {**(args.model_init_kwargs or {})}
    zero_stage = 0 if args.deepspeed_plugin is None else args.deepspeed_plugin.zero_stage
    check_sharding(uses_fsdp(args), zero_stage, quantization_config or init_kwargs.get("quantization_config"))
    init_kwargs.pop("num_labels", None)  # the trainer decides it: 1 for a scalar reward, maybe more for token rewards
    is_instance = not isinstance(model, str)
    source = model.config._name_or_path if is_instance else model
    if not is_instance and peft_config is not None and _is_language_adapter(model):
        raise ValueError(how_to_merge(model))
    if isinstance(model, str):
        model, names = _load(model, args, init_kwargs, quantization_config, num_labels, head)
    else:
        if init_kwargs or quantization_config is not None:
            logger.warning(
                "`model` is an instance, not a path, so `model_init_kwargs` and `quantization_config` have no effect."
            )
        # a PeftModel holds a config for each adapter
        for config in getattr(model, "peft_config", {}).values():
            check_adapter_config(config, initialised=True)
        if isinstance(model, PeftModel) or peft_config is not None:
            check_base_is_saved(model)
        names = head_modules(model)
        make_head_exact(model, names)
        name_problem(model.config, model.config.num_labels)
        keep_4bit_exact_on_cpu(model)
    if processing_class is None:
        processing_class = AutoTokenizer.from_pretrained(
            source, revision=init_kwargs.get("revision"), trust_remote_code=args.trust_remote_code
        )
    processing_class = text_tokenizer(processing_class)

    added_tokens: list[int] = []
    if args.chat_template_path is not None:
        if is_template_file(args.chat_template_path):
            processing_class.chat_template = Path(args.chat_template_path).read_text(encoding="utf-8")
        else:
            model, processing_class, added_tokens = trl.clone_chat_template(
                model, processing_class, args.chat_template_path
            )
    if not any((processing_class.pad_token, processing_class.eos_token, args.pad_token, args.eos_token)):
        raise ValueError(
            "The tokenizer has neither a pad nor an EOS token, so batches cannot be padded. Set "
            "`processing_class.pad_token` to a token of its vocabulary."
        )
    _check_special_tokens(processing_class, args, vocab_size(model))
    use_known_pad_token(processing_class, vocab_size(model))
    freeze_date(processing_class)
    if peft_config is not None:
        model = _adapt(model, args, names, peft_config, added_tokens)
    if isinstance(model, PeftModel) and args.gradient_checkpointing and zero_stage == 3:
        checkpoint_reentrantly(args)
    return TrainableModel(model, processing_class, names)


def _check_special_tokens(tokenizer: PreTrainedTokenizerBase, args: trl.RewardConfig, known: int) -> None:
    """Raise `ValueError` if the arguments name a token that the tokenizer has and the model has no embedding for."""
    for name, token in (("pad_token", args.pad_token), ("eos_token", args.eos_token)):
        token_id = None if token is None else tokenizer.get_vocab().get(token)
        if token_id is not None and token_id >= known:
            raise ValueError(
                f"{name}={token!r} has the id {token_id}, and the model has embeddings for ids below {known}. "
                "Name a token that the model knows, or call `model.resize_token_embeddings(len(tokenizer))` and pass "
                "the model."
            )


def check_offloading(args: TrainingArguments) -> None:
    """Raise `ValueError` for `activation_offloading` on a CPU, where there is nowhere to move activations to."""
    # only the configs of TRL's trainers with such an option have the field
    if getattr(args, "activation_offloading", False) and torch.accelerator.current_accelerator() is None:
        raise ValueError("activation_offloading=True moves activations from a GPU to the CPU; there is no GPU here.")


def checkpoint_reentrantly(args: trl.RewardConfig) -> None:
    """Set `use_reentrant=True`, which adapters under ZeRO-3 need, under both names that transformers has for it."""
    kwargs = {**(args.gradient_checkpointing_kwargs or {}), "use_reentrant": True}
    args.gradient_checkpointing_kwargs = kwargs
    # transformers reads the new name and has copied the old one to it already; releases before 5.23 have the old only
    if hasattr(args, "activation_checkpointing_kwargs"):
        args.activation_checkpointing_kwargs = kwargs


def uses_fsdp(args: trl.RewardConfig) -> bool:
    """Whether FSDP was asked for, in the arguments or by `accelerate launch`."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_sharding(fsdp: bool, zero_stage: int, quantization_config: BitsAndBytesConfig | None) -> None:
    """Raise `ValueError` for a quantized base that FSDP or DeepSpeed ZeRO-3 cannot shard."""
    if not isinstance(quantization_config, BitsAndBytesConfig):
        return
    if zero_stage == 3:
        raise ValueError(
            "DeepSpeed ZeRO-3 cannot shard a quantized base. Use plain `accelerate launch` (DDP), FSDP with a "
            "4-bit base, or ZeRO-3 without quantization."
        )
    if fsdp and quantization_config.load_in_8bit:
        raise ValueError("FSDP cannot shard an 8-bit base. Use load_in_4bit, or no quantization.")
    storage = quantization_config.bnb_4bit_quant_storage
    if fsdp and not storage.is_floating_point:
        raise ValueError(
            f"FSDP shards only floating-point weights, but this 4-bit base stores its weights as {storage}, so every "
            "GPU would hold all of them. Set bnb_4bit_quant_storage to the dtype of the base, e.g. bfloat16."
        )


def finish_set_up(model: nn.Module, processing_class: PreTrainedTokenizerBase, args: trl.RewardConfig) -> None:
    """
    Complete the set-up of model, tokenizer and arguments as `trl.RewardTrainer` does, for trainers without that base.

    It sets the EOS and pad token, switches dropout off, and lets the inputs of a checkpointed adapter have gradients.
    Raises `ValueError` for a token that is not in the vocabulary.
    """
    config = model.config.get_text_config()
    for name, token in (("eos_token", args.eos_token), ("pad_token", args.pad_token)):
        if token is not None and token not in processing_class.get_vocab():
            raise ValueError(f"{name}={token!r} is not in the vocabulary of {type(processing_class).__name__}.")
    if args.eos_token is not None:
        processing_class.eos_token = args.eos_token
        config.eos_token_id = processing_class.eos_token_id
    processing_class.pad_token = args.pad_token or processing_class.pad_token or processing_class.eos_token
    config.pad_token_id = processing_class.pad_token_id
    if args.disable_dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    if isinstance(model, PeftModel) and args.gradient_checkpointing:
        model.enable_input_require_grads()


def is_template_file(path: str) -> bool:
    """Whether `chat_template_path` names a Jinja file. Otherwise it names a tokenizer."""
    return os.path.isfile(path) and path.endswith((".jinja", ".j2"))


def _load(
    path: str,
    args: trl.RewardConfig,
    init_kwargs: dict,
    quantization_config: BitsAndBytesConfig | None,
    num_labels: int,
    head: HeadClass | Literal["per_token"],
) -> tuple[nn.Module, list[str]]:
    """Load a model by its path: an adapter that is trained further, or a base that gets a new head."""
    if quantization_config is not None and "quantization_config" in init_kwargs:
        raise ValueError(
            "`quantization_config` is given both to the trainer and in `model_init_kwargs`. Give it in one place."
        )
    if quantization_config is not None:
        init_kwargs["quantization_config"] = quantization_config
    init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if _is_language_adapter(path):
        return merge_language_adapter(path, num_labels=num_labels, head=head, **init_kwargs)
    if not _is_adapter(path):
        return build_reward_model(path, num_labels=num_labels, head=head, **init_kwargs)
    model = load_reward_model(path, is_trainable=True, **init_kwargs)
    sidecar = get_sidecar(model)
    return model, head_modules(model) if sidecar is None else sidecar.head_modules


def _is_adapter(path: str) -> bool:
    """Whether a folder or Hub repository holds an adapter."""
    if Path(path).is_dir():
        return Path(path, "adapter_config.json").is_file()
    try:
        validate_repo_id(path)
    except HFValidationError:  # a folder that does not exist; loading it says so
        return False
    return find_adapter_config_file(path) is not None


def _is_language_adapter(path: str) -> bool:
    """Whether a folder or Hub repository holds the adapter of a language model, e.g. from SFT."""
    return _is_adapter(path) and is_language_adapter(local_folder(path, None))


def _adapt(
    model: nn.Module, args: trl.RewardConfig, head: list[str], peft_config: PeftConfig, added_tokens: list[int]
) -> PeftModel:
    """Add the user's adapter to the model. It also trains the embeddings of added tokens, as in TRL."""
    if isinstance(model, PeftModel):
        raise ValueError(
            "The model has an adapter already, and `peft_config` asks for another. Leave `peft_config` out to train "
            "the existing adapter further, or merge it first (`merge_reward_model`)."
        )
    if added_tokens:
        embeddings = model.get_input_embeddings()
        name = next(name for name, module in model.named_modules() if module is embeddings).split(".")[-1]
        peft_config = copy.deepcopy(peft_config)
        trainable = peft_config.trainable_token_indices or {}
        if isinstance(trainable, list):  # a plain list means the input embeddings
            trainable = {name: trainable}
        peft_config.trainable_token_indices = {**trainable, name: [*trainable.get(name, []), *added_tokens]}
    # ZeRO-3 gathers parameters of one dtype only, so there the adapter keeps the base's (as in TRL)
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    return add_adapter(model, peft_config, head, autocast_adapter_dtype=not zero3 or is_quantized(model))
