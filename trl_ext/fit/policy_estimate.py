"""Estimates the memory of a step of `DenseGRPOTrainer` and `PPOTrainer`, without a GPU and without weights.

Such a step has phases, and only one of them is in memory at a time: generation, rewards, and the training of policy
and critic. Each of them runs here on fake tensors, as in `memory_estimate.py`, and the largest decides. The
completions have their full length. Log-probabilities and values without a gradient take less than the training on the
same rows, so they are not run.

The estimate leaves out the numbers per token that the trainers keep beside token ids, such as advantages, and those
that `loss_type` makes of them: a few dozen bytes for each token of a completion.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache

from trl_ext.data.prefix_layout import PrefixLayout, build_layout
from trl_ext.fit.live_bytes import LiveBytes
from trl_ext.fit.memory_count import (
    Estimate,
    Flops,
    autocast,
    bytes_of,
    check_optimizer,
    checkpointed,
    make_fake,
    optimizer_bytes,
    weights_of,
)
from trl_ext.fit.policy_models import PolicyModels, PolicyStep
from trl_ext.models.ensemble.shared_base import use_adapter
from trl_ext.models.heads import run_with_head_output
from trl_ext.models.shared_prefix import current_attention, flat_scores, select_attention
from trl_ext.scoring.raw_scorer import TOKEN_BUDGET


TILE = (4096, 32768)
"""Rows and columns of the tile in which TRL's fused head computes logits."""
NUMBERS_OF_A_TOKEN = 7
"""fp32 numbers that it keeps for a token while it computes its log-probability."""
FEW_LAYERS = (2, 4)
"""Numbers of layers from which sizes of larger models follow."""


def estimate_policy(step: PolicyStep) -> Estimate:
    """
    Run each phase of a step on fake tensors, and count memory and operations.

    `flops` of the result belong to a micro-batch and its share of generation and scoring. `phases` has the bytes of
    each phase, with weights, optimizer and the gradients that exist then.

    The layers of most models are alike. Their phases then run with two and with four layers, and each size grows in
    proportion to the number of layers.

    Raises:
        `ValueError`: if something cannot be estimated. The message says what.
    """
    check_optimizer(step.optimizer)
    with torch.device("meta"):
        models = PolicyModels(step)
    sizes = _sizes_of_phases(step, models)
    policy, both = bytes_of(models.policy_weights()), bytes_of(models.trained())
    early = both if step.gradients_in_generation else 0
    gradients = {"generation": early, "rewards": early, "policy": both if step.accumulates else policy, "critic": both}
    activations: dict[str, int] = {}
    for (phase, _), size in sizes.items():
        activations[phase] = max(activations.get(phase, 0), int(size))
    flops, saved = activations.pop("operations"), activations.pop("saved")
    weights = weights_of(models, models.beside_the_policy())
    if step.vllm_sleeps:
        activations["generation"] = step.vllm
    elif step.vllm:
        weights["vLLM"] = step.vllm
    states = optimizer_bytes(models, models.trained(), step.optimizer)
    own = sum(weights.values()) + states
    phases = {name: own + size + gradients[name] for name, size in activations.items()}
    largest = max(phases, key=lambda name: phases[name])
    return Estimate(
        weights=weights,
        gradients=gradients[largest],
        optimizer=states,
        activations=activations[largest],
        saved=saved,
        logits=_bytes_of_tile(step) if largest == "policy" else 0,
        peak=phases[largest],
        flops=flops,
        model_tokens=step.rows * (step.prompt + step.completion),
        trained_parameters=sum(p.numel() for p in models.trained()),
        phases=phases,
    )


def _sizes_of_phases(step: PolicyStep, models: "PolicyModels") -> dict[tuple[str, str], float]:
    """What [`_Phases`] finds, from all layers or from a few."""
    number = step.config.get_text_config().num_hidden_layers
    # Without accumulation, gradients appear while activations go, and the larger of the two may be the other one.
    if number <= sum(FEW_LAYERS) or not step.accumulates or not models.has_equal_layers(number):
        return _count(step, models)
    few = []
    for layers in FEW_LAYERS:
        config = copy.deepcopy(step.config)
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None) is not None:  # not all families have it
            text.layer_types = text.layer_types[:layers]
        shorter = replace(step, config=config)
        with torch.device("meta"):
            short = PolicyModels(shorter)
        few.append(_count(shorter, short))
    (less, more), (at_less, at_more) = FEW_LAYERS, few
    return {name: size + (number - less) * (at_more[name] - size) / (more - less) for name, size in at_less.items()}


