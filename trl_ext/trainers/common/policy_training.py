"""What the trainers of language models share: which policy they accept, what they say and save, and a stop at NaN.

[`PolicyTraining`] knows models, adapters, tokenizers and arguments. It knows nothing of losses, rewards or rows.
"""

import copy
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from torch import nn
from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments
from transformers.trainer_utils import TrainOutput
from transformers.utils import find_adapter_config_file

from trl_ext.logs import follow_transformers
from trl_ext.models.adapters import check_policy_adapter
from trl_ext.models.bases import check_base_is_saved
from trl_ext.models.building import as_dtype
from trl_ext.models.inputs import freeze_date, use_known_pad_token
from trl_ext.models.loading import is_language_adapter, local_folder
from trl_ext.models.sidecar import vocab_size
from trl_ext.trainers.common.health import NotFiniteError
from trl_ext.trainers.common.inherited_arguments import warn_of_arguments_without_effect, without_full_evaluation
from trl_ext.trainers.common.loading import StreamResumeCallback
from trl_ext.trainers.common.model_card import metrics_section, name_in_card, run_length, write_card
from trl_ext.trainers.common.policy_card import policy_card
from trl_ext.trainers.common.setup import check_offloading
from trl_ext.trainers.common.summary import base_name, log_start
from trl_ext.trainers.common.tracking import open_run, use_safe_callback, without_missing_wandb


logger = logging.getLogger(__name__)


