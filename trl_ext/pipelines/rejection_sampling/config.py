"""Arguments of [`RejectionSamplingTrainer`]: TRL's for supervised fine-tuning, GRPO's for sampling, and the rounds."""

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any, Literal

import trl

from trl_ext.pipelines.generation.sampling import GRPOSamplingFields
from trl_ext.pipelines.rejection_sampling.selection import selectors
from trl_ext.pipelines.stages.training_arguments import arguments_key
from trl_ext.pipelines.user_functions import callable_name
from trl_ext.trainers.common.inherited_arguments import WITHOUT_METRICS_FUNCTION


logger = logging.getLogger(__name__)

# Fields of both configs that mean different things in each.
_NOT_SHARED = {"loss_type", "shuffle_dataset", "remove_unused_columns", "pad_to_multiple_of"}
# GRPO derives these from other fields.
_DERIVED = {"generation_batch_size", "steps_per_generation"}

# Arguments that a finished round does not depend on, in addition to those of every training.
_SERVER = "It says where the vLLM server is and how long to wait for it."
_DRAWS = "It changes which completions a round draws that has selected nothing yet; they have a separate key."
ROUND_IRRELEVANT = {
    "num_rounds": "A rerun may add rounds to those that are done.",
    "use_vllm": _DRAWS,
    "generation_batch_size": _DRAWS,
    "vllm_server_base_url": _SERVER,
    "vllm_server_host": _SERVER,
    "vllm_server_port": _SERVER,
    "vllm_server_timeout": _SERVER,
}


WITHOUT_EFFECT = {
    **dict.fromkeys(
        ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_packing", "per_device_eval_batch_size"),
        "each round is evaluated once, by samples for `eval_dataset`",
    ),
    **dict.fromkeys(
        ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        "the round with the highest `eval_reward` (or verifier) is kept",
    ),
    **dict.fromkeys(("prediction_loss_only", "eval_accumulation_steps"), "each round is evaluated by samples"),
    **WITHOUT_METRICS_FUNCTION,
}
"""Arguments of `trl.SFTConfig` that change nothing in rounds, and the reason."""


