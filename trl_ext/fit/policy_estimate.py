"""What a language model takes that is fine-tuned on texts, with or without a weak teacher, or that writes texts.

As in `memory_estimate`, on tensors without numbers. The logits count here: a token has one for each of the vocabulary.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    PretrainedConfig,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from trl.trainer.utils import add_fused_lm_head

from trl_ext.fit.memory_count import (
    Estimate,
    autocast,
    check_optimizer,
    checkpointed,
    count_inference,
    count_training,
    prepare_layers,
    quantized,
)
from trl_ext.losses.distillation import distillation, entropy_sum


@dataclass
class Policy:
    """
    A language model as it is loaded.

    Args:
        config (`PretrainedConfig`): the architecture. dtype (`torch.dtype`): of the base's weights.
        four_bit (`bool`), nested (`bool`): NF4 for linear layers; with double quantization.
        peft_config (`LoraConfig`, *optional*): adapters.
        attention (`str`): `attn_implementation`.
        on_gpu (`bool`): follow what PEFT does under autocast on a GPU.
    """

    config: PretrainedConfig
    dtype: torch.dtype = torch.float32
    four_bit: bool = False
    nested: bool = False
    peft_config: LoraConfig | None = None
    attention: str = "sdpa"
    on_gpu: bool = True


@dataclass
class TextStep:
    """
    A training step on rows of a prompt and a completion, all of one length.

    Args:
        policy ([`Policy`]): what is trained.
        rows (`int`), prompt (`int`), completion (`int`): of a micro-batch, in rows and tokens.
        all_tokens (`bool`): whether tokens of the prompt are trained on too.
        plain (`bool`): TRL's `SFTTrainer`, which makes logits in pieces; else `WeakToStrongTrainer`, which holds all.
        teacher ([`Policy`], *optional*): whose distribution the latter compares with.
        bf16 (`bool`), checkpointing (`bool`), reentrant (`bool`), accumulates (`bool`), optimizer (`str`):
            as in [`~trl_ext.fit.memory_estimate.TrainingStep`].
    """

    policy: Policy
    rows: int
    prompt: int
    completion: int
    all_tokens: bool = False
    plain: bool = False
    teacher: Policy | None = None
    bf16: bool = False
    checkpointing: bool = False
    reentrant: bool = False
    accumulates: bool = False
    optimizer: str = "adamw_torch_fused"


@dataclass
class Writing:
    """
    A batch of completions that a model writes.

    Args:
        policy ([`Policy`]): the model. rows (`int`): completions at a time.
        prompt (`int`), completion (`int`): tokens of each, the new ones to the end.
        temperature, top_p, top_k, min_p, repetition_penalty: of the sampling; temperature 0 is greedy.
    """

    policy: Policy
    rows: int
    prompt: int
    completion: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0


def estimate_text_step(step: TextStep) -> Estimate:
    """
    One forward and backward pass of fine-tuning.

    Raises:
        `ValueError`: an optimizer whose states have no known size.
    """
    check_optimizer(step.optimizer)
    with torch.device("meta"):
        model = _build(step.policy)
        if step.policy.four_bit:  # as TRL's trainer casts them
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        teacher = None if step.teacher is None else _build(step.teacher).eval().requires_grad_(False)
    if step.plain:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    model.train()
    if step.checkpointing:
        checkpointed(model, step.reentrant)
    for one in (model, teacher):
        if one is not None:
            _as_prepared(one, step.bf16)

    def loss_of() -> tuple[torch.Tensor, int]:
        inputs = _inputs(step.rows, step.prompt + step.completion)
        return _plain_loss(model, inputs) if step.plain else _full_loss(model, teacher, inputs, step)

    tokens = step.rows * (step.prompt + step.completion)
    return count_training(model, loss_of, step.optimizer, step.accumulates, tokens, teacher)


def estimate_writing(job: Writing) -> Estimate:
    """The prompts' forward pass, and the last step of the writing, when the cache is at its largest."""
    with torch.device("meta"):
        model = _build(job.policy).eval()
    length = job.prompt + job.completion

    def run() -> tuple[int, int]:
        cache = DynamicCache(config=model.config)
        inputs = _inputs(job.rows, job.prompt)
        logits = _written(model, inputs, cache, job)
        grown = DynamicCache(config=model.config)
        for number, layer in enumerate(cache.layers):
            keys, values = layer.keys, layer.values
            more = (*keys.shape[:-2], length - 2, keys.shape[-1]), (*values.shape[:-2], length - 2, values.shape[-1])
            grown.update(keys.new_empty(more[0]), values.new_empty(more[1]), number)
        del cache, keys, values, layer
        last = _inputs(job.rows, length - 1)
        _written(model, {**last, "input_ids": last["input_ids"][:, -1:]}, grown, job)
        held = [t for layer in grown.layers for t in (layer.keys, layer.values)]
        return logits, sum(t.numel() * t.element_size() for t in held)

    return count_inference(model, run, job.rows * length)


