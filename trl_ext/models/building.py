"""Building a trainable reward model: load a base (quantized or not), keep its head exact, add LoRA.

Knows transformers, bitsandbytes and PEFT. Knows nothing of text, datasets, losses or saved reward models (see
`loading.py` for those).
"""

import copy
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import torch
import transformers
from accelerate import PartialState
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from trl_ext.models.heads import HeadClass, HeadError, head_class, head_modules, make_head_exact, unwrap


_CLASSES = {
    "sequence": ("AutoModelForSequenceClassification", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "token": ("AutoModelForTokenClassification", MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
}
_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")
_HUB_ARGUMENTS = (
    "revision",
    "code_revision",
    "trust_remote_code",
    "cache_dir",
    "token",
    "subfolder",
    "local_files_only",
    "force_download",
)


def build_reward_model(
    model_id: str,
    *,
    num_labels: int = 1,
    head: HeadClass | Literal["per_token"] = "sequence",
    quantization_config: BitsAndBytesConfig | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """
    Load a backbone with a reward head, as `trl.RewardTrainer` does, with a head that survives.

    Args:
        model_id (`str`):
            Hub id or folder of a language model, an encoder, or a sequence-classification model.
        num_labels (`int`, *optional*, defaults to `1`):
            Number of outputs of the head.
        head (`str`, *optional*, defaults to `"sequence"`):
            `"sequence"` for the sequence-classification class of transformers, `"token"` for its token-classification
            class, `"per_token"` for the one whose head gives an output for every token (see
            [`choose_head_class`]).
        quantization_config (`BitsAndBytesConfig`, *optional*):
            Quantization of the backbone. The head is added to its skip list, whatever the list says. For a checkpoint
            that is already quantized the baked skip list is extended likewise.
        **kwargs:
            For `from_pretrained`, fields of the model's config included. `dtype` defaults to fp32 and `device_map` to
            what TRL uses (`None` on CPU and with several processes, else `"auto"`).

    Returns:
        `tuple[PreTrainedModel, list[str]]`: the model and the names of its head modules.

    Raises:
        [`HeadError`]: a head module is quantized, the checkpoint lacks backbone weights, or its head has another
            number of outputs.
        `ValueError`: `device_map="auto"` with several processes, or weights that are not safetensors.
    """
    device_map = kwargs.pop("device_map", "unset")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if device_map in _SPREADING and several:
        raise ValueError(
            f"device_map={device_map!r} spreads one model over all devices, but several processes were launched, each "
            "of which needs its own copy. Remove `device_map` (each process then loads to its own device), or start "
            "one process."
        )
    if device_map == "unset":
        device_map = None if several or PartialState().device.type in ("cpu", "mps") else "auto"
    attention = kwargs.get("attn_implementation")
    old_name = kwargs.pop("torch_dtype", torch.float32)
    dtype = as_dtype(kwargs.pop("dtype", old_name))

    if (Path(model_id).is_absolute() or str(model_id).startswith(".")) and not Path(model_id).is_dir():
        raise FileNotFoundError(f"{model_id} is not a folder. Needed: the folder or Hub id of a model.")
    # as in AutoModel.from_pretrained: the config takes its own fields from the arguments and returns the others
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    try:
        config, kwargs = AutoConfig.from_pretrained(
            model_id, num_labels=num_labels, return_unused_kwargs=True, **kwargs
        )
    except ValueError as error:  # no model's folder, a family that transformers does not know, code of its own
        raise ValueError(f"{model_id} cannot be loaded as a model: {error}") from error
    except OSError as error:
        if Path(model_id).is_dir():
            raise
        raise FileNotFoundError(
            f"{model_id} is not a folder here, and could not be had from the Hub as a model of that name: {error}"
        ) from error
    kwargs |= hub
    auto_class = _auto_class(config, choose_head_class(config) if head == "per_token" else head)
    quantized = quantization_config or config.__dict__.get("quantization_config")
    if quantized is not None:
        names = head_modules(_skeleton(config, auto_class, kwargs.get("trust_remote_code", False)))
        quantization_config = _skip_head(quantization_config, names)
        _skip_head_in_config(config, names)
    with attention_at_hand(attention), _quiet_loading():
        model, info = auto_class.from_pretrained(
            model_id,
            config=config,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=kwargs.pop("use_safetensors", True),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in plainer words
            **({} if quantization_config is None else {"quantization_config": quantization_config}),
            **kwargs,
        )
    if info["mismatched_keys"]:
        wrong = [
            f"`{key}` {tuple(found)}, needed {tuple(needed)}" for key, found, needed in sorted(info["mismatched_keys"])
        ]
        raise HeadError(
            f"Weights of {model_id} have other shapes than this model: {'; '.join(wrong[:3])}. A head trained with "
            f"another `num_labels` cannot be reused for num_labels={num_labels}; start from the language model "
            "instead."
        )
    names = head_modules(model, info["missing_keys"])
    make_head_exact(model, names)
    keep_4bit_exact_on_cpu(model)
    return model, names


@contextmanager
def attention_at_hand(attention: str | None) -> Iterator[None]:
    """Where a model is loaded: say in our words that the package of its attention is not there."""
    try:
        yield
    except ImportError as error:
        if "flash" not in str(attention):
            raise
        raise ImportError(
            f"attn_implementation={attention!r} cannot be used here: {error} Needed: its package, on a GPU that it "
            "supports. Install it, or use attn_implementation='sdpa', which needs none."
        ) from error


def choose_head_class(config: transformers.PretrainedConfig) -> HeadClass:
    """
    The class whose head gives an output for every token: for decoders the sequence class, else the token class.

    The sequence head of a decoder runs on every token before one is picked, and keeping to it keeps every checkpoint
    one that plain transformers loads as a scalar model. Encoders pool before their sequence head. A checkpoint that
    is a token-classification model already stays one.

    Raises:
        [`HeadError`]: transformers has no such class for this family.
    """
    if any("TokenClassification" in name for name in config.architectures or []):
        return "token"
    decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    remote = "AutoModelForCausalLM" in config.__dict__.get("auto_map", {})
    wanted: tuple[HeadClass, ...] = ("sequence", "token") if decoder or remote else ("token",)
    if config.is_encoder_decoder:
        wanted = ("token",)
    for name in wanted:
        if _has_class(config, name):
            return name
    raise HeadError(_no_class(config, wanted))


def _has_class(config: transformers.PretrainedConfig, head: HeadClass) -> bool:
    name, mapping = _CLASSES[head]
    return type(config) in mapping or name in config.__dict__.get("auto_map", {})


def _auto_class(config: transformers.PretrainedConfig, head: HeadClass) -> type:
    if not _has_class(config, head):
        raise HeadError(_no_class(config, (head,)))
    return AutoModelForSequenceClassification if head == "sequence" else AutoModelForTokenClassification


def _no_class(config: transformers.PretrainedConfig, wanted: tuple[HeadClass, ...]) -> str:
    return (
        f"transformers {transformers.__version__} has no {' or '.join(wanted)}-classification class for "
        f"{config.model_type!r} models, so there is no reward head that other programs could load again. Use a model "
        "of another family, e.g. Llama, Qwen 3, Gemma 3, Mistral, OLMo 2, BERT or DeBERTa."
    )


def keep_4bit_exact_on_cpu(model: nn.Module) -> None:
    """
    Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16 the first time the model runs in eval mode.

    The repacked weights (seen in 0.50) hold bf16 instead of fp32 scales, pass no gradient when training goes on after
    an evaluation, cannot be dequantized for a merge, and need output sizes divisible by 32. On a GPU nothing changes.
    Raises `ValueError` for a model that was repacked before it came here.
    """
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            if state is not None and state.__dict__.get("packing_format_for_cpu", False):
                raise ValueError(
                    f"bitsandbytes has repacked the 4-bit weights of `{name}` for inference on the CPU, because the "
                    "model ran in eval mode before: they pass no gradient any more. Load the model anew, or pass its "
                    "path."
                )
            module.support_avx512bf16_for_cpu = False


def add_adapter(
    model: PreTrainedModel, peft_config: PeftConfig, head: list[str], *, autocast_adapter_dtype: bool = True
) -> PeftModel:
    """
    Wrap the model with an adapter whose head is trained and saved, whatever the user's `LoraConfig` says.

    The task type becomes that of the model's class, the head joins `modules_to_save` and is excluded from the
    adapter's targets. The given config is not changed. Raises `ValueError` for an adapter type that cannot carry a
    full module (prompt learning), and for a config that names the head as a target.
    """
    config = adapter_config(model, peft_config, head)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    return peft_model


def adapter_config(model: PreTrainedModel, peft_config: PeftConfig, head: list[str]) -> PeftConfig:
    """A copy of the user's config with which the head is trained and saved; raises as [`add_adapter`] does."""
    config = copy.deepcopy(peft_config)
    if config.is_prompt_learning or "modules_to_save" not in config.__dict__:
        raise ValueError(
            f"{type(config).__name__} cannot store a trained reward head next to the adapter (no `modules_to_save`). "
            "Use `LoraConfig` or another tuner with `modules_to_save`."
        )
    wished = [t for t in _as_list(config.target_modules) if _only_in_head(t, model, head)]
    if wished:
        raise ValueError(
            f"`target_modules` names the reward head {sorted(wished)}, which starts random and is trained in full, so "
            "it cannot also be adapted. Remove it from `target_modules`; it is trained and saved anyway."
        )
    config.task_type = "TOKEN_CLS" if head_class(model) == "token" else "SEQ_CLS"
    # PEFT appends "classifier" and "score" itself for both
    config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *head]))
    linear = [
        path
        for name in head
        for path, m in model.get_submodule(name).named_modules(prefix=name)
        if isinstance(m, nn.Linear)
    ]
    if "exclude_modules" in config.__dict__:  # a few tuners have none; a head that they adapt is refused later
        if isinstance(config.exclude_modules, str):
            config.exclude_modules = f"(?:{config.exclude_modules})|(?:.*\\.)?(?:{'|'.join(map(re.escape, linear))})"
        else:
            config.exclude_modules = sorted({*(config.exclude_modules or []), *linear})
    return config


