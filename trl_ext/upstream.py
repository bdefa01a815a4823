"""The one list of private TRL and Transformers names that we rely on, and the versions we support.

A private name may change in any release. The list says where we use each of them, and a contract test checks every
entry against the installed version. This module knows names and versions; it imports neither trl nor transformers.
"""

from dataclasses import dataclass
from importlib import metadata

from packaging.specifiers import SpecifierSet


SUPPORTED = {"trl": ">=1.16,<2", "transformers": ">=5.19,<6", "peft": ">=0.18,<1"}
"""The supported version range of each distribution. `pyproject.toml` has the same ranges."""


@dataclass(frozen=True)
class UpstreamName:
    """A private name of an upstream library.

    Args:
        owner (`str`): `module:Class` that defines or inherits the name.
        name (`str`): the attribute.
        kind (`str`): `"method"` (found on the class; the test checks its `parameters`), `"class"` (a class attribute)
            or `"instance"` (set by the owner's `__init__`).
        used_in (`str`): our module that uses it.
        why (`str`): what we use it for.
        parameters (`tuple[str, ...]`): for a method, the parameters after `self` that we rely on, in order.
    """

    owner: str
    name: str
    kind: str
    used_in: str
    why: str
    parameters: tuple[str, ...] = ()


_REWARD = "trl.trainer.reward_trainer:RewardTrainer"
_OURS = "trl_ext.trainers.ranking.trainer"
_HEADS = "trl_ext.trainers.common.head_training"
_TRAINER = "transformers:Trainer"
_TOKENS = "trl_ext.trainers.token.trainer"
_SFT = "trl.trainer.sft_trainer:SFTTrainer"
_STUDENT = "trl_ext.trainers.weak_to_strong.trainer"
_GRPO = "trl.trainer.grpo_trainer:GRPOTrainer"
_DENSE = "trl_ext.trainers.policy.trainer"
_PPO = "trl_ext.trainers.policy.ppo_trainer"
_DPO = "trl.trainer.dpo_trainer:DPOTrainer"
_RANKED = "trl_ext.trainers.policy.ranked_dpo_trainer"

