"""How much memory a training step takes, and how much it computes, found without a GPU and without weights.

The model is built with tensors that have a shape, a dtype and no numbers, and runs a real forward and backward pass on
them: LoRA, gradient checkpointing, flat rows, members of an ensemble, autocast. Every tensor that an operation makes
is counted until it is freed ([`LiveBytes`]). 4-bit layers are stand-ins of the same size that make the same tensors.

Not seen: what a kernel allocates for itself, what the allocator rounds up and keeps, the CUDA context.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PretrainedConfig

from trl_ext.data.prefix_layout import PrefixLayout

from .building import add_adapter, choose_head_class
from .heads import head_modules, make_head_exact, run_with_head_output
from .live_bytes import LiveBytes
from .member_config import branch_at, complete_config
from .shared_prefix import flat_token_logits
from .stacked_model import StackedRewardModel


GIB = 2**30
BLOCK = 64
"""Weights that share a scale in NF4 (bitsandbytes' default)."""
NESTED_BLOCK = 256
"""Scales that share a scale when they are quantized too (double quantization)."""
CPU_ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"
"""Not among the operations that torch counts."""
STATE_BYTES = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "paged_adamw_32bit": 8.0,
    "adamw_8bit": 2.0 + 8 / NESTED_BLOCK,
    "adamw_bnb_8bit": 2.0 + 8 / NESTED_BLOCK,
    "paged_adamw_8bit": 2.0 + 8 / NESTED_BLOCK,
    "sgd": 0.0,
}
"""Bytes of optimizer state for each trained parameter (in fp32)."""
SMALLEST_IN_8_BITS = 4096
"""Numbers of a tensor: bitsandbytes keeps 32-bit states for smaller ones, and Trainer has it do so for embeddings."""


@dataclass
class TrainingStep:
    """
    What is trained, and on which batch.

    Args:
        config (`PretrainedConfig`): the architecture.
        batch (`dict`): of a collator: `prefix_layout` for a flat row, or `input_ids` and `attention_mask`.
        num_labels (`int`): outputs of the head. token_level (`bool`): whether it gives them for every token.
        dtype (`torch.dtype`): of the base's weights. bf16 (`bool`): whether the step runs under bf16 autocast.
        four_bit (`bool`), nested (`bool`): NF4 for linear layers; with double quantization.
        peft_config (`LoraConfig`, *optional*): adapters; all weights are trained without.
        members (`int`, *optional*), branch_share (`float`, *optional*): of an ensemble.
        own_batches (`bool`): the rows of the batch are the members' own, equally many each.
        checkpointing (`bool`): gradient checkpointing. reentrant (`bool`): its kind.
        accumulates (`bool`): gradients of an earlier micro-batch are there already.
        dropout (`bool`): leave dropout on.
        optimizer (`str`): Trainer's `optim`.
        attention (`str`): `attn_implementation` for padded rows.
        on_gpu (`bool`): follow what PEFT does under autocast on a GPU; `False` to compare with a run on CPU.
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
class Estimate:
    """
    Bytes and operations of one micro-batch, forward and backward.

    `weights` by kind; `gradients` and `optimizer` of what is trained; `activations` is the most that was alive beside
    these at one time: `saved` of it waited for the backward pass when the forward pass had ended, and `logits` is the
    head's output. `peak` is the whole. `flops` counts matrix products and attention.
    """

    weights: dict[str, int]
    gradients: int
    optimizer: int
    activations: int
    saved: int
    logits: int
    peak: int
    flops: int
    model_tokens: int
    trained_parameters: int
    notes: list[str] = field(default_factory=list)

    def parts(self) -> dict[str, int]:
        """What the peak is made of, in bytes."""
        return {
            **{f"weights: {name}": size for name, size in self.weights.items() if size},
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "logits": self.logits,
            "activations": self.activations - self.logits,
        }


@dataclass
class _RepeatedBefore(PrefixLayout):
    """A layout whose copies for the members were made where tensors have numbers."""

    copies: PrefixLayout | None = None

    def repeated(self, times: int) -> PrefixLayout:
        return self.copies


class _Flops(TorchDispatchMode):
    """Operations of matrix products and attention. (torch's own counter also keeps what checkpointing would free.)"""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if str(packet) == CPU_ATTENTION:
            self.total += sdpa_flop_count(*(states.shape for states in args[:3]))
        elif str(packet) == f"{CPU_ATTENTION}_backward":
            self.total += sdpa_backward_flop_count(*(states.shape for states in args[:4]))
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=output)
        return output


