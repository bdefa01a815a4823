"""One base model with the adapters and heads of M ensemble members; one pass gives the output of all of them.

It knows PEFT configs, adapter files, and the layer where a batch is repeated for the members. It knows nothing of
data, losses or training. To score with saved members:

```python
model = StackedRewardModel.from_folders(["ensemble/member-0", "ensemble/member-1"])
scores = member_scores(model, input_ids, attention_mask)  # (M, N)
```

A member is an ordinary PEFT adapter on disk, and a slice of stacked tensors in memory. The conversion copies the
numbers unchanged.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from trl_ext.models.building import is_quantized
from trl_ext.models.ensemble.branching import FanOut, find_layers
from trl_ext.models.ensemble.member_config import check_stackable, complete_config, config_differences
from trl_ext.models.ensemble.stacked_lora import MemberRows, StackedLinear, StackedLoRA
from trl_ext.models.heads import HeadError, run_with_head_output, token_logits_at_last
from trl_ext.models.loading import load_reward_model
from trl_ext.models.sidecar import get_sidecar, set_sidecar


logger = logging.getLogger(__name__)

MEMBER = "member-{}"
"""Name of a member's PEFT adapter and of its folder inside the ensemble's folder."""
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


class StackedRewardModel(PeftModel):
    """
    A reward model that runs all members in every pass: N rows give logits of shape (M * N, ...), member by member.

    It saves and loads like a `PeftModel`: `save_pretrained` writes one ordinary adapter folder per member, and
    `load_adapter` reads one. PEFT's methods that switch, disable or merge adapters have no useful effect here; load a
    member's folder to use them.

    Members differ from the first layer that has an adapter. The layers below run once for all (`branch_layer`).

    Args:
        model (`PreTrainedModel`): the base with its head. It is changed.
        peft_config (`LoraConfig`): the LoRA settings that all members have in common, rank and targets included.
            `"all-linear"` may be combined with `layers_to_transform`.
        head (`list[str]`): names of the head's modules.
        members (`int`): M.
        seeds (`list[int]`, *optional*): a seed for each member. The seed draws the member's adapter, and its head
            unless the checkpoint has one, exactly as `RewardTrainer` does with that `seed`. `None` if the members are
            loaded next.
        check (`bool`, *optional*, defaults to `True`): run a few rows for all members and for one alone, and compare.
            Set it to `False` for weights on the meta device.

    Raises:
        `ValueError`: a setting of the config cannot be stacked.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        peft_config: PeftConfig,
        head: list[str],
        members: int,
        seeds: Sequence[int] | None = None,
        check: bool = True,
    ):
        check_stackable(peft_config, head)
        config = copy.deepcopy(peft_config) if seeds is None else complete_config(model, peft_config, head)
        drawn = 1 if seeds is None else members
        redraw = seeds is not None and not _brought_head(model)
        for member in range(drawn):
            if seeds is not None:
                set_seed(seeds[member])
            if redraw:
                _draw_head(model, head)
            if member == 0:
                super().__init__(model, config, MEMBER.format(0))
            else:
                self.add_adapter(MEMBER.format(member), copy.deepcopy(config))
        self.members = members
        self.head = head
        self.rows = MemberRows(members)
        self._stack(drawn)
        backbone = model.get_submodule(model.base_model_prefix)
        prefix = f"{model.base_model_prefix}."
        adapted = [name for name, module in model.named_modules() if isinstance(module, StackedLoRA)]
        number = model.config.get_text_config().num_hidden_layers
        layers, first = None, 0
        if all(name.startswith(prefix) for name in adapted):
            layers, first = find_layers(backbone, [name.removeprefix(prefix) for name in adapted], number)
        self.fan_out = FanOut(layers, first, members)
        if check:
            _check_members(self)

    @classmethod
    def from_folders(cls, folders: Sequence[str | Path], **load_kwargs: Any) -> "StackedRewardModel":
        """
        Load members that were saved as adapters on one base.

        Args:
            folders (`Sequence[str]`): a folder for each member.
            **load_kwargs: arguments of [`load_reward_model`], which loads the first member and the common base.

        Raises:
            `ValueError`: a folder holds no LoRA adapter, or differs from the first in base, rank, targets or head.
        """
        folders = [Path(folder) for folder in folders]
        for folder in folders:
            if not (folder / "adapter_config.json").is_file():
                raise ValueError(f"{folder} holds no adapter (no adapter_config.json), and only adapters are stacked.")
            differing = config_differences(folders[0], folder)
            if differing:
                raise ValueError(
                    f"{folder} and {folders[0]} differ in {', '.join(differing)}, so they cannot be stacked. "
                    "Needed: adapters of one LoRA configuration on one base. Score them one after the other instead."
                )
        first = load_reward_model(folders[0], **load_kwargs)
        sidecar = get_sidecar(first)
        config = first.peft_config["default"]
        head = [name for name, m in first.get_base_model().named_modules() if isinstance(m, ModulesToSaveWrapper)]
        model = cls(first.unload(), config, head, len(folders))
        for member, folder in enumerate(folders):
            model.load_member(member, folder)
        model.requires_grad_(False).eval()
        if sidecar is not None:
            set_sidecar(model, sidecar)
        return model

    @property
    def branch_layer(self) -> int:
        """The first layer in which members differ; those below run once for all."""
        return self.fan_out.first

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base's output. The head sees the rows of all members, and so do hooks and `member_scores`."""
        if args:
            raise TypeError("A stacked model takes its inputs by name: model(input_ids=..., attention_mask=...).")
        try:
            return super().forward(**self.fan_out.begin(kwargs))
        finally:
            if not torch.is_grad_enabled():
                self.fan_out.end()

    def use_rows(self, shares: list[int] | None = None, alone: int | None = None) -> None:
        """
        Set the members that the rows of the next passes belong to.

        Args:
            shares (`list[int]`, *optional*): how many rows each member has, if each row belongs to one member (counted
                in sequences of a padded batch or tokens of a flat row). Rows come in the order of the members. `None`
                means that every row is for all members.
            alone (`int`, *optional*): the only member that all rows are for.
        """
        self.rows.use(shares, alone)
        self.fan_out.times = self.members if shares is None and alone is None else 1

    # ------------------------------------------------------------------------------------------------------- files
    def member_state(self, member: int) -> dict[str, torch.Tensor]:
        """The tensors of one member under PEFT's names in a file; they are views of the stacked tensors."""
        state = {}
        for name, module in self.get_base_model().named_modules():
            if isinstance(module, StackedLoRA):
                state[f"{_PREFIX}{name}.lora_A.weight"] = module.lora_A.data[member]
                state[f"{_PREFIX}{name}.lora_B.weight"] = module.lora_B.data[member]
            elif isinstance(module, StackedLinear):
                for key, parameter in module.named_parameters():
                    state[f"{_PREFIX}{name}.{key}"] = parameter.data[member]
        return state

    def save_pretrained(self, save_directory: str, is_main_process: bool = True, **kwargs: Any) -> None:
        """Write an ordinary PEFT adapter for each member: `member-0/`, `member-1/`, ..."""
        if not is_main_process:
            return
        config = copy.deepcopy(self.peft_config[MEMBER.format(0)])
        config.inference_mode = True
        for member in range(self.members):
            folder = Path(save_directory, MEMBER.format(member))
            folder.mkdir(parents=True, exist_ok=True)
            state = {name: tensor.cpu().contiguous() for name, tensor in self.member_state(member).items()}
            save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
            config.save_pretrained(folder)

    def load_member(self, member: int, folder: str | Path) -> None:
        """
        Read the adapter in a folder into one member.

        Raises [`HeadError`] for a missing head tensor, and `ValueError` for other missing tensors and for tensors that
        are unknown or have the wrong shape.
        """
        path = Path(folder, _WEIGHTS)
        if not path.is_file():
            raise ValueError(f"{folder} holds no {_WEIGHTS}, so there is no adapter to load.")
        saved, own = load_file(path), self.member_state(member)
        missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
        if missing:
            kind = ValueError if ".lora_" in missing[0] else HeadError
            raise kind(
                f"{path} lacks `{missing[0]}` ({len(missing)} of {len(own)} tensors). Needed: an adapter of this "
                "model."
            )
        if unknown:
            raise ValueError(f"{path} holds `{unknown[0]}`, which this model lacks ({len(unknown)} such tensors).")
        for name, tensor in own.items():
            if saved[name].shape != tensor.shape:
                raise ValueError(
                    f"{path}: `{name}` has shape {tuple(saved[name].shape)}, needed {tuple(tensor.shape)}."
                )
            tensor.copy_(saved[name])

    def check_saved(self, member: int, folder: str | Path) -> None:
        """Raise [`HeadError`] with the tensor's name unless the folder holds every tensor of a member bit for bit."""
        saved = load_file(Path(folder, _WEIGHTS))
        for name, tensor in self.member_state(member).items():
            if name not in saved or not torch.equal(saved[name], tensor.cpu()):
                raise HeadError(f"{folder}: the saved tensor `{name}` is missing or differs from the one in memory.")

    def load_adapter(self, model_id: str, adapter_name: str, **kwargs: Any) -> None:
        """Read a folder into the member of that name, e.g. `"member-0"` (called by Trainer when it resumes)."""
        names = [MEMBER.format(member) for member in range(self.members)]
        if adapter_name not in names:
            raise ValueError(f"There is no member {adapter_name!r}. Known: {', '.join(names)}.")
        self.load_member(names.index(adapter_name), model_id)

    def set_adapter(self, adapter_name: str, **kwargs: Any) -> None:
        """All members are always in use."""

    # -------------------------------------------------------------------------------------------------- conversion
    def _stack(self, drawn: int) -> None:
        """Replace PEFT's layers by stacked ones. `drawn` adapters exist; if it is one, all members get a copy."""
        base = self.get_base_model()
        names = [MEMBER.format(member) for member in range(drawn)]
        repeats = self.members if drawn == 1 else 1

        def together(tensors: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack([tensor.detach() for tensor in tensors * repeats])

        for path, module in list(base.named_modules()):
            if isinstance(module, LoraLayer):
                layer = module.get_base_layer()
                if not isinstance(layer, (nn.Linear, Conv1D)):  # those of bitsandbytes are nn.Linear too
                    raise ValueError(
                        f"LoRA on `{path}`, a {type(layer).__name__}, cannot be stacked. Needed: linear layers in "
                        "`target_modules`."
                    )
                if module.lora_variant:
                    variant = type(next(iter(module.lora_variant.values()))).__name__
                    raise ValueError(
                        f"LoRA on `{path}` is the variant {variant}, which cannot be stacked. Needed: plain LoRA."
                    )
                stacked = StackedLoRA(
                    layer,
                    together([module.lora_A[name].weight for name in names]),
                    together([module.lora_B[name].weight for name in names]),
                    module.scaling[names[0]],
                    self.peft_config[names[0]].lora_dropout,
                    self.rows,
                )
                base.set_submodule(path, stacked.train(module.training))
            elif isinstance(module, ModulesToSaveWrapper):
                copies = [module.modules_to_save[name] for name in names]
                base.set_submodule(path, self._stacked_head(path, copies, together))

    def _stacked_head(self, path: str, copies: list[nn.Module], together: Callable) -> nn.Module:
        """A copy of a head module with a stacked layer in place of each linear layer."""
        head = copies[0]
        for name, module in list(head.named_modules()):
            if isinstance(module, nn.Linear):
                linear = [one.get_submodule(name) for one in copies]
                bias = None if module.bias is None else together([one.bias for one in linear])
                stacked = StackedLinear(together([one.weight for one in linear]), bias, self.rows)
                if not name:
                    return stacked
                head.set_submodule(name, stacked)
            elif any(True for _ in module.parameters(recurse=False)):
                raise ValueError(
                    f"The head module `{'.'.join(filter(None, [path, name]))}` is a {type(module).__name__}, and only "
                    "linear layers can be stacked. Train the members in separate runs of RewardTrainer."
                )
        return head


def member_scores(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, call: Callable | None = None
) -> torch.Tensor:
    """
    Score the same rows with all members in one pass: [`candidate_scores`](heads) for a stacked model.

    Returns:
        `torch.Tensor` of shape `(M, N)`, fp32.
    """
    return token_logits_at_last(model, input_ids, attention_mask, call)[:, 0].view(-1, len(input_ids))


def member_token_logits(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, call: Callable | None = None
) -> torch.Tensor:
    """The raw head output of all members at every token of right-padded rows: fp32 `(M, N, T, C)`."""
    _, raw = run_with_head_output(model, input_ids, attention_mask, call)
    return raw.float().view(-1, *input_ids.shape, raw.shape[-1])


def _brought_head(model: PreTrainedModel) -> bool:
    """Whether the checkpoint is a classification model. Then its head is kept; else a new one is drawn."""
    return any("Classification" in name for name in model.config.architectures or [])


@torch.no_grad()
def _draw_head(model: PreTrainedModel, head: list[str]) -> None:
    """Draw the head again, as transformers did when it loaded the model."""
    for name in head:
        module = model.get_submodule(name)
        if isinstance(module, ModulesToSaveWrapper):
            module = module.original_module
        for part in module.modules():
            model._init_weights(part)


@torch.no_grad()
def _check_members(model: StackedRewardModel) -> None:
    """
    Run three short rows for all members at once, and for the first and the last alone; they must agree.

    Raises `ValueError` if they do not. Such a family mixes rows, or keeps a state per row that hooks do not repeat.
    """
    base = model.get_base_model()
    device = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    empty = [m for m in model.modules() if isinstance(m, StackedLoRA) and not bool(m.lora_B.any())]
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (3, 9), generator=generator).to(device)
    mask = (torch.arange(9) < torch.tensor([[7], [4], [9]])).long().to(device)
    for layer in empty:  # so that members differ
        layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
    model.eval()
    try:
        together = member_token_scores(model, ids, mask)
        alone = {}
        for member in {0, model.members - 1}:
            model.use_rows(alone=member)
            alone[member] = member_token_scores(model, ids, mask)[0]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"{type(base).__name__} cannot run all members in one pass ({type(error).__name__}: {error}). Use "
            "separate runs of RewardTrainer."
        ) from error
    finally:
        model.use_rows()
        for layer in empty:
            layer.lora_B.zero_()
        for module in training:
            module.training = True
    exact = not is_quantized(base)  # int8 computes its scales from the whole batch
    exact &= next(base.get_submodule(base.base_model_prefix).parameters()).dtype == torch.float32
    for member, scores in alone.items():
        difference = (together[member] - scores).abs().max().item()
        allowed = (1e-4 if exact else 3e-2) * max(1.0, scores.abs().max().item())
        if not difference <= allowed:  # also when NaN
            raise ValueError(
                f"{type(base).__name__} gives member {member} other scores together with the other members than alone "
                f"(difference {difference:.2g}, allowed {allowed:.2g}), so its members cannot be trained or scored in "
                "one pass. Use separate runs of RewardTrainer."
            )


def member_token_scores(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The logits of all members at the last token of each row: (M, N, C)."""
    logits = token_logits_at_last(model, input_ids, attention_mask)
    return logits.view(-1, len(input_ids), logits.shape[-1])