PRIVATE_NAMES = (
    UpstreamName(
        _REWARD,
        "_prepare_dataset",
        "method",
        _OURS,
        "turns rows into groups; TRL calls it before Trainer.__init__ and again in evaluate(), so ours is idempotent",
        ("dataset", "processing_class", "args", "dataset_name"),
    ),
    UpstreamName(
        _REWARD,
        "_set_signature_columns_if_needed",
        "method",
        _OURS,
        "keeps the columns of a group when remove_unused_columns drops the others",
    ),
    UpstreamName(
        _REWARD,
        "_signature_columns",
        "instance",
        _OURS,
        "the columns that Trainer keeps; None until the method above sets it",
    ),
    UpstreamName(_REWARD, "_tag_names", "class", _OURS, "tags of the model card"),
    UpstreamName(
        _REWARD,
        "loss_is_scaled_for_ga",
        "class",
        _HEADS,
        "True: our loss is already divided by the groups of the whole accumulation window",
    ),
    UpstreamName(_REWARD, "_total_train_tokens", "instance", _OURS, "tokens seen, which TRL logs as num_tokens"),
    UpstreamName(_REWARD, "_tp_size", "instance", _OURS, "tensor-parallel ranks that were given the same batch"),
    UpstreamName(
        _GRPO,
        "_generate_and_score_completions",
        "method",
        _DENSE,
        "its result holds advantages (B,), which we replace by (B, T); the loss takes both",
        ("inputs",),
    ),
    UpstreamName(
        _GRPO,
        "_calculate_rewards",
        "method",
        _DENSE,
        "its result holds the reward of each function and completion, of all processes, before TRL normalises it",
        ("inputs", "prompts", "completions", "completion_ids_list"),
    ),
    UpstreamName(
        _GRPO,
        "_compute_loss",
        "method",
        _PPO,
        "the policy's loss; PPO sets `beta` to 0 around it where the reward holds the KL divergence",
        ("model", "inputs"),
    ),
    UpstreamName(
        _GRPO,
        "_get_per_token_logps_and_entropies",
        "method",
        _PPO,
        "log-probabilities of the policy that sampled, for the KL divergence in the reward",
        (
            "model",
            "input_ids",
            "attention_mask",
            "logits_to_keep",
            "batch_size",
            "compute_entropy",
            "compute_aux_loss",
            "pixel_values",
            "image_grid_thw",
            "num_images",
            "pixel_attention_mask",
            "spatial_shapes",
            "num_tiles",
            "image_sizes",
            "token_type_ids",
            "mm_token_type_ids",
            "image_position_ids",
        ),
    ),
    UpstreamName(_GRPO, "_metrics", "instance", _DENSE, "mode to name to values, which TRL averages when it logs"),
    UpstreamName(_GRPO, "_tag_names", "class", _DENSE, "tags of the model card"),
    UpstreamName(_GRPO, "_name", "class", _DENSE, "the trainer's name in the model card"),
    UpstreamName(
        _DPO,
        "_prepare_dataset",
        "method",
        _RANKED,
        "turns rows into groups; TRL calls it before Trainer.__init__ and again in evaluate(), so ours is idempotent",
        ("dataset", "processing_class", "args", "dataset_name"),
    ),
    UpstreamName(
        _DPO,
        "_set_signature_columns_if_needed",
        "method",
        _RANKED,
        "keeps the columns of a group when remove_unused_columns drops the others",
    ),
    UpstreamName(_DPO, "_signature_columns", "instance", _RANKED, "the columns that Trainer keeps"),
    UpstreamName(
        _DPO,
        "_precompute_ref_logps",
        "method",
        _RANKED,
        "keeps the reference's log-probabilities in the data set; flat rows are decided before it",
        ("dataset", "name", "batch_size"),
    ),
    UpstreamName(
        _DPO,
        "_compute_loss",
        "method",
        _RANKED,
        "the loss on pairs, which a ranking loss replaces",
        ("model", "inputs", "return_outputs"),
    ),
    UpstreamName(_DPO, "_metrics", "instance", _RANKED, "mode to name to values, which TRL averages when it logs"),
    UpstreamName(_DPO, "_total_train_tokens", "instance", _RANKED, "tokens seen, which TRL logs as num_tokens"),
    UpstreamName(_DPO, "_tp_size", "instance", _RANKED, "tensor-parallel ranks that were given the same batch"),
    UpstreamName(_DPO, "_tag_names", "class", _RANKED, "tags of the model card"),
    UpstreamName(
        "trl.trainer.dpo_config:DPOConfig",
        "_VALID_DICT_FIELDS",
        "class",
        "trl_ext.trainers.policy.ranked_dpo_config",
        "fields that a command line gives as a JSON string and that become a dict",
    ),
    UpstreamName(_DPO, "_name", "class", _RANKED, "the trainer's name in the model card"),
    UpstreamName(_SFT, "_name", "class", _STUDENT, "the trainer's name in the model card"),
    UpstreamName(_SFT, "_metrics", "instance", _STUDENT, "mode to name to values, which TRL averages when it logs"),
    UpstreamName(_SFT, "_total_train_tokens", "instance", _STUDENT, "tokens seen, which TRL logs as num_tokens"),
    UpstreamName(_SFT, "_tp_size", "instance", _STUDENT, "tensor-parallel ranks that were given the same batch"),
    UpstreamName(
        _TRAINER,
        "_set_signature_columns_if_needed",
        "method",
        _TOKENS,
        "keeps the columns of a labelled row when remove_unused_columns drops the others",
    ),
    UpstreamName(
        _TRAINER,
        "_signature_columns",
        "instance",
        _TOKENS,
        "the columns that Trainer keeps; None until the method above sets it",
    ),
    UpstreamName(
        "transformers:PreTrainedTokenizerFast",
        "_encode_plus",
        "class",
        "trl_ext.data.token_ids",
        "the Rust backend is asked directly if no subclass overrides it; only the module that defines it is read",
    ),
    UpstreamName(
        _TRAINER,
        "_prepare_inputs",
        "method",
        _TOKENS,
        "moves an evaluated batch to the device, as Trainer's own prediction_step does",
        ("inputs",),
    ),
    UpstreamName(
        _TRAINER,
        "loss_is_scaled_for_ga",
        "class",
        _HEADS,
        "True: our loss is already divided by the labels of the whole accumulation window",
    ),
    UpstreamName(
        "trl.trainer.reward_config:RewardConfig",
        "_VALID_DICT_FIELDS",
        "class",
        "trl_ext.trainers.ranking.config",
        "fields that a command line gives as a JSON string and that become a dict",
    ),
    UpstreamName(
        "transformers:PreTrainedConfig",
        "_name_or_path",
        "instance",
        "trl_ext.models.loading",
        "where a model in memory was loaded from",
    ),
    UpstreamName(
        "transformers:PreTrainedConfig",
        "_attn_implementation",
        "class",
        "trl_ext.models.shared_prefix",
        "the name of the attention function in use, to put it back",
    ),
    UpstreamName(
        "transformers:PreTrainedModel",
        "_init_weights",
        "method",
        "trl_ext.models.ensemble.stacked_model",
        "draws the head of each ensemble member as from_pretrained draws a missing one",
        ("module",),
    ),
    UpstreamName(
        "transformers:PreTrainedModel",
        "_supports_attention_backend",
        "class",
        "trl_ext.models.shared_prefix",
        "whether a registered attention function is called at all",
    ),
)


def check_upstream() -> None:
    """Raise an error for versions that we do not support.

    Raises:
        ImportError: if `trl`, `transformers` or `peft` is missing or outside its supported range. The message names
            the installed version, the range, and the command that installs the right one.
    """
    for distribution, supported in SUPPORTED.items():
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            raise ImportError(
                f"trl_ext needs {distribution}{supported}, but it is not installed. "
                f"Run: pip install '{distribution}{supported}'"
            ) from None
        if not SpecifierSet(supported).contains(version, prereleases=True):
            raise ImportError(
                f"trl_ext supports {distribution}{supported}, but {distribution} {version} is installed. "
                f"Run: pip install '{distribution}{supported}'"
            )