def _count(step: PolicyStep, models: "PolicyModels") -> dict[tuple[str, str], float]:
    layout = _layout(step)  # it reads numbers, so its tensors must be real
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(models)
        return _Phases(step, models, layout).run()


def _layout(step: PolicyStep) -> PrefixLayout:
    """As many prompts with their completions as a scorer puts in a flat row."""
    group = ([1] * step.prompt, [[1] * step.completion] * step.group)
    fit = TOKEN_BUDGET // (step.prompt + step.group * step.completion)
    return build_layout([group] * max(1, min(step.generated // step.group, fit)))


class _Phases:
    """Runs the phases of a step on fake models, and keeps what each part of them takes."""

    def __init__(self, step: PolicyStep, models: PolicyModels, layout: PrefixLayout):
        self.step, self.models, self.layout = step, models, layout
        self.policy_weights, self.critic_weights = models.policy_weights(), models.critic_weights()
        self.sizes: dict[tuple[str, str], float] = {}

    def run(self) -> dict[tuple[str, str], float]:
        """The bytes of each part of each phase, beside gradients; `operations`, and what is `saved` for backward."""
        self.sizes["operations", ""] = 0
        self._before_training()
        self._training()
        return self.sizes

    # ---------------------------------------------------------------------------------------------- without gradients
    def _before_training(self) -> None:
        """Run what happens for all `generated` completions."""
        step = self.step
        self.models.train()  # TRL generates in training mode, without gradient checkpointing
        with torch.no_grad():
            if step.generates:
                share = step.rows / step.generated
                self._run(("generation", "prompts"), self._read_prompts, share=share)
                self._run(("generation", "last token"), self._write_last_token, share=share * step.completion)
            self.models.eval()
            for number, reward in enumerate(step.rewards):
                padded = max(1, min(step.generated, TOKEN_BUDGET // (step.prompt + step.completion)))
                rows = len(self.layout.last) if reward.flat else padded
                self._run(("rewards", str(number)), partial(self._score, number, rows), share=step.rows / rows)
            self.models.train()

    def _read_prompts(self) -> None:
        cache = DynamicCache(config=self.step.config)
        self._next_token(cache, self.step.prompt, self.step.prompt)
        self.states = [[(part.shape, part.dtype) for part in (layer.keys, layer.values)] for layer in cache.layers]

    def _write_last_token(self) -> None:
        """The last token of the completions: the cache holds all tokens before it, and for a moment a layer twice."""
        step = self.step
        cache, length = DynamicCache(config=step.config), step.prompt + step.completion
        for number, parts in enumerate(self.states):
            shapes = [((*shape[:-2], length - 1, shape[-1]), dtype) for shape, dtype in parts]
            cache.update(*(torch.empty(shape, dtype=dtype) for shape, dtype in shapes), number)
        self._next_token(cache, 1, length)

    def _next_token(self, cache: DynamicCache, new: int, length: int) -> None:
        """Read `new` tokens of rows of `length` tokens, and choose the next one."""
        step, model = self.step, self.models.language_model
        ids, mask = (torch.ones(step.generated, number, dtype=torch.long) for number in (new, length))
        inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        with autocast(step.bf16 and step.peft_config is None):  # accelerate wraps the `forward` of a PeftModel only
            logits = model(**inputs, logits_to_keep=1).logits
        numbers = logits[:, -1].to(copy=True, dtype=torch.float32)
        del logits
        numbers.softmax(-1)

    def _score(self, number: int, rows: int) -> None:
        """A batch of a scorer, which runs without autocast."""
        step, model = self.step, self.models.rewards[number]
        with use_adapter(model, self.models.reward_adapters[number]):
            model.eval()
            if step.rewards[number].flat:
                attention = current_attention(model)
                flat_scores(model, self.layout)
                select_attention(model, attention)
            else:
                ids = torch.ones(rows, step.prompt + step.completion, dtype=torch.long)
                run_with_head_output(model, ids, torch.ones_like(ids))[1].float()

    # ------------------------------------------------------------------------------------------------------- training
    def _training(self) -> None:
        """The forward and backward passes of the policy, and then of the critic."""
        step, models = self.step, self.models
        if step.checkpointing:
            checkpointed(models.policy, step.reentrant)
            if models.critic is not None and models.critic_adapter is None:
                checkpointed(models.critic, step.reentrant)
        policy, both = bytes_of(self.policy_weights), bytes_of([*self.policy_weights, *self.critic_weights])
        if step.accumulates:
            for parameter in (*self.policy_weights, *self.critic_weights):
                parameter.grad = torch.zeros_like(parameter)
            policy = both
        self._run(("policy", ""), self._train_policy, both if step.accumulates else 0, policy)
        if models.critic is not None:
            self._run(("critic", ""), self._train_critic, policy, both)

    def _train_policy(self) -> None:
        log_probs = self._log_probs()
        self.sizes["saved", ""] = self.count.live
        self.sizes["operations", ""] += self.step.passes * self.counted.total
        log_probs.sum().backward()

    def _train_critic(self) -> None:
        step, model = self.step, self.models.critic
        ids = torch.ones(step.rows, step.prompt + step.completion, dtype=torch.long)
        with self.models.critic_active():
            model.train()
            with autocast(step.bf16):
                values = run_with_head_output(model, ids, torch.ones_like(ids))[1]
            values.float().sum().backward()

    def _log_probs(self) -> torch.Tensor:
        """The log-probabilities of a micro-batch, from TRL's fused head or, as on a GPU, from a stand-in."""
        step, model = self.step, self.models.language_model
        ids = torch.ones(step.rows, step.prompt + step.completion, dtype=torch.long)
        mask = torch.ones_like(ids)
        with autocast(step.bf16):
            if not step.on_gpu:
                labels = {"labels": ids.clone(), "fused_lm_head": True}
                return self.models.policy(input_ids=ids, attention_mask=mask, **labels).log_probs
            states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            states = states[:, step.prompt - 1 : -1].reshape(-1, states.shape[-1])  # (rows * completion, H)
            return _FusedHead.apply(states, model.get_output_embeddings().weight, _dtype_of_logits(step))

    # ------------------------------------------------------------------------------------------------------- counting
    def _run(
        self, part: tuple[str, str], call: Callable[[], Any], before: int = 0, after: int = 0, share: float = 1.0
    ) -> None:
        """
        Count a part of a phase.

        Args:
            part (`tuple[str, str]`): the phase, and a name.
            call (`Callable`): runs it.
            before (`int`), after (`int`): bytes of gradients when it begins and ends.
            share (`float`): how often it runs for a micro-batch.
        """
        known = [*self.models.parameters(), *self.models.buffers()]
        known += [p.grad for p in (*self.policy_weights, *self.critic_weights) if p.grad is not None]
        with LiveBytes(known) as self.count, Flops() as self.counted:
            call()
        self.sizes[part] = max(self.count.peak + before, after) - after
        self.sizes["operations", ""] += share * self.counted.total


def _dtype_of_logits(step: PolicyStep) -> torch.dtype:
    return torch.bfloat16 if step.bf16 else step.dtype


def _bytes_of_tile(step: PolicyStep) -> int:
    return min(step.rows * step.completion, TILE[0]) * TILE[1] * _dtype_of_logits(step).itemsize


class _FusedHead(torch.autograd.Function):
    """
    The tensors that TRL's fused head makes on a GPU, without their numbers.

    It makes a tile of logits, and again in the backward pass, and a few numbers for each token.
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        ctx.dtype = dtype
        numbers = [states.new_zeros(len(states), dtype=torch.float32) for _ in range(NUMBERS_OF_A_TOKEN)]
        _tiles(states, weight, dtype)
        return numbers[0]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        states, weight = ctx.saved_tensors
        of_states = torch.zeros(states.shape, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros(weight.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for _ in range(1 + (of_states is not None) + (of_weight is not None)):
            _tiles(states, weight, ctx.dtype)
        of_states = None if of_states is None else of_states.to(states.dtype)
        return of_states, None if of_weight is None else of_weight.to(weight.dtype), None


def _tiles(states: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> None:
    """Multiply states and weights tile by tile in one buffer."""
    rows, columns = TILE
    tile = torch.empty(min(len(states), rows), columns, dtype=dtype)
    for part in states.split(rows):
        for some in weight.split(columns):
            torch.mm(part.to(dtype), some.to(dtype).t(), out=tile[: len(part), : len(some)])
