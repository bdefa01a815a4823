"""The stages of `trl-ext demo` and their sizes.

    policy -> samples -> reward        Plackett-Luce loss, LoRA on the policy
                      -> reward_nf4    the same with fewer steps, on the policy quantized to 4 bits
                      -> orm           learns from right and wrong answers; trains all weights of the policy
                      -> prm           learns from lines up to the first wrong one; trains all weights
                      -> ensemble      three members in one run, LoRA on the last layer of the policy
    policy -> weak_to_strong           the policy learns from a smaller model's solutions
    samples, reward, orm -> rejection  fine-tunes the policy on its best samples, and on random ones
    policy, prm -> dense               trains the policy by GRPO, with the outcome alone and with rewards for lines

To add a stage, append a [`Stage`] to [`plan`]. A stage names the stages that it needs, and finds their files in
`context.folders`. This module knows names and numbers. The `..._stages` modules know what a stage does.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from trl_ext.demo.dense_stages import run_dense
from trl_ext.demo.ensemble_stages import run_ensemble
from trl_ext.demo.policy_stages import run_policy, run_samples
from trl_ext.demo.rejection_stages import run_rejection
from trl_ext.demo.reward_stages import run_reward
from trl_ext.demo.token_stages import run_orm, run_prm
from trl_ext.demo.weak_to_strong_stages import run_weak_to_strong
from trl_ext.pipelines.stages.cached_stages import Stage, StageContext


@dataclass(frozen=True)
class Sizes:
    """How many prompts, samples and steps each stage uses. The demo runs with the defaults."""

    policy_prompts: int = 8000
    policy_max_steps: int = 1000
    trial_prompts: int = 200
    train_prompts: int = 6000
    held_out_prompts: int = 1000
    num_samples: int = 8
    reward_steps: int = 1500
    nf4_steps: int = 700
    orm_steps: int = 1500
    prm_steps: int = 1000
    ensemble_steps: int = 600
    weak_prompts: int = 4000
    weak_steps: int = 700
    student_steps: int = 60
    rejection_prompts: int = 1500
    kept: int = 2
    dense_steps: int = 80
    dense_prompts: int = 8
    eval_samples: int = 4


# A smoke run shows that every stage runs. It is too short to learn anything.
SMOKE = Sizes(
    policy_prompts=200,
    policy_max_steps=40,
    trial_prompts=20,
    train_prompts=24,
    held_out_prompts=12,
    reward_steps=4,
    nf4_steps=2,
    orm_steps=2,
    prm_steps=2,
    ensemble_steps=2,
    weak_prompts=40,
    weak_steps=150,  # until its texts end: the student learns from finished texts only
    student_steps=2,
    rejection_prompts=16,
    dense_steps=2,
    dense_prompts=2,
    eval_samples=1,
)

TEMPERATURE = 0.8
BATCH_SIZE = 8  # groups; with 4, one of three seeds did not leave its plateau in 1,500 steps
LEARNING_RATE = 1e-3
LORA_RANK = 16
TOKEN_BATCH_SIZE = {"orm": 64, "prm": 32}  # completions; with half as many, an outcome model picks far worse
TOKEN_LEARNING_RATE = 1e-3
WEAK_TO_STRONG = {"batch_size": 32, "learning_rate": 1e-4}  # low, because the policy knows the task already
DENSE_LEARNING_RATE = 1e-4
ENSEMBLE = {"learning_rate": 2e-3, "lora_rank": LORA_RANK, "members": 3, "branch_at": 0.5}


def plan(seed: int = 0, smoke: bool = False) -> list[Stage]:
    """
    The stages in order.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the problems, the weights and the samples.
        smoke (`bool`, *optional*, defaults to `False`):
            Whether to use the sizes of `SMOKE`.
    """
    sizes = asdict(SMOKE if smoke else Sizes())
    common = {"seed": seed, "temperature": TEMPERATURE}

    def chosen(*names: str) -> dict[str, int]:
        return {name: sizes[name] for name in names}

    def model(
        name: str,
        title: str,
        run: Callable[[StageContext], dict[str, Any]],
        steps: int,
        seconds: float,
        batch_size: int = BATCH_SIZE,
        learning_rate: float = LEARNING_RATE,
        **more: float,  # `lora_rank`, and settings that only this stage has
    ) -> Stage:
        settings = {
            "seed": seed,
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            **more,
        }
        return Stage(name, title, run, settings, needs=("policy", "samples"), seconds=seconds, trains=True)

    def token_model(name: str, title: str, run: Callable[[StageContext], dict[str, Any]], seconds: float) -> Stage:
        return model(name, title, run, sizes[f"{name}_steps"], seconds, TOKEN_BATCH_SIZE[name], TOKEN_LEARNING_RATE)

    # The seconds were measured on two busy cores. Once a run has started, only their ratios matter for the estimate.
    return [
        Stage(
            "policy",
            "policy (SFT, stopped early)",
            run_policy,
            {**common, **chosen("policy_prompts", "policy_max_steps", "trial_prompts")},
            seconds=6 if smoke else 15,
            trains=True,
        ),
        Stage(
            "samples",
            "samples and ratings",
            run_samples,
            {**common, **chosen("train_prompts", "held_out_prompts", "num_samples")},
            needs=("policy",),
            seconds=1 if smoke else 45,
        ),
        model(
            "reward",
            "reward model (LoRA)",
            run_reward,
            sizes["reward_steps"],
            2 if smoke else 85,
            lora_rank=LORA_RANK,
            quantized=False,
        ),
        model(
            "reward_nf4",
            "reward model (LoRA on NF4)",
            run_reward,
            sizes["nf4_steps"],
            2 if smoke else 50,
            lora_rank=LORA_RANK,
            quantized=True,
        ),
        token_model("orm", "outcome model (all weights)", run_orm, 2 if smoke else 130),
        token_model("prm", "process model (all weights)", run_prm, 2 if smoke else 70),
        model("ensemble", "ensemble of three", run_ensemble, sizes["ensemble_steps"], 2 if smoke else 60, **ENSEMBLE),
        Stage(
            "weak_to_strong",
            "weak to strong, three models",
            run_weak_to_strong,
            {
                "seed": seed,
                "steps": sizes["student_steps"],
                "weak_steps": sizes["weak_steps"],
                "train_prompts": sizes["weak_prompts"],
                "held_out_prompts": sizes["held_out_prompts"],
                **WEAK_TO_STRONG,
            },
            needs=("policy",),
            seconds=2 if smoke else 25,
        ),
        Stage(
            "rejection",
            "rejection sampling, four arms",
            run_rejection,
            {
                **common,
                **chosen(
                    "train_prompts", "held_out_prompts", "rejection_prompts", "num_samples", "kept", "eval_samples"
                ),
            },
            needs=("policy", "samples", "reward", "orm"),
            seconds=6 if smoke else 50,
        ),
        Stage(
            "dense",
            "GRPO with the process model",
            run_dense,
            {
                **common,
                **chosen("train_prompts", "held_out_prompts", "num_samples", "eval_samples"),
                "steps": sizes["dense_steps"],
                "batch_size": sizes["dense_prompts"],
                "learning_rate": DENSE_LEARNING_RATE,
            },
            needs=("policy", "prm"),
            seconds=4 if smoke else 35,
            trains=True,
        ),
    ]