@dataclass
class RejectionSamplingConfig(trl.SFTConfig, GRPOSamplingFields):
    r"""
    Configuration of [`RejectionSamplingTrainer`]. All arguments of `trl.SFTConfig` keep their meaning and defaults;
    they apply to the fine-tuning of each round. Sampling uses `chat_template_path` too, which must be a `.jinja` or
    `.j2` file. The sampling arguments have GRPO's names, meaning and defaults.

    Args:
        num_rounds (`int`, *optional*, defaults to `1`):
            How often to generate, score, select and fine-tune.
        selection (`str`, *optional*, defaults to `"top_per_prompt"`):
            Which samples to fine-tune on: `"top_per_prompt"`, `"top_k_overall"`, `"threshold"`, `"random_per_prompt"`,
            `"random_k_overall"`, `"rso"`, `"budget_by_difficulty"` or the name of an installed plugin. In Python also
            a function.
        selection_kwargs (`dict`, *optional*):
            Options of the selector, e.g. `{"n": 2}`.
        start_from (`"current"` or `"initial"`, *optional*, defaults to `"current"`):
            Which weights the fine-tuning of a round starts from: those of the previous round (as in RAFT), or the
            first ones (as in ReST-EM). The policy of the previous round always generates the samples.
        accumulate_rounds (`bool`, *optional*, defaults to `False`):
            Also fine-tune on the samples that earlier rounds selected; exact duplicates are used once.
        num_generations (`int`, *optional*, defaults to `8`):
            Completions of each prompt.
        num_generations_eval (`int`, *optional*):
            Completions of each prompt in evaluation. `num_generations` by default.
        max_completion_length (`int`, *optional*, defaults to `512`):
            Longest completion in tokens.
        temperature, top_p, top_k, min_p, repetition_penalty, generation_kwargs, chat_template_kwargs:
            As in `GRPOConfig`.
        reward_weights (`list[float]`, *optional*):
            A weight for each reward function. All 1 by default.
        mask_truncated_completions (`bool`, *optional*, defaults to `False`):
            Never fine-tune on completions that were cut at `max_completion_length`, or that SFT would cut at
            `max_length` (prompt and completion together). If this is off and some are selected, a warning says how
            many: SFT appends an EOS to the first, so the policy learns to stop there, and the second have none.
        generation_batch_size (`int`, *optional*, defaults to `32`):
            Completions that a device generates at a time.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Generate on a vLLM server (`vllm serve MODEL`) with the model that training starts from. With LoRA the
            server loads the adapter of each round, if it was started with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`,
            `--enable-lora` and a sufficient `--max-lora-rank`. Full weights allow one round only, because the server
            keeps its weights. Evaluation generates in this process.
        vllm_server_base_url, vllm_server_host, vllm_server_port, vllm_server_timeout:
            As in `GRPOConfig`.
    """

    _VALID_DICT_FIELDS = trl.SFTConfig._VALID_DICT_FIELDS + [
        "selection_kwargs",
        "generation_kwargs",
        "chat_template_kwargs",
    ]

    num_rounds: int = field(default=1, metadata={"help": "How often to generate, score, select and fine-tune."})
    selection: str = field(
        default="top_per_prompt",
        metadata={"help": "Which samples to fine-tune on; a name that `trl-ext plugins` lists as a selector."},
    )
    selection_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the selector as JSON, e.g. '{\"n\": 2}'."}
    )
    start_from: Literal["current", "initial"] = field(
        default="current",
        metadata={"help": "Weights that a round's fine-tuning starts from: 'current' (previous round) or 'initial'."},
    )
    accumulate_rounds: bool = field(
        default=False, metadata={"help": "Also fine-tune on the samples that earlier rounds selected."}
    )
    num_generations: int = field(default=8, metadata={"help": "Completions of each prompt."})
    num_generations_eval: int | None = field(
        default=None, metadata={"help": "Completions of each prompt in evaluation; num_generations by default."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "A weight for each reward function; all 1 by default."}
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Never fine-tune on completions that were cut at max_completion_length."}
    )
    generation_batch_size: int = field(default=32, metadata={"help": "Completions that a device generates at a time."})
    use_vllm: bool = field(default=False, metadata={"help": "Generate on a vLLM server; several rounds with LoRA."})
    vllm_server_base_url: str | None = field(default=None, metadata={"help": "The server, e.g. http://host:8000."})
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "The server's host, if no base URL is given."})
    vllm_server_port: int = field(default=8000, metadata={"help": "The server's port, if no base URL is given."})
    vllm_server_timeout: float = field(default=240.0, metadata={"help": "Seconds to wait for the server."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_rounds", "num_generations", "max_completion_length", "generation_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; needed: 1 or more.")
        if self.num_generations_eval is not None and self.num_generations_eval < 1:
            raise ValueError(f"num_generations_eval={self.num_generations_eval}; needed: 1 or more, or None.")
        if self.start_from not in ("current", "initial"):
            raise ValueError(f"start_from={self.start_from!r}; needed: 'current' or 'initial'.")
        if self.fsdp or self.deepspeed:
            raise ValueError(
                "FSDP and DeepSpeed shard the weights, and generation in this process needs whole weights. Use DDP, "
                "or call rejection_sample(...) and trl.SFTTrainer one after the other."
            )
        if self.push_to_hub:
            raise ValueError("push_to_hub cannot be used in rounds. Upload output_dir with `hf upload` afterwards.")
        selectors.get(self.selection)

    def to_dict(self) -> dict[str, Any]:
        name = self.selection if isinstance(self.selection, str) else callable_name(self.selection)
        return {**super().to_dict(), "selection": name}

    def settings_of_a_round(self) -> dict[str, Any]:
        """The arguments that change the result of a round, as JSON values."""
        return arguments_key(self, irrelevant=ROUND_IRRELEVANT)

    @classmethod
    def from_grpo(cls, args: trl.GRPOConfig) -> "RejectionSamplingConfig":
        """
        Convert a `trl.GRPOConfig`, for scripts that replace only the trainer.

        A field with GRPO's default value gets our default (a learning rate of 1e-6 is too small for fine-tuning).
        `max_length` is `None`, because GRPO cuts no row. If fields were set that have no meaning here, such as `beta`,
        a warning names them.
        """
        ours = {item.name for item in dataclasses.fields(cls) if item.init} - _NOT_SHARED - _DERIVED
        defaults = type(args)(output_dir=args.output_dir, use_cpu=args.use_cpu, bf16=args.bf16)
        values, ignored = {}, []
        for item in dataclasses.fields(args):
            value = getattr(args, item.name)
            if not item.init or item.name == "output_dir" or value == getattr(defaults, item.name):
                continue
            if item.name in ours:
                values[item.name] = value
            elif item.name not in _DERIVED:
                ignored.append(item.name)
        if ignored:
            logger.warning(f"These arguments of {type(args).__name__} have no meaning here: {', '.join(ignored)}.")
        same = {name: getattr(args, name) for name in ("use_cpu", "bf16")}
        return cls(output_dir=args.output_dir, max_length=None, **{**same, **values})
