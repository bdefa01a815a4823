"""The files that our trainers add to a checkpoint: `reward_model.json`, and for ensembles `reward_ensemble.json`.

It checks that the saved weights contain the head. It knows trainers and sidecars. It knows nothing of losses, data or
how a model was built.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import trl
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_ext.data.tokenization import TokenizationSettings
from trl_ext.models.bases import describe_base
from trl_ext.models.ensemble.ensemble_files import ENSEMBLE_NAME, EnsembleFile, write_ensemble
from trl_ext.models.ensemble.stacked_model import MEMBER
from trl_ext.models.loading import save_sidecar
from trl_ext.models.sidecar import SIDECAR_NAME, Sidecar, make_probes, probe_scores, set_sidecar
from trl_ext.trainers.common.model_card import CARD_NAME, write_card


logger = logging.getLogger(__name__)

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@contextmanager
def picklable_loss(args: trl.RewardConfig, name: str) -> Iterator[None]:
    """Replace `args.loss_type` by its name while the arguments are pickled: not every callable can be pickled."""
    loss_type = args.loss_type
    args.loss_type = name
    try:
        yield
    finally:
        args.loss_type = loss_type


class SidecarWriter:
    """
    Describes a trainer's model with a [`Sidecar`]: in memory from the start, and as `reward_model.json` when it saves.

    Args:
        trainer (`Trainer`): the trainer. Its model and tokenizer must be set up.
        head (`list[str]`): names of the head's modules.
        tokenization ([`TokenizationSettings`]): how plain text becomes token ids.
        **described: fields of [`Sidecar`] that do not change while the model trains.
    """

    def __init__(self, trainer: Trainer, head: list[str], tokenization: TokenizationSettings, **described: Any):
        self._head = head
        self._tokenization = tokenization
        self._described = described
        self._warned_of_pad = False
        set_sidecar(trainer.model, self._describe(trainer, probes=None))  # replaces the sidecar that it came with

    def write(self, trainer: Trainer, folder: str | Path) -> None:
        """Write the file on the process that saves. Raises [`HeadError`] if a head tensor is not in the folder."""
        if not trainer.args.should_save:
            return
        if not isinstance(trainer.model, PeftModel):
            _set_aside_stale_adapter(folder)
        probes = None
        if not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:  # one process cannot run a sharded model
            ids = make_probes(trainer.model)
            probes = {"input_ids": ids, "scores": probe_scores(trainer.model, ids)}
        sidecar = self._describe(trainer, probes)
        self._warn_of_pad(sidecar)
        save_sidecar(trainer.model, sidecar, folder)

    def _warn_of_pad(self, sidecar: Sidecar) -> None:
        if sidecar.pad_is_eos and not self._warned_of_pad:
            self._warned_of_pad = True
            logger.warning(
                "The pad token is EOS. trl_ext scores this model correctly, but plain transformers finds the last "
                "token by comparing with the pad id and ignores a final EOS, so its scores can differ. "
                f"({SIDECAR_NAME} records this in pad_is_eos.)"
            )

    def _describe(self, trainer: Trainer, probes: dict[str, list] | None) -> Sidecar:
        model, tokenizer = trainer.model, trainer.processing_class
        return Sidecar(
            base=describe_base(model),
            is_adapter=isinstance(model, PeftModel),
            head_modules=self._head,
            token_policy=self._tokenization.to_dict(),
            max_length=trainer.args.max_length,
            pad_is_eos=tokenizer.pad_token_id == tokenizer.eos_token_id,
            probes=probes,
            **self._described,
        )


def _set_aside_stale_adapter(folder: str | Path) -> None:
    """Rename an adapter that an earlier run left in the folder: a loader would take it instead of the full model."""
    stale = [path for name in ADAPTER_FILES if (path := Path(folder, name)).is_file()]
    for path in stale:
        path.replace(path.with_name(f"{path.name}.earlier"))
    if stale:
        names = " and ".join(path.name for path in stale)
        logger.warning(
            f"{folder} has the adapter of an earlier run, which loaders would take instead of the full model. {names} "
            "now end in '.earlier'."
        )


class PushCallback(TrainerCallback):
    """
    Copies our files of a checkpoint to the output folder before a push.

    Before it pushes, Trainer copies the weights of a checkpoint to the output folder, but no files that it does not
    know. Without `reward_model.json` the copy on the Hub would be scored without its tokenization settings.
    """

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        checkpoint = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if not args.should_save:
            return
        for pattern in (SIDECAR_NAME, ENSEMBLE_NAME, f"{MEMBER.format('*')}/*"):
            for file in checkpoint.glob(pattern):
                target = Path(args.output_dir, file.relative_to(checkpoint))
                target.parent.mkdir(exist_ok=True)
                shutil.copy(file, target)
        if (checkpoint / CARD_NAME).is_file():
            write_card(args.output_dir, (checkpoint / CARD_NAME).read_text(encoding="utf-8"))


class EnsembleWriter(SidecarWriter):
    """
    [`SidecarWriter`] for a [`StackedRewardModel`].

    Each member's folder gets a tokenizer and a `reward_model.json`. The folder of the ensemble gets
    `reward_ensemble.json`.
    """

    def write(self, trainer: Trainer, folder: str | Path) -> None:
        if not trainer.args.should_save:
            return
        model = trainer.model
        model.use_rows()
        ids = make_probes(model)
        scores = torch.tensor(probe_scores(model, ids)).view(len(ids), model.members, -1)  # (probes, M, C)
        names = [MEMBER.format(member) for member in range(model.members)]
        for member, name in enumerate(names):
            model.check_saved(member, Path(folder, name))
            trainer.processing_class.save_pretrained(Path(folder, name))
            probes = {"input_ids": ids, "scores": scores[:, member].flatten().tolist()}
            sidecar = self._describe(trainer, probes)
            sidecar.save(Path(folder, name))
        self._warn_of_pad(sidecar)
        write_ensemble(folder, EnsembleFile(members=names, branch_layer=model.branch_layer))