class _Dequantized(torch.autograd.Function):
    """x W^T with a W that is made for the product and freed after it, once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int], scales: int) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.shape, ctx.scales = shape, scales
        return x @ _unpacked(shape, scales, x).t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        return gradient @ _unpacked(ctx.shape, ctx.scales, gradient), None, None, None


def _unpacked(shape: tuple[int, int], scales: int, like: torch.Tensor) -> torch.Tensor:
    block_scales = like.new_empty(scales, dtype=torch.float32)  # noqa: F841  alive while the weights are made
    return like.new_empty(shape)


class StandIn4bit(bnb.nn.Linear4bit):
    """A linear layer of bitsandbytes' size in NF4 that makes the tensors of one, without numbers."""

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype, nested: bool):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        number = linear.weight.numel()
        blocks = -(-number // BLOCK)
        scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 * 256 if nested else 4 * blocks  # bytes
        packed = linear.weight.new_empty(-(-number // 2), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scales", linear.weight.new_empty(scales + 4 * 16, dtype=torch.uint8))
        self.weight.compress_statistics, self.weight.quant_type = nested, "nf4"  # PEFT asks
        self.bias = linear.bias
        self.compute_dtype = compute_dtype
        self._blocks = blocks if nested else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        output = _Dequantized.apply(x.to(self.compute_dtype), self.weight, shape, self._blocks)
        if self.bias is not None:
            output = output + self.bias.to(self.compute_dtype)
        return output.to(x.dtype)


def estimate(step: TrainingStep) -> Estimate:
    """
    Run one forward and backward pass without numbers and count.

    Raises:
        `ValueError`: something that cannot be estimated; says what.
    """
    if step.optimizer not in STATE_BYTES:
        raise ValueError(
            f"The size of optim={step.optimizer!r} is not known here. Known: {', '.join(STATE_BYTES)}. Measure it on "
            "the device instead."
        )
    layout = step.batch.get("prefix_layout")
    if layout is not None and step.members is not None:
        layout = _RepeatedBefore(**layout.__dict__, copies=layout.repeated(step.members))
    with torch.device("meta"):
        model = _build(step)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model)
        weights = _weights(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = sum(p.numel() * p.element_size() for p in trained)
        if step.accumulates:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        there = [*model.parameters(), *model.buffers()]
        there += [p.grad for p in trained if p.grad is not None]
        flops = _Flops()
        with LiveBytes(there) as count, flops:
            with _autocast(step):
                logits = _forward(model, step, layout)
            loss = logits.float().sum()
            logits_bytes = logits.numel() * logits.element_size()
            del logits
            saved = count.live
            loss.backward()
    grown = 0 if step.accumulates else gradients  # they came into being during the pass
    optimizer = _optimizer_bytes(model, step.optimizer)
    own = sum(weights.values()) + optimizer
    peak = own + max(count.peak + (gradients - grown), gradients)
    return Estimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=peak - own - gradients,
        saved=saved,
        logits=logits_bytes,
        peak=peak,
        flops=flops.total,
        model_tokens=_tokens(step.batch),
        trained_parameters=sum(p.numel() for p in trained),
    )


def _build(step: TrainingStep) -> nn.Module:
    """The model as the trainers build it: head, 4-bit layers, adapters, checkpointing, no dropout."""
    config = copy.deepcopy(step.config)
    config.num_labels = step.num_labels
    kind = choose_head_class(config) if step.token_level else "sequence"
    auto_class = AutoModelForSequenceClassification if kind == "sequence" else AutoModelForTokenClassification
    model = auto_class.from_config(config, dtype=step.dtype, attn_implementation=step.attention)
    head = head_modules(model)
    if step.four_bit:
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and not any(path == h or path.startswith(f"{h}.") for h in head):
                model.set_submodule(path, StandIn4bit(module, step.dtype, step.nested))
        model.requires_grad_(False)
        model.is_quantized = model.is_loaded_in_4bit = True
    make_head_exact(model, head)
    adapter = step.peft_config
    if step.members is not None:
        adapter = adapter if step.branch_share is None else branch_at(model, adapter, step.branch_share)
        model = StackedRewardModel(model, complete_config(model, adapter, head), head, step.members, check=False)
        if step.own_batches:
            model.use_rows([1] * step.members)
    elif adapter is not None:
        model = add_adapter(model, adapter, head)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not step.dropout:
            module.p = 0.0
        if isinstance(module, LoraLayer) and step.on_gpu:
            module.register_forward_pre_hook(_autocast_as_on_gpu)
    model.train()
    if step.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": step.reentrant})
        if isinstance(model, PeftModel):
            model.enable_input_require_grads()
    return model


def _make_fake(model: nn.Module) -> None:
    """Tensors on the CPU without numbers in place of those on the device `meta`, on which fewer operations run."""
    new: dict[int, torch.Tensor] = {}
    for module in model.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if id(tensor) not in new:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                new[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
            setattr(module, name, new[id(tensor)])


def _forward(model: nn.Module, step: TrainingStep, layout: PrefixLayout | None) -> torch.Tensor:
    """The head's output for every token, or after pooling."""
    if layout is not None:
        return flat_token_logits(model, layout)
    return run_with_head_output(model, step.batch["input_ids"], step.batch["attention_mask"])[1]


def _tokens(batch: dict[str, Any]) -> int:
    layout = batch.get("prefix_layout")
    return batch["input_ids"].numel() if layout is None else layout.num_tokens


def _weights(model: nn.Module) -> dict[str, int]:
    """Bytes of the base (4-bit and other), and of what is trained."""
    sizes = {"base, 4-bit": 0, "base": 0, "trained": 0}
    packed = {id(t) for m in model.modules() if isinstance(m, StandIn4bit) for t in (m.weight, m.scales)}
    for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values():
        kind = "base, 4-bit" if id(tensor) in packed else "trained" if tensor.requires_grad else "base"
        sizes[kind] += tensor.numel() * tensor.element_size()
    return sizes


def _optimizer_bytes(model: nn.Module, optimizer: str) -> int:
    """What the optimizer keeps for all that is trained."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    size = 0.0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        each = STATE_BYTES[optimizer]
        if optimizer.startswith("adamw_torch"):  # states have the parameter's dtype
            each = 2.0 * parameter.element_size()
        elif "8bit" in optimizer and (parameter.numel() < SMALLEST_IN_8_BITS or id(parameter) in embeddings):
            each = STATE_BYTES["adamw_torch"]
        size += each * parameter.numel()
    return int(size)


def _autocast_as_on_gpu(module: nn.Module, args: tuple) -> None:
    """PEFT's 4-bit layers ask for the autocast state of a GPU, also when a checkpointed layer runs again."""
    torch.set_autocast_enabled("cuda", torch.is_autocast_enabled("cpu"))


@contextmanager
def _autocast(step: TrainingStep) -> Iterator[None]:
    """bf16 autocast of the CPU, whose tensors these are; that of the GPU is put back as it was."""
    if not step.bf16:
        yield
        return
    before = torch.is_autocast_enabled("cuda")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)
