"""`Critic`: the value of every state of a completion, from an adapter on the policy's base or from a separate model.

It knows models, adapters and folders. It knows neither rewards nor advantages nor the policy's loss.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_ext.data.tokenization import TokenizationSettings
from trl_ext.models.adapters import PLAIN_INITS
from trl_ext.models.bases import check_base_is_saved, describe_base
from trl_ext.models.building import build_reward_model
from trl_ext.models.ensemble.shared_base import load_adapters, new_adapter, use_adapter
from trl_ext.models.heads import HeadError, head_class, head_modules, head_parameters, pad_right, run_with_head_output
from trl_ext.models.heads import unwrap as base_of
from trl_ext.models.loading import load_reward_model, local_folder, save_sidecar
from trl_ext.models.sidecar import Sidecar, make_probes, probe_scores


logger = logging.getLogger(__name__)

# Where a trainer saves its critic, below the policy's folder. When a Trainer resumes, it loads every adapter in a
# direct subfolder of the checkpoint into the policy, so the critic lies one level deeper.
CRITIC_FOLDER = "critic/value"
WEIGHTS = {True: "adapter_model.safetensors", False: "model.safetensors"}


class Critic:
    """
    A value model: a head of one output on every token of prompt and completion.

    Args:
        model (`PeftModel` or `PreTrainedModel`): a classification model.
        adapter (`str`, *optional*): its adapter, if it shares the policy's base; `None` for a separate model.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, adapter: str | None):
        self.model, self.adapter = model, adapter
        outputs = base_of(model).config.num_labels
        if outputs != 1:
            raise HeadError(
                f"The value model has {outputs} outputs; needed: one. Pass a reward model with one output."
            )
        self.head = head_modules(model)
        with self.active():
            self.parameters = [p for p in model.parameters() if p.requires_grad]

    @contextmanager
    def active(self, train: bool = False) -> Iterator[None]:
        """
        Switch from the policy's adapter to the critic's, which is trainable within, and back.

        A backward pass through the critic belongs within: gradient checkpointing runs the layers again.
        """
        with nullcontext() if self.adapter is None else use_adapter(self.model, self.adapter):
            was = self.model.training
            self.model.train(train)
            try:
                yield
            finally:
                self.model.train(was)

    def values(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        completion_ids: torch.Tensor,
        completion_mask: torch.Tensor,
    ) -> torch.Tensor:
        """
        The value of the state before each token of the completions, `(B, T)`, fp32. Call it within [`active`].

        Args:
            prompt_ids, prompt_mask (`torch.Tensor` of shape `(B, P)`): padded on the left.
            completion_ids, completion_mask (`torch.Tensor` of shape `(B, T)`): padded on the right.
        """
        ids = torch.cat([prompt_ids, completion_ids], dim=1)  # (B, P + T)
        attention = torch.cat([prompt_mask, completion_mask], dim=1)
        _, raw = run_with_head_output(self.model, *pad_right(ids, attention))  # (B, P + T, 1)
        before = prompt_mask.sum(1, keepdim=True) - 1 + torch.arange(completion_ids.shape[1], device=ids.device)
        return raw[..., 0].float().gather(1, before.clamp(0, ids.shape[1] - 1))  # (B, T)

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write a token-level reward model: its output at a token is the value of the state after that token."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        is_adapter = isinstance(self.model, PeftModel)
        with self.active():
            if is_adapter:
                name = self.model.active_adapter
                state = get_peft_model_state_dict(self.model, adapter_name=name, save_embedding_layers=False)
                state = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state.items()}
                save_file(state, folder / WEIGHTS[True], metadata={"format": "pt"})
                config = copy.deepcopy(self.model.peft_config[name])
                config.base_model_name_or_path = describe_base(self.model).id
                config.inference_mode = True
                config.save_pretrained(str(folder))
            else:
                self.model.save_pretrained(folder, max_shard_size="1000GB")  # one file, which `load` reads
            tokenizer.save_pretrained(folder)
            probes = make_probes(self.model)
            sidecar = Sidecar(
                base=describe_base(self.model),
                is_adapter=is_adapter,
                head_modules=self.head,
                token_policy=TokenizationSettings(append_eos=False).to_dict(),
                kind="outcome",
                label_meaning="expected sum of the rewards after this token",
                head_class=head_class(self.model),
                label_placement="all",
                pad_is_eos=tokenizer.pad_token_id == tokenizer.eos_token_id,
                probes={"input_ids": probes, "scores": probe_scores(self.model, probes)},
            )
            save_sidecar(self.model, sidecar, folder)

    def load(self, folder: str | Path) -> None:
        """Read the weights that [`save`] wrote. Raises `FileNotFoundError` if the folder holds no such critic."""
        is_adapter = isinstance(self.model, PeftModel)
        file = Path(folder, WEIGHTS[is_adapter])
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist, so the critic cannot be resumed. Needed: a checkpoint of PPOTrainer with the "
                "same kind of critic. To start with a saved critic, pass its folder as `value_model`."
            )
        state = load_file(file)
        with self.active():
            if is_adapter:
                set_peft_model_state_dict(self.model, state, adapter_name=self.model.active_adapter)
            else:
                self.model.load_state_dict(state, strict=False)


