"""`RankedDPOTrainer`: DPO on rankings of any number of completions, with any of our ranking losses.

TRL's trainer makes the models, the reference, its precomputed log-probabilities, and everything around the loss. This
trainer prepares groups in place of pairs, and computes a ranking loss of the implicit rewards.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOTrainer

from trl_ext.data.formats import prepare_groups
from trl_ext.data.report import DataReport
from trl_ext.data.token_batches import group_sizes
from trl_ext.data.tokenization import TokenizationSettings
from trl_ext.metrics.ranking import pair_accuracy
from trl_ext.models.building import keep_4bit_exact_on_cpu
from trl_ext.models.heads import unwrap
from trl_ext.models.inputs import InputLimits, freeze_date, text_tokenizer
from trl_ext.models.shared_prefix import ATTENTION_NAME, current_attention, select_attention, use_shared_prefix
from trl_ext.trainers.common.checkpoint import picklable_loss
from trl_ext.trainers.common.health import check_finite
from trl_ext.trainers.common.loading import BY_LENGTH, StreamSurvivalCallback, note_on_rows, with_lengths
from trl_ext.trainers.common.policy_training import PolicyTraining
from trl_ext.trainers.common.summary import base_name, run_facts
from trl_ext.trainers.policy.ranked_dpo_config import WITHOUT_EFFECT, RankedDPOConfig
from trl_ext.trainers.policy.ranked_dpo_data import (
    COLUMNS,
    IGNORED,
    RankedDPOCollator,
    rows_with_prompts,
    schema_of,
    with_completion_starts,
)
from trl_ext.trainers.ranking.objective import RankingObjective
from trl_ext.trainers.ranking.recording import signed_ratings
from trl_ext.trainers.weak_to_strong.confidence import follow_confidence


class RankedDPOTrainer(PolicyTraining, DPOTrainer):
    r"""
    DPO on rankings: a ranking loss of the implicit rewards of K completions of a prompt.

    $$
    r_k = \beta \left(\log \pi(y_k | x) - \log \pi_{ref}(y_k | x)\right), \qquad L = \text{loss}(r_1 \dots r_K)
    $$

    With `"plackett_luce"` it is the loss of *Direct Preference Optimization* by R. Rafailov et al., appendix A.3
    (https://huggingface.co/papers/2305.18290); with `"bradley_terry"` on pairs it equals TRL's `"sigmoid"` loss. With
    `"listnet"` and `"lambda_loss"` it is listwise preference optimization (https://huggingface.co/papers/2402.01878).

    Args:
        model, ref_model, args, processing_class, callbacks, optimizers, quantization_config,
        peft_config: as in `trl.DPOTrainer`; `args` is a [`RankedDPOConfig`]. `model` may also be the folder of an
            adapter, e.g. of SFT, which is trained further.
        train_dataset, eval_dataset (`Dataset` or `IterableDataset`):
            Ranked rows (`prompt`, `completions`, and `ratings` or `ranks`) or preference rows (`prompt`, `chosen`,
            `rejected`, and optionally `margin` or `preference_probability`), as text or chats. The number of
            completions may differ from row to row, and ratings may be tied.
        **kwargs: as in `trl.DPOTrainer`. `data_collator` and `compute_metrics` raise an error.

    Raises:
        TypeError: if `args` is not a [`RankedDPOConfig`].
        ValueError: for arguments that contradict each other, for rows with images, and for an adapter that could not
            be loaded again as it was trained.
        [`BaseMismatchError`]: if a policy in memory differs from the files that its adapter or reference needs.
        [`DataError`]: if a row is malformed. The message names the row, the column and the fix.
        [`NotFiniteError`]: in training, if an implicit reward or a loss is NaN or infinite.

    Example:

    ```python
    trainer = RankedDPOTrainer(
        "Qwen/Qwen2.5-0.5B-Instruct",
        args=RankedDPOConfig(output_dir="outputs/ranked_dpo", loss_type="plackett_luce", beta=0.1),
        train_dataset=dataset,  # prompt, completions, ratings
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "trl_ext", "ranked-dpo"]
    _name = "Ranked DPO"
    _what = "A language model that was trained on rankings of completions."

    def __init__(self, model: Any, ref_model: PreTrainedModel | None = None, args: Any = None, **kwargs: Any):
        args = RankedDPOConfig("ranked-dpo") if args is None else args
        if not isinstance(args, RankedDPOConfig):
            raise TypeError(
                f"args is a {type(args).__name__}; needed: a RankedDPOConfig, which has the fields of DPOConfig."
            )
        if kwargs.get("data_collator") is not None:
            raise ValueError("`data_collator` is given, but groups need the trainer's own collator. Leave it out.")
        if kwargs.get("compute_metrics") is not None:
            raise ValueError("`compute_metrics` needs logits, which RankedDPOTrainer does not make. Leave it out.")
        model, args = self._accept(
            model, args, kwargs, reference=ref_model is None, copied=not args.precompute_ref_log_probs
        )
        self._objective = RankingObjective(args.loss_type, args.loss_kwargs)
        self._limits = _limits_of(model, args)
        self._given_reference = ref_model is not None
        self._reports: list[DataReport] = []
        self._most = 0  # candidates of the largest group
        self._collator = RankedDPOCollator(pad_token_id=0, pad_to_multiple_of=args.pad_to_multiple_of)
        self._flat_rows_decided = False
        self._refuse_images(kwargs.get("train_dataset"))
        loss_type, args.loss_type = args.loss_type, ["sigmoid"]  # TRL counts its own losses, and does not call them
        try:
            super().__init__(model, ref_model, args, data_collator=self._collator, **kwargs)
        finally:
            args.loss_type = loss_type
        self._finish_set_up(WITHOUT_EFFECT)
        if isinstance(self.train_dataset, IterableDataset):
            self.add_callback(StreamSurvivalCallback(self._reports, self.args.min_survival))
        follow_confidence(self)
        pad = text_tokenizer(self.processing_class).pad_token_id
        self.model.config.get_text_config().pad_token_id = self.model.generation_config.pad_token_id = pad
        keep_4bit_exact_on_cpu(self.model)

    # -------------------------------------------------------------------------------------------------------- data
    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: RankedDPOConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        if "completion_start" in (dataset.column_names or next(iter(dataset))):
            return dataset
        tokenizer = text_tokenizer(processing_class)
        freeze_date(tokenizer)
        if args.pad_token is not None:
            if args.pad_token not in tokenizer.get_vocab():
                raise ValueError(f"pad_token={args.pad_token!r} is not in the vocabulary of the tokenizer.")
            tokenizer.pad_token = args.pad_token
        self._collator.pad_token_id = tokenizer.pad_token_id
        tokenization = TokenizationSettings.for_training(tokenizer)
        state = PartialState()
        with state.main_process_first(), state.local_main_process_first():
            dataset = rows_with_prompts(dataset, dataset_name)
            schema = schema_of(dataset, dataset_name, self._objective.needs_ratings)
            prepared, report = prepare_groups(
                dataset,
                tokenizer,
                tokenization=tokenization,
                max_length=args.max_length,
                dataset_name=dataset_name,
                num_proc=args.dataset_num_proc,
                min_survival=args.min_survival,
                loss_needs_ratings=self._objective.needs_ratings,
                use_pair_ratings=self._objective.uses_pair_ratings,
                vocab_size=self._limits.vocab_size,
                max_positions=self._limits.max_positions,
            )
            self._objective.check_data(prepared, dataset_name)
            prepared = with_completion_starts(prepared, schema, tokenizer, tokenization, args.dataset_num_proc)
        self._reports.append(report)
        if isinstance(prepared, Dataset):
            self._most = max(self._most, *map(len, prepared["candidate_ratings"]))
            if args.train_sampling_strategy in BY_LENGTH:
                prepared = with_lengths(prepared, args.length_column_name, group_sizes(prepared, shared_prefix=False))
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [*COLUMNS, self.args.length_column_name]

    # -------------------------------------------------------------------------------------------------- flat rows
    def _decide_flat_rows(self, model: nn.Module) -> None:
        """Decide once, before the first batch, whether batches may be flat rows."""
        if not self._flat_rows_decided:
            wish, head = self.args.shared_prefix, unwrap(model).get_output_embeddings()
            self._collator.shared_prefix = use_shared_prefix(model, wish, self.args.max_length, head)
            self._flat_rows_decided = True

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        self._decide_flat_rows(self.ref_model or self.model)
        return self._with_own_attention(super()._precompute_ref_logps, dataset, name, batch_size)

    def get_train_dataloader(self) -> Any:
        self._decide_flat_rows(self.model)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        self._decide_flat_rows(self.model)
        return super().get_eval_dataloader(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's step. Afterwards the model has its own attention again, so that it can generate."""
        return self._with_own_attention(super().training_step, *args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's step, with the model's own attention afterwards."""
        return self._with_own_attention(super().prediction_step, *args, **kwargs)

    def _with_own_attention(self, call: Callable, *args: Any, **kwargs: Any) -> Any:
        models = [model for model in (self.model, self.ref_model) if model is not None]
        own = [current_attention(model) for model in models]
        try:
            return call(*args, **kwargs)
        finally:
            for model, name in zip(models, own, strict=True):
                select_attention(model, name)

    # -------------------------------------------------------------------------------------------------------- loss
    def _log_probabilities(self, model: nn.Module, inputs: dict[str, Any], **options: Any) -> tuple[Any, torch.Tensor]:
        """TRL's outputs for every token of the batch, and the log-probability of each candidate, (N,)."""
        labels, owner = inputs["labels"], inputs["owner"][:, 1:]
        layout = inputs.get("prefix_layout")
        if layout is None:
            where = {"attention_mask": inputs["attention_mask"]}
            if current_attention(model) == ATTENTION_NAME:
                select_attention(model, self._padded_attention)
        else:
            layout = layout.to(labels.device)
            where = {"position_ids": layout.position_ids, "prefix_layout": layout}
            if current_attention(model) != ATTENTION_NAME:
                self._padded_attention = current_attention(model)
            select_attention(model, ATTENTION_NAME)
        outputs = model(
            input_ids=inputs["input_ids"], labels=labels, use_cache=False, fused_lm_head=True, **where, **options
        )
        log_probs = outputs.log_probs[:, -owner.shape[1] :]  # prompt tuning puts virtual tokens before the row
        count = int(inputs["group_mask"].sum())
        return outputs, log_probs.new_zeros(count).index_add(0, owner.flatten(), log_probs.flatten())

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The reference's log-probability of each candidate, (B, K), and zeros (B,).

        TRL expects those of the chosen and the rejected completions. It switches to the reference here (adapters off,
        or an adapter `ref`) and keeps both results when they are precomputed.
        """

        def run(**_: Any) -> SimpleNamespace:
            return SimpleNamespace(log_probs=self._log_probabilities(model, inputs)[1][:, None])  # (N, 1)

        one = inputs["input_ids"].new_zeros(1, 2)
        halves = super().compute_ref_log_probs(run, {"input_ids": one, "completion_mask": one})
        found = _by_group(torch.cat(halves), inputs["group_mask"])
        wide = found.new_zeros(len(found), max(self._most, found.shape[1]))
        wide[:, : found.shape[1]] = found
        return wide, found.new_zeros(len(found))

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if return_outputs:
            raise ValueError("RankedDPOTrainer makes no logits. Call `evaluate`, or set prediction_loss_only=True.")
        mask = inputs["group_mask"]
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs, flat_logps = self._log_probabilities(model, inputs, **router)
        logps = _by_group(flat_logps, mask)  # (B, K)
        reference = inputs.get("ref_logps")
        if reference is None:
            reference, _ = self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, inputs)
        reference = reference[:, : mask.shape[1]].to(logps.dtype)
        rewards = (self.beta * (logps - reference)).masked_fill(~mask, 0.0)  # (B, K)
        losses = self._objective(rewards, inputs)  # (B,)
        note = note_on_rows(self.train_dataset, self.args) if self.model.training else ""
        check_finite(rewards.detach(), losses.detach(), inputs["row_index"], note)
        loss = losses.mean()
        tokens = _Tokens(inputs, outputs)
        if self.args.sft_coefficient:
            loss = loss + self.args.sft_coefficient * tokens.likelihood_of_best()
        mode = "train" if self.model.training else "eval"
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            self._add(mode, aux_loss=_rows(outputs.aux_loss.detach()))
        with torch.no_grad():
            self._record(mode, rewards, logps, inputs, tokens)
        return loss

    # --------------------------------------------------------------------------------------------- telling and saving
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy (or adapter), the tokenizer and a model card."""
        with picklable_loss(self.args, self._objective.name):
            super().save_model(output_dir, _internal_call)

    def _facts(self) -> dict[str, str]:
        self._decide_flat_rows(self.model)
        own = "a copy of the policy"
        if isinstance(self.model, PeftModel):  # TRL copies an adapter that was there before training
            copied = "ref" in self.model.peft_config
            own = "a frozen copy of the adapter" if copied else "the base with its adapters off"
        reference = own if self.ref_model is None or not self._given_reference else base_name(self.ref_model)
        loss = f"{self._objective.name} of the implicit rewards, beta {self.beta:g}"
        if self.args.sft_coefficient:
            loss += f" + {self.args.sft_coefficient:g} x cross-entropy to the best completion"
        flat = "on" if self._collator.shared_prefix else "off"
        return run_facts(self, loss, reports=self._reports, reference=reference, shared_prefix=flat)

    # ----------------------------------------------------------------------------------------------------- metrics
    def _add(self, mode: str, **values: torch.Tensor) -> None:
        """Record metrics over all processes, each from the sum and the number (2,) of its values in a batch."""
        sums = self.accelerator.reduce(torch.stack(list(values.values())), reduction="sum")  # (metrics, 2)
        for name, (total, count) in zip(values, sums.tolist(), strict=True):
            self._record_mean(mode, name.replace("__", "/"), total, count)

    def _record(
        self,
        mode: str,
        rewards: torch.Tensor,
        logps: torch.Tensor,
        inputs: dict[str, Any],
        tokens: "_Tokens",
    ) -> None:
        mask, ratings = inputs["group_mask"], signed_ratings(inputs)
        best, worst = _ends(ratings, mask)
        chosen, rejected = (rewards.gather(1, place)[:, 0] for place in (best, worst))
        self._add(
            mode,
            rewards__chosen=_rows(chosen),
            rewards__rejected=_rows(rejected),
            rewards__margins=_rows(chosen - rejected),
            rewards__accuracies=_rows(pair_accuracy(rewards, ratings, mask)),
            logps__chosen=_rows(logps.gather(1, best)),
            logps__rejected=_rows(logps.gather(1, worst)),
            entropy=tokens.sum("entropy", tokens.scored),
            mean_token_accuracy=tokens.sum("is_top1", tokens.of(best)),
            logits__chosen=tokens.sum("mean_logits", tokens.of(best)),
            logits__rejected=tokens.sum("mean_logits", tokens.of(worst)),
        )
        if mode == "train":
            layout = inputs.get("prefix_layout")
            count = inputs["attention_mask"].sum() if layout is None else torch.tensor(layout.sequence_tokens)
            count = self.accelerator.reduce(count.to(rewards.device), reduction="sum").item()
            self._total_train_tokens += int(count) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's metrics, and once the counts of the data's used and dropped rows."""
        if self.model.training:
            logs.update({name: count for report in self._reports for name, count in report.news().items()})
        super().log(logs, start_time)


class _Tokens:
    """The outputs of the scored tokens of a batch, by candidate."""

    def __init__(self, inputs: dict[str, Any], outputs: Any):
        self._outputs, self._mask = outputs, inputs["group_mask"]
        self._owner = inputs["owner"][:, 1:]  # (N, T - 1) or (1, L - 1), as TRL's outputs
        self.scored = inputs["labels"][:, 1:] != IGNORED
        self._best, _ = _ends(signed_ratings(inputs), self._mask)

    def of(self, place: torch.Tensor) -> torch.Tensor:
        """Which tokens belong to the candidate at `place` (B, 1) of its group."""
        sizes = self._mask.sum(1)
        numbers = (sizes.cumsum(0) - sizes)[:, None] + place  # (B, 1): among all candidates
        return self.scored & torch.isin(self._owner, numbers)

    def sum(self, name: str, where: torch.Tensor) -> torch.Tensor:
        """The sum of one of TRL's outputs over some tokens, and their number, (2,)."""
        values = getattr(self._outputs, name)[:, -where.shape[1] :].double()
        return torch.stack([(values * where).sum(), where.sum().double()])

    def likelihood_of_best(self) -> torch.Tensor:
        """Negative log-likelihood per token of the best candidates."""
        where = self.of(self._best)
        return -(self._outputs.log_probs[:, -where.shape[1] :] * where).sum() / where.sum().clamp(min=1)


def _ends(ratings: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The places (B, 1) of the best and of the worst candidate; the first and the last one of a tie."""
    best = ratings.masked_fill(~mask, -torch.inf).argmax(1, keepdim=True)
    lowest = ratings.masked_fill(~mask, torch.inf).flip(1).argmin(1, keepdim=True)
    return best, ratings.shape[1] - 1 - lowest


def _rows(values: torch.Tensor) -> torch.Tensor:
    """The sum of the values of a batch that are not NaN, and their number, (2,)."""
    known = ~values.isnan()
    return torch.stack([values.double()[known].sum(), known.sum().double()])


def _by_group(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values (N,) of all candidates as (B, K), 0 where there is none."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _limits_of(model: Any, args: RankedDPOConfig) -> InputLimits:
    """Which rows the policy takes. A path's model is only built without weights; TRL loads it."""
    if isinstance(model, str):
        kwargs = dict(args.model_init_kwargs or {})
        config = AutoConfig.from_pretrained(
            model, revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
    return InputLimits.of(model)
