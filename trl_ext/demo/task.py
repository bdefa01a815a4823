"""The demo's task: sort digits, one line per step. A verifier knows whether each line is right.

It is pure Python on strings. It knows nothing of models, tokens or scores.

    >>> problem = Problem(digits=(7, 2, 9, 4))
    >>> problem.prompt
    '7294:\\n'
    >>> problem.solution
    '2\\n4\\n7\\n9\\n'

The digits of a problem are all different. Each line of a solution is the smallest digit that is left (selection sort).
Mistakes are visible in the text: a digit that is not in the prompt, a missing digit, a repeated one, or one out of
order. A reward model of two layers learns to see them within a minute. We also tried chains of arithmetic modulo 10.
They need thousands of facts (which result is right for which operands), and such a model learned next to nothing of
them in that time.
"""

import math
import random
import zlib
from dataclasses import dataclass


# Which of the 100 buckets belong to each split. The policy learns from `policy`, and `trial` decides when it stops.
# Reward models learn from `train`. All figures come from `held_out`.
SPLITS = {"policy": (0, 45), "trial": (45, 50), "train": (50, 90), "held_out": (90, 100)}


@dataclass(frozen=True)
class Problem:
    """
    One list of digits to sort.

    Args:
        digits (`tuple[int, ...]`):
            Different digits, each in `[0, 9]`.
    """

    digits: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The text that the policy reads. It ends with a line break, so a solution consists of whole lines."""
        return "".join(map(str, self.digits)) + ":\n"

    @property
    def steps(self) -> list[str]:
        """The lines of the right solution, each with its line break."""
        return [f"{digit}\n" for digit in sorted(self.digits)]

    @property
    def solution(self) -> str:
        """The right solution as one text."""
        return "".join(self.steps)


@dataclass(frozen=True)
class Verdict:
    """
    The verifier's verdict on one solution.

    Args:
        steps_right (`tuple[bool, ...]`):
            Whether each line of the solution is the one that belongs there.
        steps_needed (`int`):
            How many lines the right solution has.
        answer_right (`bool`):
            Whether the whole list is right: every line is right, none is missing and none is too many.
    """

    steps_right: tuple[bool, ...]
    steps_needed: int
    answer_right: bool

    @property
    def rating(self) -> float:
        """Right lines divided by needed lines, plus 1 for a right answer. In `[0, 2]`, higher is better."""
        return sum(self.steps_right) / self.steps_needed + float(self.answer_right)


def final_answer(completion: str) -> str:
    """
    The answer of a solution in a form that you can compare: its lines without surrounding spaces.

    Example:

    >>> final_answer("2\\n7\\n9\\n") == final_answer("2\\n7\\n9")
    True
    """
    return "\n".join(line.strip() for line in completion.strip().splitlines())


def verify(problem: Problem, completion: str) -> Verdict:
    """
    Compares every line of a solution with the right solution.

    Args:
        problem ([`Problem`]):
            The problem.
        completion (`str`):
            The text after the prompt, without special tokens.

    Example:

    >>> verdict = verify(Problem(digits=(7, 2, 9, 4)), "2\\n5\\n7\\n9\\n")
    >>> verdict.steps_right, verdict.answer_right, verdict.rating
    ((True, False, True, True), False, 0.75)
    """
    written = completion.splitlines()
    needed = [step.rstrip("\n") for step in problem.steps]
    steps_right = tuple(i < len(needed) and line == needed[i] for i, line in enumerate(written))
    return Verdict(steps_right=steps_right, steps_needed=len(needed), answer_right=written == needed)


def split_of(problem: Problem) -> str:
    """The split of [`SPLITS`] that a problem belongs to. It depends on a checksum of the prompt, not on a seed."""
    bucket = zlib.crc32(problem.prompt.encode()) % 100
    for split, (first, end) in SPLITS.items():
        if first <= bucket < end:
            return split
    raise AssertionError(f"no split holds bucket {bucket}")


def make_problems(count: int, split: str, seed: int, *, lengths: tuple[int, ...] = (5, 6, 7, 8)) -> list[Problem]:
    """
    Draws distinct problems of a split. The same arguments give the same problems.

    Args:
        count (`int`):
            Number of problems.
        split (`str`):
            A key of [`SPLITS`]. No problem is in two splits.
        seed (`int`):
            Seed of the draw.
        lengths (`tuple[int, ...]`, *optional*, defaults to `(5, 6, 7, 8)`):
            The possible numbers of digits, each equally likely.

    Raises:
        ValueError: The split is unknown, a length is outside of `[1, 10]`, or `count` is too large. The limit is half
            of the split's problems of the shortest length, times the number of lengths: beyond it, drawing distinct
            problems would become slow.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are: {', '.join(SPLITS)}")
    if not lengths or min(lengths) < 1 or max(lengths) > 10:
        raise ValueError(f"lengths={lengths}; needed: at least one length, each from 1 to 10 (digits do not repeat)")
    first, end = SPLITS[split]
    limit = len(set(lengths)) * math.perm(10, min(lengths)) * (end - first) // 200
    if count > limit:
        raise ValueError(
            f"count={count} is too large for split {split!r}: lengths {lengths} give at most {limit} distinct ones. "
            "Ask for fewer problems or for longer lists"
        )
    rng = random.Random(f"trl_ext.demo.task:{seed}:{split}")
    problems: dict[Problem, None] = {}
    while len(problems) < count:
        problem = Problem(digits=tuple(rng.sample(range(10), rng.choice(lengths))))
        if split_of(problem) == split:
            problems[problem] = None
    return list(problems)
