"""Sorting digits one line a step, with a verifier that knows the truth of every line.

Pure Python on strings: it knows nothing of models, tokens or scores.

    >>> problem = Problem(digits=(7, 2, 9, 4))
    >>> problem.prompt
    '7294:\\n'
    >>> problem.solution
    '2\\n4\\n7\\n9\\n'

The digits of a problem are all different, and each line is the smallest digit that is left (selection sort). Mistakes
can be read off the text: a digit that was never there, one that was forgotten, one too many, one out of order. A
reward model of two layers learns to see them within a minute. Chains of arithmetic modulo 10 need thousands of facts
(which result is right for which operands), and such a model learned next to nothing of them in that time.
"""

import math
import random
import zlib
from dataclasses import dataclass


# The buckets, of 100, of each split: what the policy is taught, what tells when to stop teaching it, what reward
# models are trained on, and what all figures are measured on.
SPLITS = {"policy": (0, 45), "trial": (45, 50), "train": (50, 90), "held_out": (90, 100)}


@dataclass(frozen=True)
class Problem:
    """
    One list to sort.

    Args:
        digits (`tuple[int, ...]`):
            Different digits, each in `[0, 9]`.
    """

    digits: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The text that a policy is given; ends with a line break, so that a solution is whole lines."""
        return "".join(map(str, self.digits)) + ":\n"

    @property
    def steps(self) -> list[str]:
        """The lines of the one right solution, each with its line break."""
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
            For each line of the solution, whether it is the line that belongs there.
        steps_needed (`int`):
            How many lines the right solution has.
        answer_right (`bool`):
            Whether the whole list is right: every line, none missing, none too many.
    """

    steps_right: tuple[bool, ...]
    steps_needed: int
    answer_right: bool

    @property
    def rating(self) -> float:
        """The share of needed lines that are right, plus 1 for a right answer: in `[0, 2]`, higher is better."""
        return sum(self.steps_right) / self.steps_needed + float(self.answer_right)


def final_answer(completion: str) -> str:
    """
    The answer of a solution, in a form that can be compared: its lines without spaces around them.

    Example:

    >>> final_answer("2\\n7\\n9\\n") == final_answer("2\\n7\\n9")
    True
    """
    return "\n".join(line.strip() for line in completion.strip().splitlines())


def verify(problem: Problem, completion: str) -> Verdict:
    """
    Checks every line of a solution against the only right one.

    Args:
        problem ([`Problem`]):
            What was asked.
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
    """The split of [`SPLITS`] that a problem belongs to, for every seed: told by a checksum of its prompt."""
    bucket = zlib.crc32(problem.prompt.encode()) % 100
    for split, (first, end) in SPLITS.items():
        if first <= bucket < end:
            return split
    raise AssertionError(f"no split holds bucket {bucket}")


def make_problems(count: int, split: str, seed: int, *, lengths: tuple[int, ...] = (5, 6, 7, 8)) -> list[Problem]:
    """
    Draws different problems of a split, the same ones for the same arguments.

    Args:
        count (`int`):
            How many.
        split (`str`):
            A name of [`SPLITS`]. No problem is in two splits.
        seed (`int`):
            Seed of the draw.
        lengths (`tuple[int, ...]`, *optional*, defaults to `(5, 6, 7, 8)`):
            The numbers of digits to choose from, each equally likely.

    Raises:
        ValueError: The split is unknown, a length is not from 1 to 10, or more is asked for than half of what the
            split holds of the shortest length, times the number of lengths (drawing different ones would become slow).
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are: {', '.join(SPLITS)}")
    if not lengths or min(lengths) < 1 or max(lengths) > 10:
        raise ValueError(f"lengths={lengths}; needed: numbers of different digits, from 1 to 10")
    first, end = SPLITS[split]
    limit = len(set(lengths)) * math.perm(10, min(lengths)) * (end - first) // 200
    if count > limit:
        raise ValueError(
            f"asked for {count} different problems of split {split!r}, but with lengths {lengths} at most {limit} are "
            "drawn: ask for fewer or for longer lists"
        )
    rng = random.Random(f"trl_ext.demo.task:{seed}:{split}")
    problems: dict[Problem, None] = {}
    while len(problems) < count:
        problem = Problem(digits=tuple(rng.sample(range(10), rng.choice(lengths))))
        if split_of(problem) == split:
            problems[problem] = None
    return list(problems)
