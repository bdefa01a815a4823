"""Building a trainable reward model: load a base, quantized or not, and give it an exact fp32 head.

It knows transformers and bitsandbytes. It knows nothing of adapters (`adapters.py`), saved reward models
(`loading.py`), text, data sets or losses.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import torch
import transformers
from accelerate import PartialState
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

from trl_ext.models.heads import HeadClass, HeadError, head_modules, make_head_exact, unwrap


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
    Load a backbone with a reward head, as `trl.RewardTrainer` does, and keep the head in fp32 and never quantized.

    Args:
        model_id (`str`):
            Hub id or folder of a language model, an encoder, or a sequence-classification model.
        num_labels (`int`, *optional*, defaults to `1`):
            Number of outputs of the head.
        head (`str`, *optional*, defaults to `"sequence"`):
            `"sequence"` for the sequence-classification class of transformers, `"token"` for its token-classification
            class, `"per_token"` for whichever of the two gives an output for every token (see
            [`choose_head_class`]).
        quantization_config (`BitsAndBytesConfig`, *optional*):
            Quantization of the backbone. The head is always added to its skip list. If the checkpoint is quantized
            already, the skip list in its config is extended in the same way.
        **kwargs:
            Arguments of `from_pretrained`, including fields of the model's config. `dtype` defaults to fp32 and
            `device_map` to what TRL uses (`None` on CPU and with several processes, else `"auto"`).

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
            f"device_map={device_map!r} spreads one model over all devices, but several processes were launched, and "
            "each needs its own copy. Remove `device_map` (each process then loads to its own device), or start one "
            "process."
        )
    if device_map == "unset":
        device_map = None if several or PartialState().device.type in ("cpu", "mps") else "auto"
    attention = kwargs.get("attn_implementation")
    old_name = kwargs.pop("torch_dtype", torch.float32)
    dtype = as_dtype(kwargs.pop("dtype", old_name))

    if (Path(model_id).is_absolute() or str(model_id).startswith(".")) and not Path(model_id).is_dir():
        raise FileNotFoundError(f"{model_id} is not a folder. Needed: the folder or Hub id of a model.")
    # as in AutoModel.from_pretrained: the config takes the arguments that are its fields and returns the others
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    try:
        config, kwargs = AutoConfig.from_pretrained(
            model_id, num_labels=num_labels, return_unused_kwargs=True, **kwargs
        )
    except ValueError as error:  # not a model's folder, a family that transformers does not know, or custom code
        raise ValueError(f"{model_id} cannot be loaded as a model: {error}") from error
    except OSError as error:
        if Path(model_id).is_dir():
            raise
        raise FileNotFoundError(
            f"{model_id} is not a folder here, and could not be loaded from the Hub as a model of that name: {error}"
        ) from error
    kwargs |= hub
    name_problem(config, num_labels)
    auto_class = _auto_class(config, choose_head_class(config) if head == "per_token" else head)
    # only the config of a quantized checkpoint has the field
    quantized = quantization_config or getattr(config, "quantization_config", None)
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


def name_problem(config: transformers.PretrainedConfig, num_labels: int) -> None:
    """
    Say in a model's config that its one output is a number, unless the config says what it is.

    Servers such as vLLM, and the pipelines of transformers, then put no sigmoid on it. The loss of transformers takes
    one output for a number anyway.
    """
    # configs with parts, and those of some model classes, lack the field
    if num_labels == 1 and getattr(config, "problem_type", None) is None:
        config.problem_type = "regression"


@contextmanager
def attention_at_hand(attention: str | None) -> Iterator[None]:
    """Around the loading of a model: raise a plain error if the package of its attention is not installed."""
    try:
        yield
    except ImportError as error:
        if "flash" not in str(attention):
            raise
        raise ImportError(
            f"attn_implementation={attention!r} cannot be used here: {error} Needed: its package, and a GPU that it "
            "supports. Install the package, or use attn_implementation='sdpa', which needs no package."
        ) from error


def choose_head_class(config: transformers.PretrainedConfig) -> HeadClass:
    """
    The class whose head gives an output for every token: the sequence class for decoders, else the token class.

    The sequence head of a decoder runs on every token before transformers picks one, so it gives token outputs and
    plain transformers can still load the checkpoint as a scalar model. Encoders pool before their sequence head. A
    checkpoint of a token-classification model keeps its class.

    Raises:
        [`HeadError`]: transformers has no such class for this family.
    """
    if any("TokenClassification" in name for name in config.architectures or []):
        return "token"
    decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    # only the config of a model with code of its own has `auto_map`
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    wanted: tuple[HeadClass, ...] = ("sequence", "token") if decoder or remote else ("token",)
    if config.is_encoder_decoder:
        wanted = ("token",)
    for name in wanted:
        if _has_class(config, name):
            return name
    raise HeadError(_no_class(config, wanted))


def _has_class(config: transformers.PretrainedConfig, head: HeadClass) -> bool:
    name, mapping = _CLASSES[head]
    # only the config of a model with code of its own has `auto_map`
    return type(config) in mapping or name in (getattr(config, "auto_map", None) or {})


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
    Raises `ValueError` for a model that was repacked earlier.
    """
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            # bitsandbytes sets the field when it repacks
            if state is not None and getattr(state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"bitsandbytes has repacked the 4-bit weights of `{name}` for inference on the CPU, because the "
                    "model ran in eval mode before. They no longer pass a gradient. Load the model again, or pass its "
                    "path."
                )
            module.support_avx512bf16_for_cpu = False


def is_quantized(model: nn.Module) -> bool:
    """Whether the backbone is held in 4 or 8 bits."""
    # transformers sets the field on quantized models only
    return bool(getattr(unwrap(model), "is_quantized", False))


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
    """Add the head to the skip list of a quantized checkpoint, which names only the causal language model's head."""
    # only the config of a quantized checkpoint has the field
    baked = getattr(config, "quantization_config", None)
    if isinstance(baked, dict) and baked.get("quant_method") == "bitsandbytes":
        config.quantization_config = {
            **baked,
            "llm_int8_skip_modules": _extended(baked.get("llm_int8_skip_modules"), names),
        }


def _extended(skip: list[str] | None, names: list[str]) -> list[str]:
    return list(dict.fromkeys([*(skip or []), *names]))


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hide transformers' report of new and unused keys; `head_modules` checks them and raises if weights are lost."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