def cache_bytes(job: Writing) -> int:
    """Bytes of the keys and values of one completion with its prompt."""
    config = job.policy.config.get_text_config()
    head = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head
    return numbers * (job.prompt + job.completion) * torch.empty(0, dtype=job.policy.dtype).element_size()


def weight_bytes(policy: Policy) -> int:
    """Bytes of a language model's weights."""
    with torch.device("meta"):
        model = _build(policy)
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in model.parameters()}.values())


def _build(policy: Policy) -> nn.Module:
    config = copy.deepcopy(policy.config)
    model = AutoModelForCausalLM.from_config(config, dtype=policy.dtype, attn_implementation=policy.attention)
    if policy.four_bit:
        quantized(model, policy.dtype, policy.nested, ["lm_head"])
    if policy.peft_config is not None:
        model = get_peft_model(model, copy.deepcopy(policy.peft_config))
    prepare_layers(model, dropout=True, on_gpu=policy.on_gpu)
    return model


def _as_prepared(model: nn.Module, bf16: bool) -> None:
    """The forward pass as Accelerate wraps it: under autocast, and what comes out in fp32."""
    if not bf16:
        return
    forward = model.forward

    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with autocast(True):
            return forward(*args, **kwargs)

    model.forward = MethodType(convert_outputs_to_fp32(wrapped), model)


def _inputs(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(rows, length, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _plain_loss(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    output = model(**inputs, labels=inputs["input_ids"], use_cache=False, fused_lm_head=True)
    return -output.log_probs.sum(), 0


def _full_loss(
    model: nn.Module, teacher: nn.Module | None, inputs: dict[str, torch.Tensor], step: TextStep
) -> tuple[torch.Tensor, int]:
    """What `WeakToStrongTrainer` computes, at known places in place of a mask."""
    trained = step.prompt + step.completion - 1 if step.all_tokens else step.completion
    at = torch.zeros(step.rows * trained, dtype=torch.long)
    outputs = model(**inputs, use_cache=False)
    logits = outputs.logits[:, :-1][at, at]  # (n, V)
    size = outputs.logits.numel() * outputs.logits.element_size()
    weight, others = 0.0, logits.detach()
    if teacher is not None:
        with torch.no_grad():
            others = teacher(**inputs, use_cache=False).logits[:, :-1][at, at]  # (n, V')
        weight, known = 1.0, min(logits.shape[-1], others.shape[-1])
        logits, others = logits[:, :known], others[:, :known]
    wanted, real = torch.zeros_like(at), torch.ones_like(at, dtype=torch.bool)
    cross_entropy, divergence = distillation(logits, others, wanted, real, weight)
    loss = (cross_entropy + divergence).sum()
    with torch.no_grad():
        entropy_sum(logits)
        logits.argmax(-1)
    return loss, size


def _written(model: nn.Module, inputs: dict[str, torch.Tensor], cache: DynamicCache, job: Writing) -> int:
    """One forward pass of `generate`, and the choice of the next token. Returns the bytes of the logits."""
    output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = output.logits[:, -1].to(copy=True, dtype=torch.float32)  # (B, V)
    scores = _processors(job)(inputs["input_ids"], logits)
    if job.temperature > 0:
        torch.multinomial(scores.softmax(-1), 1)
    else:
        scores.argmax(-1)
    return output.logits.numel() * output.logits.element_size() + logits.numel() * 4


def _processors(job: Writing) -> Callable:
    found = LogitsProcessorList()
    if job.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(job.repetition_penalty))
    if job.temperature > 0:
        if job.temperature != 1.0:
            found.append(TemperatureLogitsWarper(job.temperature))
        if job.top_k:
            found.append(TopKLogitsWarper(job.top_k))
        if job.top_p < 1.0:
            found.append(TopPLogitsWarper(job.top_p))
        if job.min_p is not None:
            found.append(MinPLogitsWarper(job.min_p))
    return found