def _as_list(targets: list[str] | set[str] | str | None) -> list[str]:
    """The module names of `target_modules`; none for a pattern, `"all-linear"` or the default."""
    return [] if targets is None or isinstance(targets, str) else list(targets)


def _only_in_head(target: str, model: PreTrainedModel, head: list[str]) -> bool:
    """Whether a name in `target_modules` stands for modules of the head and for nothing else."""
    matched = [name for name, _ in model.named_modules() if name == target or name.endswith(f".{target}")]
    return bool(matched) and all(any(name == h or name.startswith(f"{h}.") for h in head) for name in matched)


def is_quantized(model: nn.Module) -> bool:
    """Whether the backbone is held in 4 or 8 bits."""
    return bool(unwrap(model).__dict__.get("is_quantized", False))


def as_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype | None:
    """`"bfloat16"` -> `torch.bfloat16`; `"auto"`, `None` and dtypes pass."""
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    if dtype not in ("bfloat16", "float16", "float32", "float64"):
        raise ValueError(f"dtype={dtype!r} is not known. Needed: 'auto', 'bfloat16', 'float16' or 'float32'.")
    return getattr(torch, dtype)


def _skeleton(config: transformers.PretrainedConfig, auto_class: type, trust_remote_code: bool) -> PreTrainedModel:
    with torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=trust_remote_code)


def _skip_head(quantization_config: BitsAndBytesConfig | None, names: list[str]) -> BitsAndBytesConfig | None:
    if not isinstance(quantization_config, BitsAndBytesConfig):
        return quantization_config
    quantization_config = copy.deepcopy(quantization_config)
    quantization_config.llm_int8_skip_modules = _extended(quantization_config.llm_int8_skip_modules, names)
    return quantization_config


def _skip_head_in_config(config: transformers.PretrainedConfig, names: list[str]) -> None:
    """Extend the skip list baked into a quantized checkpoint: its own names the causal head, which is not here."""
    baked = config.__dict__.get("quantization_config")
    if isinstance(baked, dict) and baked.get("quant_method") == "bitsandbytes":
        config.quantization_config = {
            **baked,
            "llm_int8_skip_modules": _extended(baked.get("llm_int8_skip_modules"), names),
        }


def _extended(skip: list[str] | None, names: list[str]) -> list[str]:
    return list(dict.fromkeys([*(skip or []), *names]))


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hide transformers' report of new and unused keys: `head_modules` checks them and raises where it matters."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
