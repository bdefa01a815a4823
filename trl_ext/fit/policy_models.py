"""The models that a step of `DenseGRPOTrainer` or `PPOTrainer` holds, built as the trainers do it, without weights.

It knows adapters, bases and heads. It does not know what a step does with them.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig
from trl.trainer import add_fused_lm_head

from trl_ext.fit.memory_count import prepare_layers, quantized
from trl_ext.models.ensemble.shared_base import new_adapter, use_adapter
from trl_ext.models.heads import head_modules, make_head_exact


@dataclass
class RewardAdapter:
    """
    A reward model on the policy's base.

    Args:
        peft_config (`LoraConfig`): its adapter.
        dense (`bool`): whether it gives rewards to parts of a completion.
        flat (`bool`): whether completions of a prompt share its tokens. Otherwise rows are padded.
    """

    peft_config: LoraConfig
    dense: bool
    flat: bool


@dataclass
class PolicyStep:
    """
    The models and the batches of a step, in tokens and completions.

    Args:
        config (`PretrainedConfig`): the architecture.
        prompt (`int`), completion (`int`): tokens of each prompt and completion.
        generated (`int`): completions that are generated and scored at one time.
        group (`int`): completions of a prompt.
        rows (`int`): completions of a micro-batch.
        dtype, bf16, four_bit, nested, checkpointing, reentrant, accumulates, dropout, optimizer, attention, on_gpu:
            as in [`TrainingStep`].
        peft_config (`LoraConfig`, *optional*): the policy's adapter. Without it, all weights are trained.
        critic (`bool`): whether there is a critic. It shares the base of a policy with an adapter.
        critic_config (`LoraConfig`, *optional*): the critic's adapter; by default that of the policy.
        rewards (`list[RewardAdapter]`): the reward models. Functions take no memory.
        reference (`bool`): whether there is a reference. A policy without an adapter needs a second model for it.
        passes (`int`): how many passes without gradients compute log-probabilities and values.
        gradients_in_generation (`bool`): whether gradients of earlier micro-batches exist while completions are
            generated.
        generates (`bool`): whether the model generates here. `False` if vLLM does.
        vllm (`int`): bytes that vLLM takes on this device.
        vllm_sleeps (`bool`): whether it takes them only while completions are generated.
    """

    config: PretrainedConfig
    prompt: int
    completion: int
    generated: int
    group: int
    rows: int
    dtype: torch.dtype = torch.float32
    bf16: bool = False
    four_bit: bool = False
    nested: bool = False
    peft_config: LoraConfig | None = None
    critic: bool = False
    critic_config: LoraConfig | None = None
    rewards: list[RewardAdapter] = field(default_factory=list)
    reference: bool = False
    passes: int = 0
    gradients_in_generation: bool = False
    generates: bool = True
    vllm: int = 0
    vllm_sleeps: bool = False
    checkpointing: bool = False
    reentrant: bool = False
    accumulates: bool = False
    dropout: bool = False
    optimizer: str = "adamw_torch_fused"
    attention: str = "sdpa"
    on_gpu: bool = True


class PolicyModels(nn.Module):
    """The policy, its reference, the critic and the reward models, as the trainers build them."""

    def __init__(self, step: PolicyStep):
        super().__init__()
        self.policy = _language_model(step)
        self.reference = None
        if step.reference and step.peft_config is None:
            self.reference = _language_model(step).requires_grad_(False)
        if not step.on_gpu:
            for model in filter(None, (self.policy, self.reference)):
                add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        if step.peft_config is not None:
            self.policy = get_peft_model(self.policy, copy.deepcopy(step.peft_config))
            if step.four_bit:  # as TRL does
                for parameter in self.policy.parameters():
                    if parameter.requires_grad:
                        parameter.data = parameter.data.to(torch.bfloat16)
        self.critic, self.critic_adapter = None, None
        if step.critic:
            self.critic, self.critic_adapter = self._critic(step)
        adapters = [new_adapter(self.policy, reward.peft_config, "reward")[:2] for reward in step.rewards]
        self.rewards = nn.ModuleList(model for model, _ in adapters)
        self.reward_adapters = [name for _, name in adapters]
        prepare_layers(self, step.dropout, step.on_gpu)

    def _critic(self, step: PolicyStep) -> tuple[nn.Module, str | None]:
        if step.peft_config is not None:
            return new_adapter(self.policy, step.critic_config or step.peft_config, "critic")[:2]
        config = copy.deepcopy(step.config)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=step.dtype, attn_implementation=step.attention
        )
        make_head_exact(model, head_modules(model))
        return model, None

    @property
    def language_model(self) -> nn.Module:
        """The policy without PEFT's wrapper."""
        return self.policy.get_base_model() if isinstance(self.policy, PeftModel) else self.policy

    def has_equal_layers(self, number: int) -> bool:
        """Whether all layers of the policy are alike."""
        config = self.language_model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ["same"]  # not all families have it
        lists = [m for m in self.language_model.modules() if isinstance(m, nn.ModuleList) and len(m) == number]
        shapes = [[[(name, p.shape) for name, p in layer.named_parameters()] for layer in layers] for layers in lists]
        return len(set(kinds)) == 1 and len(lists) == 1 and all(shape == shapes[0][0] for shape in shapes[0])

    def policy_weights(self) -> list[nn.Parameter]:
        """The trained weights of the policy."""
        return [p for p in self.policy.parameters() if p.requires_grad]

    def critic_weights(self) -> list[nn.Parameter]:
        """The trained weights of the critic."""
        if self.critic is None:
            return []
        with self.critic_active():
            return [p for p in self.critic.parameters() if p.requires_grad]

    def trained(self) -> list[nn.Parameter]:
        """All trained weights."""
        return [*self.policy_weights(), *self.critic_weights()]

    def critic_active(self) -> AbstractContextManager:
        """Switch to the critic's adapter."""
        return nullcontext() if self.critic_adapter is None else use_adapter(self.critic, self.critic_adapter)

    def beside_the_policy(self) -> dict[str, list[torch.Tensor]]:
        """The tensors of critic, reference and reward models, without a base that they share."""
        found: dict[str, list[torch.Tensor]] = {"critic": list(self.critic_weights()), "rewards": []}
        if self.critic is not None and self.critic_adapter is None:
            found["critic"] = [*self.critic.parameters(), *self.critic.buffers()]
        if self.reference is not None:
            found["reference"] = [*self.reference.parameters(), *self.reference.buffers()]
        for model, name in zip(self.rewards, self.reward_adapters, strict=True):
            with use_adapter(model, name):
                found["rewards"] += [p for p in model.parameters() if p.requires_grad]
        return found


def _language_model(step: PolicyStep) -> nn.Module:
    config = copy.deepcopy(step.config)
    model = AutoModelForCausalLM.from_config(config, dtype=step.dtype, attn_implementation=step.attention)
    if step.four_bit:
        head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
        quantized(model, step.dtype, step.nested, head)
    return model
