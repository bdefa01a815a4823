"""Shared prefixes: attention over a flat row that holds the prompt of a group once, before its completions.

Apart from attention, a decoder works token by token, so nothing else changes. The registered attention function groups
queries, keys and values by index and calls SDPA once for all sequences of similar lengths. A prompt attends causally
to itself; a completion attends to its prompt and causally to itself.

It knows transformers' attention interface and [`PrefixLayout`]. It knows nothing of text, losses or data sets.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig

from trl_ext.data.prefix_layout import PrefixLayout, build_layout
from trl_ext.models.heads import last_head_module, unwrap


logger = logging.getLogger(__name__)

ATTENTION_NAME = "trl_ext_shared_prefix"


def shared_prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    prefix_layout: PrefixLayout,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attention of a flat row, with the signature that `transformers.AttentionInterface` requires.

    Args:
        module (`nn.Module`): the attention layer; not used.
        query (`torch.Tensor` of shape `(1, H, N, D)`), key, value (`torch.Tensor` of shape `(1, H_kv, N, D)`):
            Projected and rotated states of the row.
        attention_mask: not used; the layout says which tokens each token sees.
        prefix_layout ([`PrefixLayout`]): the row's layout, on the same device.
        dropout, scaling, sliding_window, softcap:
            The layer's values. The window counts positions, not indices of the row.
        s_aux (`torch.Tensor` of shape `(H,)`, *optional*): attention sinks.

    Returns:
        `torch.Tensor` of shape `(1, N, H, D)`, and `None` for the weights.
    """
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # (N, H, D)
    options = {"dropout": dropout, "scaling": scaling, "softcap": softcap, "sinks": s_aux}
    outputs = [
        _attend(
            query[block.query_index],
            key[block.key_index],
            value[block.key_index],
            block.mask(sliding_window),
            **options,
        )
        for block in prefix_layout.blocks
    ]  # (A * Q, H, D) each
    return torch.cat(outputs)[prefix_layout.inverse][None], None


AttentionInterface.register(ATTENTION_NAME, shared_prefix_attention)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *,
    dropout: float, scaling: float | None, softcap: float | None, sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Attention of (B, T, H, D) states; causal where `mask` is None. Returns (B * T, H, D)."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # (B, H, T, D)
    repeats = query.shape[1] // key.shape[1]
    plain = softcap is None and sinks is None
    # on a GPU no fast kernel supports a mask together with fewer key heads than query heads
    if repeats > 1 and not (plain and (mask is None or query.device.type == "cpu")):
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    if plain:
        output = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.transpose(1, 2).flatten(0, 1)
    logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is None:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    logits = logits.float().masked_fill(~mask, torch.finfo(torch.float32).min)
    if sinks is not None:
        sink = sinks.float().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = logits.softmax(dim=-1)
    weights = nn.functional.dropout(weights.to(value.dtype), p=dropout)
    return (weights @ value).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class SharedPrefixSupport:
    """Whether a model can run flat rows, with the reason or the measured difference.

    Args:
        supported (`bool`): whether flat rows give the same hidden states as padded rows.
        reason (`str`): one sentence for the log.
        max_difference (`float`, *optional*): largest difference of a final hidden state in the check.
    """

    supported: bool
    reason: str
    max_difference: float | None = None


def current_attention(model: nn.Module) -> str:
    """Name of the attention function in use."""
    return unwrap(model).config.get_text_config()._attn_implementation


def select_attention(model: nn.Module, name: str) -> None:
    """Switch the model to the attention function `name`, unless it is in use already."""
    if current_attention(model) != name:
        unwrap(model).set_attn_implementation(name)


def flat_token_logits(model: nn.Module, layout: PrefixLayout, call: Callable | None = None) -> torch.Tensor:
    """
    The head's output for every token of a flat row.

    The model keeps the shared-prefix attention afterwards, because gradient checkpointing runs the layers again in the
    backward pass. Call [`select_attention`] before the next padded batch.

    Args:
        model (`nn.Module`): the model of [`candidate_scores`](heads); may be wrapped.
        layout ([`PrefixLayout`]): the flat row, on the model's device.
        call (`Callable`, *optional*): what to call instead of `model`.

    Returns:
        `torch.Tensor` of shape `(N, C)`, fp32.
    """
    captured = {}
    handle = last_head_module(unwrap(model)).register_forward_hook(
        lambda module, args, output: captured.update(output=output, hidden=args[0])
    )
    select_attention(model, ATTENTION_NAME)
    try:
        (call or model)(
            input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, prefix_layout=layout
        )
    finally:
        handle.remove()
    return captured["output"].flatten(0, 1).float()  # GPT-2 returns one row per member of a stacked model


def flat_scores(model: nn.Module, layout: PrefixLayout, call: Callable | None = None) -> torch.Tensor:
    """
    The logits at the last token of each sequence: fp32 `(S, C)`, groups in order.

    A stacked model ([`StackedRewardModel`](stacked_model)) gives the logits of all members: `(M * S, C)`, member by
    member.
    """
    logits = flat_token_logits(model, layout, call)
    last = layout.last.to(logits.device)
    rows = torch.arange(0, len(logits), layout.num_tokens, device=logits.device)  # where each member's row begins
    return logits[(rows[:, None] + last).flatten()]


