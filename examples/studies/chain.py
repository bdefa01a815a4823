"""A chain where the answer is right only if every step is: which advantage still learns when that is rare?

    python examples/studies/chain.py --json result.json    # half a minute on a CPU
    python examples/studies/chain.py --smoke

A solution has `length` steps, each with four choices of which one is right. A wrong step cannot be mended. The policy
is a table: for each step and state (all right so far, or not) the logits of the choices. So its chance of a right
answer is known exactly, and nothing but the advantage differs between the arms: the same samples a step (8 prompts
with 8 samples), learning rate, number of steps. The outcome is 1 for a right answer. The dense reward of a step is 1
as long as all steps are right.
"""

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from scipy.stats import t as student_t

from trl_ext.losses.advantages import (
    gae,
    group_normalize,
    last_tokens,
    min_form,
    normalize_steps,
    potentials_of,
    returns_to_go,
    shrunken_steps,
    whiten,
)


GROUP, PROMPTS, CHOICES = 8, 8, 4
Advantage = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # ids, rewards, outcomes -> (N, T)


def outcome_only(ids: torch.Tensor, rewards: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
    return group_normalize(outcomes, GROUP)[:, None].expand_as(rewards)


def process(ids: torch.Tensor, rewards: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
    every = torch.ones_like(rewards, dtype=torch.bool)
    steps = returns_to_go(normalize_steps(rewards, every, GROUP), every)
    return outcome_only(ids, rewards, outcomes) + steps


def worst_step(ids: torch.Tensor, rewards: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
    every = torch.ones_like(rewards, dtype=torch.bool)
    return outcome_only(ids, rewards, outcomes) + whiten(returns_to_go(min_form(rewards, every), every), every, GROUP)


def shaped(gae_lambda: float) -> Advantage:
    def advantage(ids: torch.Tensor, rewards: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
        every = torch.ones_like(rewards, dtype=torch.bool)
        potentials = potentials_of(rewards, every, every, GROUP, "min")
        credit = gae(outcomes[:, None] * last_tokens(every), potentials, every, gae_lambda=gae_lambda)
        return whiten(credit, every, GROUP, scale_by="batch")

    return advantage


def shrunken(ids: torch.Tensor, rewards: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
    every = torch.ones_like(rewards, dtype=torch.bool)
    returns = returns_to_go(rewards + outcomes[:, None] * last_tokens(every), every)
    return whiten(shrunken_steps(returns, ids, every, every, GROUP), every, GROUP, shift_mean=False)


ARMS: dict[str, Advantage] = {
    "outcome": outcome_only,
    "process": process,
    "min-form": worst_step,
    "shaped, lambda 1": shaped(1.0),
    "shaped, lambda 0": shaped(0.0),
    "shrunken": shrunken,
}


def train(advantage: Advantage, length: int, steps: int, learning_rate: float, seed: int) -> float:
    """The chance of a right answer after training."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(length, 2, CHOICES, requires_grad=True)  # state 1: all right so far
    optimizer = torch.optim.SGD([logits], learning_rate)
    for _ in range(steps):
        right = torch.ones(PROMPTS * GROUP, dtype=torch.bool)
        ids, rewards, chances = [], [], []
        for step in range(length):
            log = logits[step, right.long()].log_softmax(-1)  # (N, CHOICES)
            chosen = torch.multinomial(log.detach().exp(), 1, generator=generator)
            right = right & (chosen[:, 0] == 0)
            ids.append(chosen[:, 0])
            rewards.append(right.float())
            chances.append(log.gather(1, chosen)[:, 0])
        credit = advantage(torch.stack(ids, 1), torch.stack(rewards, 1), right.float())
        loss = -(credit * torch.stack(chances, 1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return math.exp(logits[:, 1].log_softmax(-1)[:, 0].sum().item())


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning_rate", type=float, default=4.0)
    parser.add_argument("--json", type=Path, help="file for the report")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.lengths, args.seeds, args.steps = [2], 2, 3
    columns = ["advantage", *(f"{n} steps (at random {CHOICES**-n:.1g})" for n in args.lengths)]
    lines = []
    for name, advantage in ARMS.items():
        cells = []
        for length in args.lengths:
            found = [train(advantage, length, args.steps, args.learning_rate, seed) for seed in range(args.seeds)]
            half = student_t.ppf(0.975, len(found) - 1) * statistics.stdev(found) / len(found) ** 0.5
            cells.append(f"{statistics.fmean(found):.3f} ± {half:.3f}")
        lines.append([name, *cells])
    print("\n".join("| " + " | ".join(line) + " |" for line in [columns, *lines]))
    if args.json:
        report = {
            "title": "A chain of steps: the chance of a right answer after training",
            "date": date.today().isoformat(),
            "machine": f"{os.cpu_count()} CPU cores, no GPU",
            "command": [f"python examples/studies/chain.py --seeds {args.seeds} --steps {args.steps}"],
            "note": f"Means of {args.seeds} seeds with 95 % intervals (Student's t); {args.steps} optimizer steps of "
            f"{PROMPTS} prompts with {GROUP} samples, learning rate {args.learning_rate:g}.",
            "columns": columns,
            "rows": lines,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
