"""The measurement of `trl-ext bench fit` for policies: real steps on random weights, phase by phase.

It knows trainers, live tensors and the phases of a step. It does not know how an estimate is made.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.bench.runner import timed_training
from trl_ext.bench.synthetic import random_words
from trl_ext.fit.config import TRAINERS, Parsed, changed
from trl_ext.fit.live_bytes import LiveBytes
from trl_ext.fit.policy_config import critic_adapter, reward_adapters
from trl_ext.fit.rows import PolicySizes
from trl_ext.fit.runs import GIB, WARMUP, for_a_run, peaks


if TYPE_CHECKING:
    from torch import nn

    from trl_ext.fit.policy_models import RewardAdapter


def run_policy(
    command: str, parsed: Parsed, model: Path, sizes: PolicySizes, args: argparse.Namespace, count: bool
) -> dict[str, Any]:
    """
    Run a few steps of the trainer of a policy, with completions of full length.

    Reward models have random weights, and functions are replaced by one that costs nothing.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoTokenizer
    from trl import get_peft_config

    import trl_ext
    from trl_ext.trainers.common.command_line import build_trainer

    adapters = reward_adapters(parsed, AutoConfig.from_pretrained(model), sizes)
    tokenizer = AutoTokenizer.from_pretrained(model)
    scorers = [AdapterOnBase(adapter, f"reward-{number}", tokenizer) for number, adapter in enumerate(adapters)]
    more: dict[str, Any] = {
        "reward_funcs": [_length, *(s for s, adapter in zip(scorers, adapters, strict=True) if not adapter.dense)],
        "dense_reward_funcs": [s for s, adapter in zip(scorers, adapters, strict=True) if adapter.dense],
    }
    values: dict[str, Any] = {
        "gradient_accumulation_steps": parsed.training.gradient_accumulation_steps,
        "max_completion_length": sizes.completion,
        "reward_weights": None,
        "dense_reward_weights": None,
        "verifier": None,
        "num_iterations": 1,  # so that every step generates
        "log_completions": False,
        # neither an early end nor a token that decoding drops
        "generation_kwargs": {"min_new_tokens": sizes.completion, "suppress_tokens": [0, 1]},
    }
    if not more["dense_reward_funcs"] and parsed.training.advantage != "gae":
        values["advantage"] = "outcome"
    if command == "ppo" and parsed.training.advantage == "gae":
        more["value_peft_config"] = critic_adapter(parsed, get_peft_config(parsed.model))
    run = changed(for_a_run(parsed, model, args), values)
    words = random.Random(args.seed)
    rows = [{"prompt": f"{random_words(sizes.prompt, sizes.words, words)}\n"} for _ in range(sizes.generated)]
    trainer = build_trainer(
        getattr(trl_ext, TRAINERS[command]), run.training, run.model, Dataset.from_list(rows), **more
    )
    modules = [trainer.model, getattr(trainer, "value_model", None), trainer.ref_model, *(s.model for s in scorers)]
    weights = [t for module in filter(None, modules) for t in (*module.parameters(), *module.buffers())]
    with LiveBytes(weights) if count else nullcontext() as live:
        windows = {} if live is None else _windows(trainer, live)
        timed = timed_training(trainer, WARMUP)
    if live is not None:
        windows["policy"] = max(windows.get("policy", 0), live.peak)
    states = [t for state in trainer.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    optimizer = sum(t.numel() * t.element_size() for t in states)
    seconds = statistics.median(timed.wall)
    found: dict[str, Any] = {"optimizer_gib": optimizer / GIB, "seconds_per_step": seconds}
    completions = sizes.rows * parsed.training.gradient_accumulation_steps
    found["text_tokens_per_second"] = completions * sizes.length / seconds
    if windows:
        found["phases_gib"] = {name: size / GIB for name, size in windows.items()}
    return found | peaks(weights, optimizer, max(windows.values()) if windows else None)


def _windows(trainer: Any, live: LiveBytes) -> dict[str, int]:
    """
    Peaks of live bytes by phase, filled while the trainer runs. What is in none of them belongs to the policy.

    The first steps do not count: there are no states of the optimizer yet, and a scorer checks its model once.
    """
    from transformers import TrainerCallback

    found: dict[str, int] = {}

    class Forget(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step <= WARMUP:
                found.clear()
                live.peak = live.live

    trainer.add_callback(Forget())

    def watched(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            found["policy"] = max(found.get("policy", 0), live.peak)
            live.peak = live.live
            try:
                return function(*args, **kwargs)
            finally:
                found[name] = max(found.get(name, 0), live.peak)
                live.peak = live.live

        return call

    trainer.model.generate = watched("generation", trainer.model.generate)
    trainer._calculate_rewards = watched("rewards", trainer._calculate_rewards)
    if getattr(trainer, "value_model", None) is not None:  # only PPO has a critic
        trainer._train_critic = watched("critic", trainer._train_critic)
    return found


def _length(completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(text) % 7) for text in completions]


class AdapterOnBase:
    """
    A reward model with random weights: an adapter on the policy's base, for scalar and for dense rewards.

    Args:
        adapter (`RewardAdapter`): what it is.
        name (`str`): its name in metrics.
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
    """

    model: "nn.Module | None" = None

    def __init__(self, adapter: "RewardAdapter", name: str, tokenizer: Any):
        self.__name__ = name
        self.kind = "outcome" if adapter.dense else "scalar"
        self._config, self._tokenizer = adapter.peft_config, tokenizer

    def use_base(self, policy: "nn.Module") -> None:
        """Put the adapter on the policy's base."""
        from trl_ext.data.tokenization import TokenizationSettings
        from trl_ext.models.bases import describe_base
        from trl_ext.models.ensemble.shared_base import new_adapter
        from trl_ext.models.sidecar import Sidecar
        from trl_ext.scoring import RewardScorer

        self.model, self._adapter, head = new_adapter(policy, self._config, self.__name__)
        settings = TokenizationSettings(append_eos=False).to_dict()
        self._sidecar = Sidecar(describe_base(self.model), True, head, settings, kind=self.kind, label_placement="all")
        with self._active():
            self._scorer = RewardScorer(self.model, self._tokenizer)

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        with self._active():
            return self._scorer(prompts, completions)

    def score_tokens(self, prompts: Any, completions: Any) -> list[list[float]]:
        """The head's output for each token."""
        with self._active():
            return self._scorer.score_tokens(prompts, completions)

    def token_texts(self, prompts: Any, completions: Any) -> list[list[str]]:
        """The text of each token."""
        return self._scorer.token_texts(prompts, completions)

    def _active(self) -> Any:
        from trl_ext.models.ensemble.shared_base import use_adapter

        return use_adapter(self.model, self._adapter, self._sidecar)