def supports_shared_prefix(
    model: nn.Module, max_length: int | None = None, head: nn.Module | None = None
) -> SharedPrefixSupport:
    """
    Whether the model gives the same hidden states from flat rows as from padded rows.

    The config decides for architectures with layers that are not softmax attention: they are refused. All others are
    decided by a numerical check: two groups in a row, ragged K and lengths, a one-token completion, and a group longer
    than the sliding window if `max_length` exceeds it.

    Args:
        model (`nn.Module`): sequence-classification model, possibly wrapped by PEFT. Its mode is restored.
        max_length (`int`, *optional*): longest sequence that the model will see, in tokens.
        head (`nn.Module`, *optional*): the module that reads the final hidden states. Needed for a model without a
            classification head, such as the `lm_head` of a language model.
    """
    base = unwrap(model)
    config = base.config.get_text_config()
    used = config._attn_implementation
    refused = refused_by_config(config, used)
    if refused is not None:
        return SharedPrefixSupport(False, refused)
    if head is None and "score" not in dict(base.named_children()):
        return SharedPrefixSupport(False, f"{type(base).__name__} is no decoder with a `score` head")
    if not base._supports_attention_backend:
        return SharedPrefixSupport(False, f"{type(base).__name__} does not take registered attention functions")
    try:
        difference, scale = _measure_difference(
            model, _check_groups(config, max_length), head or last_head_module(base)
        )
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        return SharedPrefixSupport(False, f"the model cannot run a flat row: {type(error).__name__}: {error}")
    finally:
        select_attention(model, used)
    exact = next(base.get_submodule(base.base_model_prefix).parameters()).dtype == torch.float32
    tolerance = (1e-4 if exact else 3e-2) * max(1.0, scale)
    if not difference <= tolerance:  # also when NaN
        return SharedPrefixSupport(
            False, f"flat and padded hidden states differ by {difference:.2g} (allowed: {tolerance:.2g})", difference
        )
    return SharedPrefixSupport(True, f"flat and padded hidden states differ by at most {difference:.2g}", difference)


def refused_by_config(config: PretrainedConfig, attention: str) -> str | None:
    """Why a (text) config or the attention function rules out flat rows; `None` if it does not. Needs no model."""
    if attention not in ("sdpa", "eager"):
        return f"attention is {attention!r}; shared prefixes run beside 'sdpa' or 'eager'"
    kinds = set(config.to_dict().get("layer_types") or []) - {"full_attention", "sliding_attention"}
    return f"layers of the kind {sorted(kinds)} mix tokens outside softmax attention" if kinds else None


def is_wanted(wish: bool | str) -> bool:
    """Whether a `shared_prefix` argument allows flat rows; raises `ValueError` for an unknown value."""
    if wish not in ("auto", True, False):
        raise ValueError(f"shared_prefix={wish!r} is not known. Needed: 'auto', True or False.")
    return wish is not False


def is_granted(wish: bool | str, support: SharedPrefixSupport) -> bool:
    """Whether flat rows will be used; raises `ValueError` if the user requires them and the model cannot run them."""
    if wish is True and not support.supported:
        raise ValueError(f"shared_prefix=True is not possible: {support.reason}. Set shared_prefix='auto' or False.")
    return support.supported


def use_shared_prefix(
    model: nn.Module, wish: bool | str, max_length: int | None = None, head: nn.Module | None = None
) -> bool:
    """
    Decide from the `shared_prefix` argument of a trainer or scorer whether flat rows will be used.

    `False` turns them off. `"auto"` uses them if the model supports them. `True` raises `ValueError` if it does not. A
    log line gives the decision and the reason.
    """
    if not is_wanted(wish):
        return False
    support = supports_shared_prefix(model, max_length, head)
    granted = is_granted(wish, support)
    logger.info(f"Shared prefixes are {'on' if granted else 'off'}: {support.reason}.")
    return granted


def _check_groups(config, max_length: int | None) -> list[tuple[list[int], list[list[int]]]]:
    """Groups of random ids for the numerical check."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()

    groups = [(ids(9), [ids(5), ids(1), ids(7)]), (ids(4), [ids(3), ids(6)]), ([], [ids(2)])]
    window = config.to_dict().get("sliding_window")
    if window is not None and (max_length is None or max_length > window):
        groups.append((ids(window), [ids(5), ids(1)]))
    return groups


@torch.no_grad()
def _measure_difference(
    model: nn.Module, groups: list[tuple[list[int], list[list[int]]]], head: nn.Module
) -> tuple[float, float]:
    """The largest difference of the head's input between flat and padded rows, and the largest hidden state."""
    device = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    hidden: list[torch.Tensor] = []
    handle = head.register_forward_hook(lambda m, args, output: hidden.append(args[0]))
    plain = current_attention(model)
    model.eval()
    try:
        layout = build_layout(groups).to(device)
        padded = [
            model(input_ids=torch.tensor([prompt + own], device=device), use_cache=False) and hidden[-1][0, -1]
            for prompt, candidates in groups
            for own in candidates
        ]
        select_attention(model, ATTENTION_NAME)
        model(input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, prefix_layout=layout)
        flat = hidden[-1][0, layout.last]
    finally:
        handle.remove()
        select_attention(model, plain)
        for module in training:
            module.training = True
    padded = torch.stack(padded).float()
    return (flat.float() - padded).abs().max().item(), padded.abs().max().item()