class PolicyTraining:
    """The first base class of every trainer of a language model: `class X(PolicyTraining, trl.SFTTrainer)`."""

    _what = "A language model."
    """First sentence of the model card."""
    _told_start = False

    dataset_name: str | list[str] | None = None
    """Hub id or file of the training data, for the model card."""

    # ------------------------------------------------------------------------------------------------------- set-up
    def _accept(
        self, model: Any, args: TrainingArguments, kwargs: dict[str, Any], reference: bool, copied: bool
    ) -> tuple[Any, TrainingArguments]:
        """
        Check model, adapter and tokenizer before TRL's `__init__`, and load the adapter that a path names.

        Args:
            model (`str`, `PreTrainedModel` or `PeftModel`): the policy, as the user gave it.
            args (`TrainingArguments`): not changed; the result is a copy.
            kwargs (`dict`): the trainer's other arguments. `processing_class` and `quantization_config` may change.
            reference (`bool`): whether the loss compares with a reference that the trainer makes itself. For a policy
                with a new adapter this is its base with the adapters off; of an adapter that is trained further it is
                a frozen copy.
            copied (`bool`): whether that reference is loaded again from the model's path if there is no adapter.

        Returns:
            `tuple`: the model and the arguments for TRL.

        Raises:
            ValueError: for an adapter that is not that of a language model, or that could not be loaded again.
            [`BaseMismatchError`]: a model in memory differs from the files that would be loaded again.
        """
        follow_transformers(args.get_process_log_level())
        check_offloading(args)
        args = copy.copy(args)
        without_missing_wandb(args)
        peft_config = kwargs.get("peft_config")
        if isinstance(peft_config, PeftConfig):
            check_policy_adapter(peft_config, initialised=False, reference=reference)
        if isinstance(model, (str, Path)):
            model = str(model)
            if _has_adapter(model):
                model = _load_adapter(model, args, kwargs)
                args.model_init_kwargs = None  # they have been used
        for config in getattr(model, "peft_config", {}).values():  # a PeftModel holds a config for each adapter
            check_policy_adapter(config, reference=reference)
        if isinstance(model, nn.Module) and (isinstance(model, PeftModel) or peft_config is not None):
            check_base_is_saved(model)
        elif isinstance(model, nn.Module) and reference and copied:
            check_base_is_saved(model, "The reference is loaded from that path again, and would be another model.")
        if kwargs.get("processing_class") is not None and isinstance(model, nn.Module):
            use_known_pad_token(_tokenizer_of(kwargs["processing_class"]), vocab_size(model))
        return model, args

    def _refuse_images(self, rows: Dataset | IterableDataset | None) -> None:
        if rows is not None and {"image", "images"} & set(rows.column_names or next(iter(rows))):
            raise ValueError(
                f"The rows have images, and {type(self).__name__} reads only text. Remove the image columns."
            )

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *args: Any, **kwargs: Any) -> Any:
        freeze_date(_tokenizer_of(processing_class))
        return super()._prepare_dataset(dataset, processing_class, *args, **kwargs)

    def _finish_set_up(self, without_effect: Mapping[str, str]) -> None:
        """The last step of a trainer's `__init__`: callbacks, and a warning for each argument without an effect."""
        self._sums: dict[str, tuple[float, float]] = {}  # of the metrics of an evaluation
        warn_of_arguments_without_effect(self.args, without_effect)
        without_full_evaluation(self.args)
        freeze_date(_tokenizer_of(self.processing_class))  # for trainers that tokenize while they train
        if isinstance(self.train_dataset, IterableDataset):
            self.add_callback(StreamResumeCallback())
        use_safe_callback(self)

    # ----------------------------------------------------------------------------------------------------- training
    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's training. The first call logs a summary of the run."""
        if not self._told_start:
            self._told_start = True
            log_start(self, self._facts())
        open_run(self)
        return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's step. Raises [`NotFiniteError`] for a loss that is NaN or infinite."""
        loss = super().training_step(*args, **kwargs)
        if not math.isfinite(loss.item()):
            raise NotFiniteError(
                f"The loss of step {self.state.global_step + 1} is NaN or infinite. Training stops before the weights "
                "are damaged. Usual causes: a learning rate that is too high, fp16 (use bf16), or broken base weights."
            )
        return loss

    def _record_mean(self, mode: str, name: str, total: float, count: float) -> None:
        """
        Add the rows or tokens of a batch to a metric: `total` is the sum of their `count` values.

        TRL logs the mean of what is recorded. In training that is one mean for each micro-batch. In evaluation it is
        the mean over all rows or tokens, which does not depend on the batch size.
        """
        if not count:
            return
        recorded = self._metrics[mode][name]
        if mode == "train":
            recorded.append(total / count)
            return
        earlier = self._sums[name] if recorded else (0.0, 0.0)  # TRL empties the list at the end of an evaluation
        self._sums[name] = earlier[0] + total, earlier[1] + count
        recorded[:] = [self._sums[name][0] / self._sums[name][1]]

    # -------------------------------------------------------------------------------------------- telling and saving
    def _facts(self) -> dict[str, str]:
        """What the run is, see `run_facts`. Every trainer has its own."""
        raise NotImplementedError

    def _metrics_section(self) -> list[str]:
        """The section of the model card on metrics."""
        return metrics_section(self, None, None)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model (or adapter), tokenizer and a model card."""
        super().save_model(output_dir, _internal_call)
        self._write_card(Path(output_dir or self.args.output_dir))

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **metadata: Any,
    ) -> None:
        """
        Write `README.md` into the output folder; every `save_model` writes one too.

        Arguments are those of TRL's trainers; of `metadata`, `license` and `language` are used.
        """
        self.dataset_name = dataset_name or self.dataset_name
        self._write_card(Path(self.args.output_dir), tags=tags, **metadata)

    def _write_card(self, folder: Path, **metadata: Any) -> None:
        if not self.args.should_save:
            return
        name, adapter = name_in_card(self, folder), isinstance(self.model, PeftModel)
        facts, base = self._facts() | run_length(self), base_name(self.model)
        data = self.dataset_name
        card = policy_card(self, facts, self._metrics_section(), name, base, adapter, self._what, data, **metadata)
        write_card(folder, card)


def _tokenizer_of(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def _has_adapter(path: str) -> bool:
    """Whether a folder or Hub repository holds an adapter."""
    if Path(path).is_dir():
        return Path(path, "adapter_config.json").is_file()
    try:
        validate_repo_id(path)
    except HFValidationError:  # a folder that does not exist; loading it says so
        return False
    return find_adapter_config_file(path) is not None


def _load_adapter(path: str, args: TrainingArguments, kwargs: dict[str, Any]) -> PeftModel:
    """The adapter of a language model on its base, ready to be trained further. TRL loads full models only."""
    init_kwargs = {"dtype": "float32", **(args.model_init_kwargs or {})}  # TRL's default
    folder = local_folder(path, init_kwargs.pop("revision", None))
    if not is_language_adapter(folder):
        raise ValueError(
            f"{path} holds the adapter of another kind of model, not that of a language model (task type CAUSAL_LM). "
            "Pass the policy as `model`; a reward model belongs in `reward_funcs`."
        )
    if kwargs.get("peft_config") is not None:
        raise ValueError(
            f"{path} is the adapter of a language model, and `peft_config` asks for another one. Leave `peft_config` "
            f"out to train the adapter further, or merge it first: `AutoPeftModelForCausalLM.from_pretrained({path!r})"
            ".merge_and_unload().save_pretrained(folder)`, save the tokenizer there too, and pass the folder."
        )
    quantization = kwargs.pop("quantization_config", None)
    if quantization is not None:
        init_kwargs["quantization_config"] = quantization
    init_kwargs["dtype"] = as_dtype(init_kwargs["dtype"])
    init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    init_kwargs.setdefault("device_map", {"": PartialState().device})
    if kwargs.get("processing_class") is None and Path(folder, "tokenizer_config.json").is_file():
        kwargs["processing_class"] = AutoProcessor.from_pretrained(
            folder, truncation_side="left", padding_side="left", trust_remote_code=args.trust_remote_code
        )
    given = {name: value for name, value in init_kwargs.items() if value is not None}
    return AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True, **given)
