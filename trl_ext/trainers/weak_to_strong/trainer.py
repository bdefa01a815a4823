"""`WeakToStrongTrainer`: `trl.SFTTrainer` whose loss also keeps the student near a weak teacher's distribution.

It knows a student, a teacher and the loss of `trl_ext.losses.distillation`. TRL prepares the data and does the rest.
"""

import logging
from typing import Any

import torch
import trl
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_ext.losses.distillation import distillation, entropy_sum, scheduled_weight
from trl_ext.models.inputs import text_tokenizer, use_known_pad_token
from trl_ext.models.sidecar import vocab_size
from trl_ext.trainers.common.policy_training import PolicyTraining
from trl_ext.trainers.common.summary import base_name, run_facts
from trl_ext.trainers.weak_to_strong.config import WeakToStrongConfig


logger = logging.getLogger(__name__)

WITHOUT_EFFECT = {"logging_nan_inf_filter": "training stops at a loss that is NaN or infinite"}
"""Arguments of `trl.SFTConfig` that change nothing, and the reason."""

# Tensors of a batch that a forward pass gets, for padded and for packed rows.
FORWARD_INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)


class WeakToStrongTrainer(PolicyTraining, trl.SFTTrainer):
    r"""
    Supervised fine-tuning with a weak teacher: cross-entropy to the data plus lambda KL(weak || strong).

    See *Foundations of Large Language Models* by T. Xiao and J. Zhu, equation 10.13. The student imitates the
    completions in the data: outputs of the weak model, or labels. With outputs of the weak model, `kd_weight=0` gives
    equation 10.10.

    All arguments of `trl.SFTTrainer` keep their meaning. These are new:

    Args:
        teacher_model (`str` or `PreTrainedModel`):
            The weak model. It needs the student's vocabulary, because both distributions are over the same tokens. It
            is in eval mode, gets no gradient and is not saved. You may leave it out where `args.kd_weight` is 0.
        args ([`WeakToStrongConfig`], *optional*).

    Logged beside TRL's metrics: `ce_loss` and `kd_loss` (already weighted by lambda), both per trained token, and
    `kd_weight`.

    Raises:
        ValueError: if the teacher is missing or has another vocabulary, if the model is a mixture of experts with an
            auxiliary loss, which this trainer does not compute, or for an adapter that could not be loaded again.
        [`BaseMismatchError`]: if a student in memory differs from the files that its adapter needs.
        [`NotFiniteError`]: in training, if the loss is NaN or infinite.
    """

    _tag_names = ["trl", "sft", "weak-to-strong"]
    _name = "Weak-to-strong"
    _what = "A language model that learned from a weaker one."

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        teacher_model: str | PreTrainedModel | None = None,
        args: WeakToStrongConfig | None = None,
        **kwargs: Any,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = WeakToStrongConfig(f"{name.rstrip('/').split('/')[-1]}-WeakToStrong")
        elif not isinstance(args, WeakToStrongConfig):
            raise TypeError(f"args is a {type(args).__name__}. Needed: a WeakToStrongConfig.")
        if teacher_model is None and args.kd_weight > 0:
            raise ValueError("No teacher_model was given. Give one, or set kd_weight=0.")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("`compute_loss_func` would replace this trainer's loss. Leave it out, or use SFTTrainer.")
        self._refuse_images(kwargs.get("train_dataset"))
        model, args = self._accept(model, args, kwargs, reference=False, copied=False)
        if kwargs.get("processing_class") is not None:
            kwargs["processing_class"] = text_tokenizer(kwargs["processing_class"])
            use_known_pad_token(kwargs["processing_class"], _vocabulary(model, args))
        super().__init__(model=model, args=args, **kwargs)
        self._finish_set_up(WITHOUT_EFFECT)
        if self.aux_loss_enabled:
            raise ValueError(
                "The model adds a router loss, which this trainer does not compute. Load the model with "
                "output_router_logits=False."
            )
        self._teacher: PreTrainedModel | None = None
        if teacher_model is not None and args.kd_weight > 0:
            self._teacher_name = teacher_model if isinstance(teacher_model, str) else base_name(teacher_model)
            self._teacher = self._load_teacher(teacher_model)

    def _load_teacher(self, teacher: str | PreTrainedModel) -> PreTrainedModel:
        tokenizer = self.processing_class
        source = teacher if isinstance(teacher, str) else teacher.config._name_or_path
        given = {"trust_remote_code": self.args.trust_remote_code, **(self.args.teacher_model_init_kwargs or {})}
        if isinstance(teacher, str):
            teacher = AutoModelForCausalLM.from_pretrained(source, **given)
        try:
            teacher_tokenizer = AutoTokenizer.from_pretrained(
                source, revision=given.get("revision"), trust_remote_code=given["trust_remote_code"]
            )
        except (OSError, ValueError):
            logger.warning(
                f"No tokenizer was found at {source!r}, so the vocabularies were not compared. The teacher must have "
                "the student's vocabulary."
            )
        else:
            check_same_vocabulary(tokenizer, teacher_tokenizer, source)
        for role, model in (("student", self.accelerator.unwrap_model(self.model)), ("teacher", teacher)):
            size = model.config.get_text_config().vocab_size
            if size < len(tokenizer):
                raise ValueError(
                    f"The {role} scores {size} tokens and the tokenizer has {len(tokenizer)}. Both models need a "
                    "score for every token: use models of one family."
                )
        teacher.requires_grad_(False)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True).eval()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        given = {name: inputs[name] for name in FORWARD_INPUTS if name in inputs}
        outputs = model(**given, use_cache=False)
        labels = inputs["labels"][:, 1:]  # (B, T - 1)
        mask = labels != -100
        places = inputs["input_ids"].shape[1]  # prompt tuning puts virtual tokens before the row
        logits = outputs.logits[:, -places:-1][mask]  # (n, V)
        wanted = labels[mask]  # (n,)
        weight = self.args.kd_weight  # in evaluation too: else its loss would move with the schedule alone
        if model.training:
            weight = scheduled_weight(weight, self._progress(), self.args.kd_schedule)
        if self._teacher is None or weight == 0:
            teacher_logits, weight = logits.detach(), 0.0
        else:
            with torch.no_grad():
                teacher_logits = self._teacher(**given, use_cache=False).logits[:, :-1][mask]  # (n, V')
            # models of one family may pad their vocabularies to different sizes: compare the tokens that both have
            known = min(logits.shape[-1], teacher_logits.shape[-1])
            logits, teacher_logits = logits[:, :known], teacher_logits[:, :known]
        real = torch.ones_like(wanted, dtype=torch.bool)
        cross_entropy, divergence = distillation(logits, teacher_logits, wanted, real, weight)
        items = mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = (cross_entropy + divergence).sum() / items.to(logits.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        with torch.no_grad():
            self._observe(logits, wanted, cross_entropy, divergence, weight, inputs)
        return (loss, outputs) if return_outputs else loss

    # ------------------------------------------------------------------------------------------- telling and saving
    def _facts(self) -> dict[str, str]:
        loss = "cross-entropy to the data"
        if self._teacher is not None:
            loss += f" + {self.args.kd_weight:g} ({self.args.kd_schedule}) x KL(weak || strong)"
        return run_facts(self, loss, teacher="" if self._teacher is None else self._teacher_name)

    def _progress(self) -> float:
        """Share of training that is done."""
        return self.state.global_step / max(1, self.state.max_steps)

    def _observe(
        self,
        logits: torch.Tensor,
        wanted: torch.Tensor,
        cross_entropy: torch.Tensor,
        divergence: torch.Tensor,
        weight: float,
        inputs: dict[str, torch.Tensor],
    ) -> None:
        """Adds TRL's metrics of a batch, and the two parts of the loss."""
        mode = "train" if self.model.training else "eval"
        entropy = entropy_sum(logits)
        right = (logits.argmax(-1) == wanted).sum()
        if "attention_mask" in inputs:
            tokens = inputs["attention_mask"].sum()
        else:
            tokens = torch.tensor(inputs["input_ids"].numel(), device=logits.device)
        sums = torch.stack(
            [value.double() for value in (cross_entropy.sum(), divergence.sum(), entropy, right)]
            + [torch.tensor(float(len(wanted)), device=logits.device).double(), tokens.double()]
        )
        ce, kd, entropy, right, count, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        names = {"ce_loss": ce, "kd_loss": kd, "entropy": entropy, "mean_token_accuracy": right}
        for name, value in names.items():
            self._record_mean(mode, name, value, count)
        self._metrics[mode]["kd_weight"].append(weight)
        if mode == "train":
            self._total_train_tokens += int(tokens) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


def _vocabulary(model: str | nn.Module, args: WeakToStrongConfig) -> int:
    """Number of token ids that a model knows which is given by its path or in memory."""
    if not isinstance(model, str):
        return vocab_size(model)
    revision = (args.model_init_kwargs or {}).get("revision")
    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)
    return config.get_text_config().vocab_size


def check_same_vocabulary(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str = "the teacher"
) -> None:
    """Raise `ValueError` unless every token has the same id in both, except for tokens that TRL added."""
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    wrong = [token for token, index in theirs.items() if ours.get(token) != index]
    extra = [token for token in ours if token not in theirs and token not in tokenizer.get_added_vocab()]
    if wrong or extra:
        example = (wrong or extra)[0]
        raise ValueError(
            f"The vocabularies of student and teacher ({name}) differ, for example in {example!r} "
            f"({ours.get(example)} and {theirs.get(example)}): KL(weak || strong) compares the same tokens. Use "
            "models of one family, or train on the weak model's texts instead (kd_weight=0)."
        )
