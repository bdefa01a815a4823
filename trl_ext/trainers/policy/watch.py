"""Watches a policy in training: its steps, signs of reward hacking, and a sample of completions with their credit.

It knows rewards, tokens and metrics. It does not know how advantages are made.
"""

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trl_ext.metrics.policy import first_low_steps, repetition, sums_by_step, trend
from trl_ext.trainers.policy.alignment import token_ends


logger = logging.getLogger(__name__)

# Positions of steps that have a metric; the last one counts all later steps.
POSITIONS = 6
# Trends are those of so many batches of completions.
WINDOW = 50
# A reward rises if its slope is this many standard errors above 0; a verifier follows if its slope is above 1.
RISES, FOLLOWS = 3.0, 1.0
SAMPLES = "advantages.jsonl"


def step_metrics(
    rewards: torch.Tensor, given: torch.Tensor, mask: torch.Tensor, low: float, reduce: Callable
) -> dict[str, float]:
    """
    Rewards by position of the step, where the first low one is, and how long steps are.

    Args:
        rewards, given, mask (`torch.Tensor` of shape `(N, T)`): of this process.
        low (`float`): a reward below it is low.
        reduce (`Callable`): adds a tensor up over processes.
    """
    sums, counts = sums_by_step(rewards, given, POSITIONS)
    first = first_low_steps(rewards, given, low, POSITIONS)
    length = torch.stack([mask[given.any(1)].sum(), given.sum()]).float()
    parts = reduce(torch.cat([sums, counts, first, length])).split([POSITIONS, POSITIONS, POSITIONS + 1, 2])
    sums, counts, first, (tokens, steps) = (part.tolist() for part in parts)
    found = {f"dense/reward_at_step_{n + 1}": sums[n] / counts[n] for n in range(POSITIONS) if counts[n]}
    if sum(first):
        found |= {f"dense/first_low_at_step_{n + 1}": first[n] / sum(first) for n in range(POSITIONS)}
        found |= {"dense/without_low_step": first[-1] / sum(first), "watch/tokens_per_step": tokens / steps}
    return found


def repetition_metric(ids: torch.Tensor, mask: torch.Tensor, reduce: Callable) -> dict[str, float]:
    """The share of runs of four tokens that occurred earlier in their completion."""
    shares = [repetition(row[real].tolist()) for row, real in zip(ids, mask, strict=True)]
    total, count = reduce(torch.tensor([sum(shares), float(len(shares))], device=ids.device)).tolist()
    return {"watch/repetition": total / count}


class HackingWatch:
    """
    Compares the trends of the rewards with that of a verifier, and warns once when only a reward rises.

    It also warns once when the verifier falls, whatever the rewards do.

    Args:
        verifier (`str`): name of the reward function that tells the truth.
    """

    def __init__(self, verifier: str):
        self.verifier = verifier
        self._means: dict[str, deque[float]] = {
            name: deque(maxlen=WINDOW) for name in ("reward", "dense_reward", "verifier")
        }
        self._warned: set[str] = set()

    def add(self, reward: float, truth: float, dense: float = math.nan) -> dict[str, float]:
        """
        Add the means of a batch of completions; returns the trends in standard errors.

        Args:
            reward, truth (`float`): the scalar reward, and what the verifier says.
            dense (`float`, *optional*): the sum of a completion's dense rewards. It is not part of `reward`.
        """
        if math.isfinite(reward) and math.isfinite(truth):
            for name, mean in (("reward", reward), ("verifier", truth), ("dense_reward", dense)):
                if math.isfinite(mean):
                    self._means[name].append(mean)
                else:
                    self._means[name].clear()  # a window is of batches that follow each other
        trends = {name: trend(means) for name, means in self._means.items()}
        follows = trends["verifier"]
        full = {name for name, means in self._means.items() if len(means) == WINDOW}
        risen = [name for name in ("reward", "dense_reward") if name in full and trends[name] > RISES]
        suspected = bool(risen) and not follows > FOLLOWS
        if suspected:
            words = risen[0].replace("_", " ")
            self._warn(
                "only the reward rises",
                f"the {words} rose (slope of {trends[risen[0]]:.1f} standard errors) and the verifier "
                f"{self.verifier!r} did not ({follows:.1f}). The policy may exploit the reward.",
            )
        if "verifier" in full and follows < -RISES:
            self._warn(
                "the verifier falls",
                f"the verifier {self.verifier!r} fell (slope of {follows:.1f} standard errors). What the policy is "
                "trained on makes it worse.",
            )
        found = {f"watch/{name}_trend": value for name, value in trends.items()}
        if not self._means["dense_reward"]:
            del found["watch/dense_reward_trend"]
        return found | {"watch/hacking_suspected": float(suspected)}

    def _warn(self, kind: str, what: str) -> None:
        """Warn once of each kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            less = "lower `dense_weight`, " if self._means["dense_reward"] else ""
            logger.warning(
                f"Over the last {WINDOW} batches {what} Look at completions, raise `beta`, {less}or stop here."
            )


def samples_of(
    step: int, tokenizer: PreTrainedTokenizerBase, output: dict[str, Any], rows: int
) -> list[dict[str, Any]]:
    """
    Completions with the credit of each token.

    Args:
        step (`int`): the training step that they belong to.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the policy's.
        output (`dict`): what the trainer knows of a batch of N completions: `prompt_ids`, `prompt_mask`,
            `completion_ids`, `completion_mask`, `rewards` and `given` of the shape `(N, T)`; `advantages` `(N, T)` or
            `(N,)`; `scalar` and `scored` `(N,)`, the scalar rewards and where there is one; perhaps `values` `(N, T)`.
        rows (`int`): how many of the N to take.

    Returns:
        `list[dict]`: each with `step`, `prompt`, `pieces` (the text that each token adds), `advantages`, `rewards`
        (`None` for tokens without one), `reward` (the scalar one, or `None`), and with a critic `values`.
    """
    samples = []
    for row in range(min(rows, len(output["completion_ids"]))):
        real = output["completion_mask"][row].bool()
        text, ends = token_ends(tokenizer, output["completion_ids"][row][real].tolist())
        credit = output["advantages"][row]
        credit = credit.expand(len(real)) if credit.dim() == 0 else credit
        rewards = output["rewards"][row].masked_fill(~output["given"][row], torch.nan)[real].tolist()
        sample = {
            "step": step,
            "prompt": tokenizer.decode(output["prompt_ids"][row][output["prompt_mask"][row].bool()]),
            "pieces": [text[start:end] for start, end in zip([0, *ends], ends, strict=False)],
            "advantages": credit[real].tolist(),
            "rewards": [None if math.isnan(reward) else reward for reward in rewards],
            "reward": output["scalar"][row].item() if output["scored"][row] else None,
        }
        if "values" in output:
            sample["values"] = output["values"][row][real].tolist()
        samples.append(sample)
    return samples


def write_samples(folder: str | Path, samples: Sequence[dict[str, Any]]) -> None:
    """Append the result of [`samples_of`] to `advantages.jsonl`, one JSON object a line. `policy_report` shows it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / SAMPLES).open("a", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
