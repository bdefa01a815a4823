"""Estimates the memory and the operations of a training step, without a GPU and without weights.

It builds the model with fake tensors, which have a shape and a dtype but no data, and runs a real forward and backward
pass on them, with LoRA, gradient checkpointing, flat rows, members of an ensemble and autocast. `memory_count.py`
counts the tensors.

The estimate does not include memory that kernels allocate internally, the rounding and caching of the allocator, and
the CUDA context.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PretrainedConfig

from trl_ext.data.prefix_layout import PrefixLayout
from trl_ext.fit.memory_count import (
    Estimate,
    autocast,
    check_optimizer,
    checkpointed,
    count_training,
    prepare_layers,
    quantized,
)
from trl_ext.models.adapters import add_adapter
from trl_ext.models.building import choose_head_class
from trl_ext.models.ensemble.member_config import branch_at, complete_config
from trl_ext.models.ensemble.stacked_model import StackedRewardModel
from trl_ext.models.heads import head_modules, make_head_exact, run_with_head_output
from trl_ext.models.shared_prefix import flat_token_logits


@dataclass
class TrainingStep:
    """
    The model and the batch of a training step.

    Args:
        config (`PretrainedConfig`): the architecture.
        batch (`dict`): a collated batch: `prefix_layout` for a flat row, or `input_ids` and `attention_mask`.
        num_labels (`int`): number of outputs of the head.
        token_level (`bool`): whether the head gives outputs for every token.
        dtype (`torch.dtype`): dtype of the base's weights.
        bf16 (`bool`): whether the step runs under bf16 autocast.
        four_bit (`bool`), nested (`bool`): whether linear layers are NF4, and with double quantization.
        peft_config (`LoraConfig`, *optional*): the adapter. Without it, all weights are trained.
        members (`int`, *optional*): number of members of an ensemble.
        branch_share (`float`, *optional*): share of the layers without adapters, for an ensemble.
        own_batches (`bool`): each member has a different batch, all of the same size.
        checkpointing (`bool`), reentrant (`bool`): gradient checkpointing, and whether it is reentrant.
        accumulates (`bool`): gradients of an earlier micro-batch exist already.
        dropout (`bool`): leave dropout on.
        optimizer (`str`): Trainer's `optim`.
        attention (`str`): `attn_implementation` for padded rows.
        on_gpu (`bool`): do what PEFT does under autocast on a GPU. `False` to compare with a run on a CPU.
    """

    config: PretrainedConfig
    batch: dict[str, Any]
    num_labels: int = 1
    token_level: bool = False
    dtype: torch.dtype = torch.float32
    bf16: bool = False
    four_bit: bool = False
    nested: bool = False
    peft_config: LoraConfig | None = None
    members: int | None = None
    branch_share: float | None = None
    own_batches: bool = False
    checkpointing: bool = False
    reentrant: bool = False
    accumulates: bool = False
    dropout: bool = False
    optimizer: str = "adamw_torch_fused"
    attention: str = "sdpa"
    on_gpu: bool = True


@dataclass
class _RepeatedBefore(PrefixLayout):
    """A layout whose copies for the members are made in advance, because that needs real tensors."""

    copies: PrefixLayout | None = None

    def repeated(self, times: int) -> PrefixLayout:
        return self.copies


def estimate(step: TrainingStep) -> Estimate:
    """
    Run one forward and backward pass on fake tensors, and count memory and operations.

    Raises:
        `ValueError`: if something cannot be estimated. The message says what.
    """
    check_optimizer(step.optimizer)
    layout = _layout(step)
    with torch.device("meta"):
        model = _build(step)

    def loss_of() -> tuple[torch.Tensor, int]:
        with autocast(step.bf16):
            logits = _forward(model, step, layout)
        return logits.float().sum(), logits.numel() * logits.element_size()

    return count_training(model, loss_of, step.optimizer, step.accumulates, _tokens(step.batch))


def _layout(step: TrainingStep) -> PrefixLayout | None:
    layout = step.batch.get("prefix_layout")
    if layout is None or step.members is None:
        return layout
    return _RepeatedBefore(**layout.__dict__, copies=layout.repeated(step.members))


def _build(step: TrainingStep) -> nn.Module:
    """Build the model as the trainers do: head, 4-bit layers, adapters, checkpointing, no dropout."""
    config = copy.deepcopy(step.config)
    config.num_labels = step.num_labels
    kind = choose_head_class(config) if step.token_level else "sequence"
    auto_class = AutoModelForSequenceClassification if kind == "sequence" else AutoModelForTokenClassification
    model = auto_class.from_config(config, dtype=step.dtype, attn_implementation=step.attention)
    head = head_modules(model)
    if step.four_bit:
        quantized(model, step.dtype, step.nested, head)
    make_head_exact(model, head)
    adapter = step.peft_config
    if step.members is not None:
        adapter = adapter if step.branch_share is None else branch_at(model, adapter, step.branch_share)
        model = StackedRewardModel(model, complete_config(model, adapter, head), head, step.members, check=False)
        if step.own_batches:
            model.use_rows([1] * step.members)
    elif adapter is not None:
        model = add_adapter(model, adapter, head)
    prepare_layers(model, step.dropout, step.on_gpu)
    model.train()
    if step.checkpointing:
        checkpointed(model, step.reentrant)
    return model


def _forward(model: nn.Module, step: TrainingStep, layout: PrefixLayout | None) -> torch.Tensor:
    """The head's output for every token, or after pooling."""
    if layout is not None:
        return flat_token_logits(model, layout)
    return run_with_head_output(model, step.batch["input_ids"], step.batch["attention_mask"])[1]


def _tokens(batch: dict[str, Any]) -> int:
    layout = batch.get("prefix_layout")
    return batch["input_ids"].numel() if layout is None else layout.num_tokens
