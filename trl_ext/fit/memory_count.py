"""Counts live bytes and operations of a training step on fake tensors, which have a shape and a dtype but no data.

[`LiveBytes`] counts every tensor that an operation makes, until it is freed. Stand-ins replace 4-bit layers; they have
the same size and make the same tensors. This module knows models, optimizers and bytes. It knows nothing of data sets
or losses.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from trl_ext.fit.live_bytes import LiveBytes


GIB = 2**30
BLOCK = 64
"""Weights that share a scale in NF4 (bitsandbytes' default)."""
NESTED_BLOCK = 256
"""Scales that share a second scale under double quantization."""
CPU_ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"
"""Attention on the CPU, which torch's flop counter does not know."""
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
"""bitsandbytes keeps 32-bit states for tensors with fewer elements, and Trainer makes it do so for embeddings."""


@dataclass
class Estimate:
    """
    Bytes and operations of one micro-batch, forward and backward.

    Bytes: `weights` by kind, `gradients` and `optimizer` of the trained parameters, and `activations`, the most that
    was alive at one time besides these. `saved` is the part of the activations that the backward pass still needs
    after the forward pass, and `logits` is the head's output. `peak` is the total. `flops` counts matrix products and
    attention. A step of several phases, such as generation and training, has the total of each in `phases`, and the
    other sizes are those of the largest.
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
    phases: dict[str, int] = field(default_factory=dict)

    def parts(self) -> dict[str, int]:
        """The parts of the peak, in bytes."""
        return {
            **{f"weights: {name}": size for name, size in self.weights.items() if size},
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "logits": self.logits,
            "activations": self.activations - self.logits,
        }


class Flops(TorchDispatchMode):
    """Counts operations of matrix products and attention. (torch's counter keeps tensors that checkpointing frees.)"""

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
    """x W^T, where W is dequantized for the product and freed after it, and again in the backward pass."""

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
    """A stand-in for an NF4 layer of bitsandbytes: it has the same size and makes the same tensors, without data."""

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype, nested: bool):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        number = linear.weight.numel()
        blocks = -(-number // BLOCK)
        scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 * 256 if nested else 4 * blocks  # bytes
        packed = linear.weight.new_empty(-(-number // 2), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scales", linear.weight.new_empty(scales + 4 * 16, dtype=torch.uint8))
        self.weight.compress_statistics, self.weight.quant_type = nested, "nf4"  # PEFT reads them
        self.weight.quant_state = None  # `keep_4bit_exact_on_cpu` reads it
        self.bias = linear.bias
        self.compute_dtype = compute_dtype
        self._blocks = blocks if nested else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        output = _Dequantized.apply(x.to(self.compute_dtype), self.weight, shape, self._blocks)
        if self.bias is not None:
            output = output + self.bias.to(self.compute_dtype)
        return output.to(x.dtype)


def check_optimizer(optimizer: str) -> None:
    """Raise `ValueError` for an optimizer whose states have no known size."""
    if optimizer not in STATE_BYTES:
        raise ValueError(
            f"The size of optim={optimizer!r} is not known here. Known: {', '.join(STATE_BYTES)}. Measure it on "
            "the device instead."
        )


def count_training(
    model: nn.Module,
    loss_of: Callable[[], tuple[torch.Tensor, int]],
    optimizer: str,
    accumulates: bool,
    tokens: int,
) -> Estimate:
    """
    One forward and backward pass of a model on the device `meta`.

    Args:
        model (`nn.Module`): the model, in training mode.
        loss_of (`Callable`): runs the model; returns the loss and the bytes of the logits.
        optimizer (`str`): Trainer's `optim`.
        accumulates (`bool`): gradients of an earlier micro-batch exist already.
        tokens (`int`): number of tokens that the model processes.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(model)
        weights = weights_of(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = bytes_of(trained)
        if accumulates:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        there = [*model.parameters(), *model.buffers()]
        there += [p.grad for p in trained if p.grad is not None]
        flops = Flops()
        with LiveBytes(there) as count, flops:
            loss, logits = loss_of()
            saved = count.live
            loss.backward()
    grown = 0 if accumulates else gradients  # gradients that the pass has created
    states = optimizer_bytes(model, trained, optimizer)
    own = sum(weights.values()) + states
    peak = own + max(count.peak + (gradients - grown), gradients)
    return Estimate(
        weights=weights,
        gradients=gradients,
        optimizer=states,
        activations=peak - own - gradients,
        saved=saved,
        logits=logits,
        peak=peak,
        flops=flops.total,
        model_tokens=tokens,
        trained_parameters=sum(p.numel() for p in trained),
    )


def quantized(model: nn.Module, dtype: torch.dtype, nested: bool, skip: Sequence[str] = ()) -> None:
    """Replace the linear layers of a model by 4-bit stand-ins, except modules named in `skip`."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not any(path == name or path.startswith(f"{name}.") for name in skip):
            model.set_submodule(path, StandIn4bit(module, dtype, nested))
    model.requires_grad_(False)
    model.is_quantized = model.is_loaded_in_4bit = True


def prepare_layers(model: nn.Module, dropout: bool, on_gpu: bool) -> None:
    """Switch dropout off unless it is wanted, and let LoRA layers behave as on a GPU."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not dropout:
            module.p = 0.0
        if isinstance(module, LoraLayer) and on_gpu:
            module.register_forward_pre_hook(_autocast_as_on_gpu)


def checkpointed(model: nn.Module, reentrant: bool) -> None:
    """Switch gradient checkpointing on, as Trainer does."""
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if isinstance(model, PeftModel):
        model.enable_input_require_grads()


def make_fake(model: nn.Module) -> None:
    """Replace tensors on the device `meta` by fake tensors on the CPU, for which more operations exist."""
    new: dict[int, torch.Tensor] = {}
    for module in model.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if id(tensor) not in new:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                new[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
            setattr(module, name, new[id(tensor)])


def weights_of(model: nn.Module, others: Mapping[str, Iterable[torch.Tensor]] | None = None) -> dict[str, int]:
    """
    Bytes of the base (4-bit and other weights), and of the trained parameters.

    `others` are tensors that count under a name of their own, such as those of a second adapter.
    """
    sizes = {"base, 4-bit": 0, "base": 0, "trained": 0} | dict.fromkeys(others or {}, 0)
    packed = {id(t) for m in model.modules() if isinstance(m, StandIn4bit) for t in (m.weight, m.scales)}
    named = {id(tensor): name for name, tensors in (others or {}).items() for tensor in tensors}
    for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values():
        kind = "base, 4-bit" if id(tensor) in packed else "trained" if tensor.requires_grad else "base"
        sizes[named.get(id(tensor), kind)] += bytes_of([tensor])
    return sizes


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the elements of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_bytes(model: nn.Module, trained: Iterable[nn.Parameter], optimizer: str) -> int:
    """Bytes of the optimizer's states for the `trained` parameters of a model."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    size = 0.0
    for parameter in trained:
        each = STATE_BYTES[optimizer]
        if optimizer.startswith("adamw_torch"):  # states have the parameter's dtype
            each = 2.0 * parameter.element_size()
        elif "8bit" in optimizer and (parameter.numel() < SMALLEST_IN_8_BITS or id(parameter) in embeddings):
            each = STATE_BYTES["adamw_torch"]
        size += each * parameter.numel()
    return int(size)


def _autocast_as_on_gpu(module: nn.Module, args: tuple) -> None:
    """PEFT's 4-bit layers read the autocast state of the GPU, so copy the CPU's state to it before each layer."""
    torch.set_autocast_enabled("cuda", torch.is_autocast_enabled("cpu"))


@contextmanager
def autocast(bf16: bool) -> Iterator[None]:
    """bf16 autocast on the CPU, where the fake tensors are. The autocast state of the GPU is restored afterwards."""
    if not bf16:
        yield
        return
    before = torch.is_autocast_enabled("cuda")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)
