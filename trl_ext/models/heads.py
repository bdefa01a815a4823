"""The reward head: finds its modules, keeps it exact, and reads its output.

*The head* is every module of a classification model that a language-model checkpoint does not contain: all children
with parameters beside the backbone (`score`, `classifier`, `pre_classifier`, DeBERTa's `pooler` ...), and the `pooler`
inside the backbone if it was newly initialised. The head is fp32, never quantized, always trained and always saved.

This module knows modules and token ids. It knows nothing of text, losses, checkpoints on disk or quantized loading.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import gather_params_ctx
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled


HeadClass = Literal["sequence", "token"]
"""The class of transformers that holds the head: for sequence classification or for token classification."""


class HeadError(ValueError):
    """The head of a reward model is missing, frozen, quantized, duplicated or not finite."""


class Float32Linear(nn.Linear):
    """`nn.Linear` that computes in fp32 whatever the autocast state and the dtype of its input.

    A plain fp32 head under bf16 autocast returns bf16 scores, and on a bf16 base without autocast it raises. The
    parameters have the names of `nn.Linear`, so that checkpoints are those of a plain model.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kind = input.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(input.float(), self.weight.float(), bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "Float32Linear":
        with torch.device("meta"):
            module = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        # ZeRO-3 needs one dtype for everything that is trained, and keeps an fp32 copy: use the model's dtype
        dtype = linear.weight.dtype if is_deepspeed_zero3_enabled() else torch.float32
        with gather_params_ctx(list(linear.parameters())):  # ZeRO-3 shards parameters at load time
            for name, parameter in linear.named_parameters(recurse=False):
                copy = nn.Parameter(parameter.detach().to(dtype, copy=True), parameter.requires_grad)
                module.register_parameter(name, copy)
        return module.train(linear.training)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, FSDP, DeepSpeed, `torch.compile` or PEFT wrappers."""
    if not isinstance(model, (PreTrainedModel, PeftModel)):  # accelerate's search looks at every module
        model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def head_class(model: nn.Module) -> HeadClass:
    """`"token"` for a token-classification model of transformers, else `"sequence"`."""
    return "token" if "TokenClassification" in type(unwrap(model)).__name__ else "sequence"


def head_modules(model: nn.Module, missing_keys: Iterable[str] | None = None) -> list[str]:
    """
    Names of the modules that make up the head, relative to the transformers model.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Sequence-classification model.
        missing_keys (`Iterable[str]`, *optional*):
            `missing_keys` of `from_pretrained(..., output_loading_info=True)`. With it, a pretrained pooler inside the
            backbone belongs to the backbone, and a missing weight of the backbone raises an error. Without it (the
            user loaded the model) the pooler counts as head, because nobody knows whether it was trained.

    Returns:
        `list[str]`: e.g. `["score"]` for Llama, `["pooler", "classifier"]` for DeBERTa-v2.
    """
    base = unwrap(model)
    if base.get_output_embeddings() is not None:
        raise HeadError(
            f"{type(base).__name__} is a language model: its output layer predicts tokens and is no reward head. Load "
            "it with `AutoModelForSequenceClassification.from_pretrained(..., num_labels=...)`, or save it and pass "
            "that folder to the trainer (if it has an adapter, call `merge_and_unload()` first)."
        )
    prefix = base.base_model_prefix
    names = [name for name, child in base.named_children() if name != prefix and any(True for _ in child.parameters())]
    backbone = base.get_submodule(prefix)
    pooler = f"{prefix}.pooler"
    has_pooler = any(name == "pooler" and child is not None for name, child in backbone.named_children())
    if has_pooler and (missing_keys is None or any(_inside(key, [pooler]) for key in missing_keys)):
        names.append(pooler)
    if not names:
        raise HeadError(
            f"{type(base).__name__} has no module beside its backbone `{prefix}`, so no reward head. Load the model "
            "with `AutoModelForSequenceClassification` (or pass its path to the trainer)."
        )
    lost = [key for key in missing_keys or [] if not _inside(key, names)]
    if lost:
        raise HeadError(
            f"The checkpoint lacks weights of the backbone of {type(base).__name__}: {', '.join(sorted(lost)[:5])}"
            f"{' ...' if len(lost) > 5 else ''} ({len(lost)} in all); they would stay random. Needed: a complete "
            "checkpoint of this architecture."
        )
    return names


def make_head_exact(model: nn.Module, names: Iterable[str]) -> None:
    """
    Turn the head's parameters into fp32 and its linear layers into [`Float32Linear`], in place.

    Handles PEFT's `modules_to_save` wrappers (both copies) and device-map hooks. Raises [`HeadError`] if a linear
    layer of the head is quantized.
    """
    base = unwrap(model)
    for name in names:
        for path, module in list(base.get_submodule(name).named_modules(prefix=name)):
            if isinstance(module, nn.Linear) and not isinstance(module, Float32Linear):
                if type(module) is not nn.Linear:
                    raise HeadError(
                        f"The head module `{path}` is a quantized `{type(module).__name__}`; a head must be a float "
                        f"`nn.Linear` to be trained. Load the model with `llm_int8_skip_modules={list(names)}` in its "
                        "quantization config, or pass the model's path and `quantization_config` to the trainer."
                    )
                exact = Float32Linear.from_linear(module)
                hook = getattr(module, "_hf_hook", None)  # set by accelerate when a device map spreads the model
                if hook is not None:
                    remove_hook_from_module(module)
                    add_hook_to_module(exact, hook)
                base.set_submodule(path, exact)
            else:
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.float()


def head_parameters(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The head's parameters in use, by their name in a plain checkpoint: PEFT's trained copy where there is one."""
    base = unwrap(model)
    parameters = {}
    for name in names:
        module = base.get_submodule(name)
        if isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save[module.active_adapters[0]] if module.active_adapters else module
        parameters.update({f"{name}.{key}": value for key, value in module.named_parameters()})
    return parameters


def check_head_trains(model: nn.Module, names: Iterable[str]) -> None:
    """Raise [`HeadError`] unless exactly one fp32 copy of each head parameter is trainable and can be saved."""
    base = unwrap(model)
    adapters = [*extract_model_from_parallel(model).peft_config] if isinstance(model, PeftModel) else ["default"]
    if adapters != ["default"]:
        raise HeadError(
            f"The PeftModel holds the adapters {adapters}. Needed: one adapter named 'default', because PEFT saves "
            "any other in a subfolder, apart from its reward_model.json. Build the PeftModel without `adapter_name` "
            "and with no further adapter."
        )
    for name in names:
        trainable: dict[str, int] = {}
        module = base.get_submodule(name)
        for key, parameter in module.named_parameters():
            parts = key.split(".")
            if isinstance(module, ModulesToSaveWrapper):  # original_module.weight, modules_to_save.default.weight
                parts = parts[1:] if parts[0] == "original_module" else parts[2:]
            plain = ".".join([name, *parts])
            trainable[plain] = trainable.get(plain, 0) + int(parameter.requires_grad)
            exact = parameter.dtype == torch.float32 or is_deepspeed_zero3_enabled()  # it keeps an fp32 copy
            if parameter.requires_grad and not exact:
                raise HeadError(f"The head parameter `{plain}` is {parameter.dtype}; it must be torch.float32.")
        wrong = {key: count for key, count in trainable.items() if count != 1}
        if wrong:
            key, count = next(iter(wrong.items()))
            state = "frozen: it would stay random and never be saved" if count == 0 else f"trained in {count} copies"
            raise HeadError(
                f"The head parameter `{key}` is {state}. Needed: exactly one trainable copy. Pass the plain model and "
                f"`peft_config` to the trainer, or build the PeftModel with `modules_to_save={list(names)}`."
            )


class _HeadOutput:
    """Forward hook that keeps the raw output of the head's last module: [N, T, C] in decoders, [N, C] in encoders."""

    value: torch.Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        self.value = output


def candidate_scores(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    call: Callable | None = None,
) -> torch.Tensor:
    """
    The scalar reward of each row: the head's output at the last real token (decoders) or on the pooled state
    (encoders).

    The attention mask gives the last token. Transformers compares ids with the pad id instead, so it ignores an EOS at
    the end when the pad token is EOS. Scores here do not depend on the pad token or the padding side.

    Args:
        model (`nn.Module`):
            Sequence-classification model with one label; may be wrapped (PEFT, DDP, FSDP, DeepSpeed). It is always
            called as a whole, so that gradient synchronisation and checkpointing work.
        input_ids (`torch.Tensor` of shape `(N, T)`):
            Token ids, padded on either side.
        attention_mask (`torch.Tensor` of shape `(N, T)`):
            True or 1 = real token; at least one per row.
        call (`Callable`, *optional*):
            What to call instead of `model`, e.g. its forward without an autocast wrapper.

    Returns:
        `torch.Tensor` of shape `(N,)`, fp32.
    """
    return token_logits_at_last(model, input_ids, attention_mask, call)[:, 0]


def token_logits_at_last(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, call: Callable | None = None
) -> torch.Tensor:
    """
    Like [`candidate_scores`] for any number of labels: fp32 logits of shape `(N, C)`.

    A stacked model ([`StackedRewardModel`](stacked_model)) gives the logits of all members: `(M * N, C)`, member by
    member.
    """
    input_ids, attention_mask = pad_right(input_ids, attention_mask)
    output, raw = run_with_head_output(model, input_ids, attention_mask, call)
    if raw.dim() == 2:  # pooled before the head: an encoder
        return output.logits.float()
    last = attention_mask.long().sum(dim=1) - 1  # (N,)
    last = last.repeat(len(raw) // len(last))  # (M * N,)
    return raw[torch.arange(len(raw), device=raw.device), last].float()


def run_with_head_output(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, call: Callable | None = None
) -> tuple:
    """Run the model on a right-padded batch; return its output and the raw output of the head's last module."""
    base = unwrap(model)
    kwargs = {"use_cache": False} if _takes_use_cache(type(base)) else {}
    capture = _HeadOutput()
    handle = last_head_module(base).register_forward_hook(capture)
    config = base.config.get_text_config()
    pad_token_id = config.pad_token_id
    if pad_token_id is None:
        config.pad_token_id = (
            0  # transformers refuses batches without a pad id; its value does not change the head's output
        )
    try:
        output = (call or model)(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
    finally:
        handle.remove()
        if pad_token_id is None:  # setting a field of a config takes longer than finding the head
            config.pad_token_id = None
    return output, capture.value


@functools.cache
def _takes_use_cache(model_class: type[PreTrainedModel]) -> bool:
    return "use_cache" in inspect.signature(model_class.forward).parameters


def last_head_module(base: PreTrainedModel) -> nn.Module:
    """The module that outputs the logits: `score` in decoders, `classifier` or a similar name in encoders."""
    children = dict(base.named_children())
    for name in ("score", "classifier", "classification_head"):
        if name in children:
            return children[name]
    return base.get_submodule(head_modules(base)[-1])


def output_layer(model: nn.Module) -> nn.Linear:
    """
    The linear layer that computes the scores: the last one of the head, in PEFT's trained copy where there is one.

    Raises [`HeadError`] if the last layer of the head is not linear.
    """
    module = last_head_module(unwrap(model))
    if isinstance(module, ModulesToSaveWrapper):
        module = (
            module.modules_to_save[module.active_adapters[0]] if module.active_adapters else module.original_module
        )
    layers = [part for part in module.modules() if not any(True for _ in part.children())]
    linear = [part for part in layers if isinstance(part, nn.Linear)]
    if not linear or any(True for part in layers[layers.index(linear[-1]) + 1 :] for _ in part.parameters()):
        raise HeadError(
            f"The head of {type(unwrap(model)).__name__} does not end in a linear layer, so it has no features."
        )
    return linear[-1]


@contextmanager
def features_as_output(model: nn.Module) -> Iterator[None]:
    """
    Within the block, the model outputs the head's features in place of scores: fp32 `(..., H)`, the input of the
    [`output_layer`].

    A score is the product of the features with the layer's weight (plus its bias). Whatever runs the model and picks
    the last token (in padded or flat rows) then gives features without knowing it.
    """
    handle = output_layer(model).register_forward_hook(lambda module, args, output: args[0].float())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def head_inputs(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within the block, a list gets the final hidden states that the head of the model reads, at every call."""
    seen: list[torch.Tensor] = []
    module = last_head_module(unwrap(model))
    handle = module.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def pad_right(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move left padding to the right, so that absolute positions count from the first real token."""
    if bool(attention_mask[:, 0].all()):
        return input_ids, attention_mask
    order = torch.argsort((~attention_mask.bool()).long(), dim=1, stable=True)  # real tokens first, their order kept
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def _inside(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
