"""Repeats a batch for all ensemble members at the first layer in which the members differ.

The layers below (the *trunk*) are frozen and identical in all members. The trunk runs once and without a gradient,
with and without gradient checkpointing. This module knows layers, their arguments and flat rows. It knows nothing of
adapters, heads or scores.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trl_ext.data.prefix_layout import PrefixLayout


class FanOut:
    """
    Hooks on a model's layers that repeat a batch once for each member.

    Args:
        layers (`nn.ModuleList`, *optional*): the model's layers; `None` to repeat the model's inputs instead.
        first (`int`): the first layer in which members differ.
        members (`int`): M.

    Attributes:
        times (`int`): how often a batch is repeated; 1 if each row belongs to one member already.
    """

    def __init__(self, layers: nn.ModuleList | None, first: int, members: int):
        self.first = 0 if layers is None else first
        self.times = members
        self._trunk = [] if layers is None else list(layers[:first])
        self._at_inputs = layers is None
        self._repeated: dict[int, tuple[Any, Any]] = {}  # by the id of the object, which the entry keeps alive
        if layers is not None:
            if self._trunk:
                layers[0].register_forward_pre_hook(self._enter_trunk, with_kwargs=True)
            layers[first].register_forward_pre_hook(self._leave_trunk, with_kwargs=True)
            for layer in layers[first + 1 :]:
                layer.register_forward_pre_hook(self._within_branches, with_kwargs=True)

    def begin(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs for the model's next pass. Call this before every pass."""
        self._repeated.clear()
        for layer in self._trunk:
            layer.gradient_checkpointing = False  # it has nothing to recompute
        if not self._at_inputs or self.times == 1:
            return inputs
        rows = len(inputs["input_ids"])
        layout = inputs.get("prefix_layout")
        return {name: self._repeat(value, rows, layout) for name, value in inputs.items()}

    def end(self) -> None:
        """Forget the repeated tensors. Call this if no backward pass follows."""
        self._repeated.clear()

    @staticmethod
    def _enter_trunk(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden, args, kwargs = _without_hidden(args, kwargs)
        return (hidden.detach(), *args), kwargs

    def _leave_trunk(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden, args, kwargs = _without_hidden(args, kwargs)
        rows, layout = len(hidden), kwargs.get("prefix_layout")
        if self.times > 1:
            hidden = (
                hidden.repeat(1, self.times, 1) if layout else hidden.repeat(self.times, *[1] * (hidden.dim() - 1))
            )
        checkpointed = isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
        if self._trunk and checkpointed and layer.training and torch.is_grad_enabled():
            hidden = hidden.detach().requires_grad_()  # reentrant checkpointing needs an input with a gradient
        args, kwargs = self._repeat_all(args, kwargs, rows, layout)
        return (hidden, *args), kwargs

    def _within_branches(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden, args, kwargs = _without_hidden(args, kwargs)
        layout = kwargs.get("prefix_layout")
        rows = 1 if layout else len(hidden) // self.times
        args, kwargs = self._repeat_all(args, kwargs, rows, layout)
        return (hidden, *args), kwargs

    def _repeat_all(self, args: tuple, kwargs: dict, rows: int, layout: PrefixLayout | None) -> tuple[tuple, dict]:
        """The other arguments of a layer; those with an entry for each row are repeated."""
        if self.times == 1:
            return args, kwargs
        args = tuple(self._repeat(value, rows, layout) for value in args)
        return args, {name: self._repeat(value, rows, layout) for name, value in kwargs.items()}

    def _repeat(self, value: Any, rows: int, layout: PrefixLayout | None) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._repeat(item, rows, layout) for item in value)
        if not isinstance(value, (torch.Tensor, PrefixLayout)):
            return value
        if id(value) not in self._repeated:
            self._repeated[id(value)] = (value, self._repeat_now(value, rows, layout))
        return self._repeated[id(value)][1]

    def _repeat_now(self, value: torch.Tensor | PrefixLayout, rows: int, layout: PrefixLayout | None) -> Any:
        if isinstance(value, PrefixLayout):
            return value.repeated(self.times)
        if layout is not None:  # one row: its tokens are repeated
            per_token = value.dim() > 1 and value.shape[:2] == (1, layout.num_tokens)
            return value.repeat(1, self.times, *[1] * (value.dim() - 2)) if per_token else value
        if value.dim() and len(value) == rows:
            return value.repeat(self.times, *[1] * (value.dim() - 1))
        return value  # the same for all rows


def _without_hidden(args: tuple, kwargs: dict) -> tuple[torch.Tensor, tuple, dict]:
    """The hidden states, which come first or by name, and the other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


def find_layers(backbone: nn.Module, adapted: list[str], number: int) -> tuple[nn.ModuleList | None, int]:
    """
    The list of layers that holds all adapted modules, and the first layer that has one.

    Args:
        backbone (`nn.Module`): the model without its head.
        adapted (`list[str]`): names of the adapted modules in the backbone.
        number (`int`): how many layers the config says there are.

    Returns:
        `(None, 0)` if no list of so many layers holds them all.
    """
    for path, module in backbone.named_modules():
        are_layers = isinstance(module, nn.ModuleList) and len(module) == number
        if are_layers and all(name.startswith(f"{path}.") for name in adapted):
            return module, min(int(name.removeprefix(f"{path}.").split(".")[0]) for name in adapted)
    return None, 0