def make_critic(
    policy: PreTrainedModel | PeftModel,
    value_model: str | Path | None = None,
    peft_config: PeftConfig | None = None,
    *,
    seed: int = 0,
    gradient_checkpointing_kwargs: dict | None = None,
    gradient_checkpointing: bool = False,
) -> Critic:
    """
    The critic of a policy in memory.

    A policy with an adapter lends its frozen base: the critic is a second adapter with an fp32 head. A policy that
    trains all its weights has no frozen base to lend, so its critic is a separate model.

    Args:
        policy (`PreTrainedModel` or `PeftModel`): the policy.
        value_model (`str` or `Path`, *optional*):
            A saved reward model or critic with one output to start from. An adapter must have been trained on the
            policy's base. By default the critic starts with a head of zeros.
        peft_config (`PeftConfig`, *optional*): a new critic's adapter. Defaults to that of the policy.
        seed (`int`, *optional*): of a new adapter's weights. The global random state does not change.
        gradient_checkpointing, gradient_checkpointing_kwargs: for a separate model; a shared base is set up already.

    Raises:
        [`BaseMismatchError`]: the saved adapter was trained on another base.
        [`HeadError`]: the saved model has several outputs.
    """
    folder = None if value_model is None else local_folder(value_model, None)
    adapter = folder is not None and Path(folder, "adapter_config.json").is_file()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(policy, PeftModel) and (adapter or folder is None):
            check_base_is_saved(policy)
            if adapter:
                model, (name,) = load_adapters([folder], base_model=policy)
            else:
                model, name, _ = new_adapter(policy, peft_config or _adapter_like(policy), "critic")
            return Critic(model, name)
        model = _separate(policy, folder)
    if gradient_checkpointing:
        model.activation_checkpointing_enable(gradient_checkpointing_kwargs)
        if isinstance(model, PeftModel):
            model.enable_input_require_grads()
    critic = Critic(model, None)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    logger.warning(
        f"The critic is a separate model and takes {size:.2f} GiB for weights, and more for gradients and optimizer. "
        "A policy with an adapter and a critic that is an adapter on the same base share the base's weights."
    )
    return critic


def _separate(policy: PreTrainedModel | PeftModel, folder: str | None) -> PreTrainedModel | PeftModel:
    """A value model with its own base on the policy's device: a saved reward model, or the policy's base anew."""
    device = {"": policy.device}
    if folder is not None:
        model = load_reward_model(folder, is_trainable=True, device_map=device)
        if not isinstance(model, PeftModel):
            model.requires_grad_(True)
        return model
    source = base_of(policy).config._name_or_path
    if not source:
        raise ValueError(
            "The policy was not loaded from a folder or Hub repository, so a critic cannot be built like it. Save the "
            "policy and pass its folder, or pass `value_model`."
        )
    model, head = build_reward_model(source, dtype=policy.dtype, device_map=device)
    for parameter in head_parameters(model, head).values():
        nn.init.zeros_(parameter)
    return model


def _adapter_like(policy: PeftModel) -> PeftConfig:
    """The policy's adapter config for a new critic, without what belongs to a language model."""
    config = copy.deepcopy(policy.peft_config[policy.active_adapters[0]])
    config.modules_to_save = None
    config.inference_mode = False
    if isinstance(config, LoraConfig) and config.init_lora_weights not in PLAIN_INITS:
        config.init_lora_weights = True
    return config
