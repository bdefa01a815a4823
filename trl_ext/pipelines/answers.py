"""Answers read off completions, in a form in which equal answers are equal: what votes are counted over.

A canonicaliser is a function from the completions of *one* question to an answer for each, `None` where there is none.
Knows texts only.
"""

import re
import threading
from collections.abc import Callable, Hashable, Sequence


Canonicaliser = Callable[[Sequence[str]], list[Hashable | None]]


def math_answers(completions: Sequence[str]) -> list[str | None]:
    r"""
    The mathematical answer of each completion; completions with equal values get the same text.

    Found and compared by [math-verify](https://github.com/huggingface/Math-Verify) (the extra `math`), which TRL's
    `accuracy_reward` uses too: the last `\boxed{}`, LaTeX or plain number.

    Args:
        completions (`Sequence[str]`):
            Completions of one question.

    Returns:
        `list[str | None]`: for each the text of the first answer that is equal to its own.

    Raises:
        ImportError: if math-verify is not installed.

    Example:

    ```python
    >>> math_answers(["so \\boxed{1/2}", "The answer is 0.5", "A: 3", "I do not know"])
    ['\\frac{1}{2}', '\\frac{1}{2}', '3', None]
    ```
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError(
            "Comparing mathematical answers needs math-verify, which is not installed. Run: pip install "
            "'trl-ext[math]', or give another function for the answers, e.g. last_number."
        ) from error
    # math-verify limits its time by a signal, which only the main thread can receive; TRL does the same
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    known: dict[str, list] = {}  # representatives: text -> what it was parsed to
    same: dict[str, str] = {}  # every text seen -> that of its representative
    answers: list[str | None] = []
    for completion in completions:
        parsed = parse(completion, parsing_timeout=limit)
        if not parsed:
            answers.append(None)
            continue
        text = str(parsed[-1])
        if text not in same:
            equal = (other for other, value in known.items() if verify(value, parsed, timeout_seconds=limit))
            same[text] = next(equal, text)
            if same[text] == text:
                known[text] = parsed
        answers.append(same[text])
    return answers


def last_number(completions: Sequence[str]) -> list[float | None]:
    """
    The last number that is written in each completion, without its commas for thousands.

    Example:

    >>> last_number(["He has 12 left.\\nA: 1,234", "#### -3.50", "none"])
    [1234.0, -3.5, None]
    """
    found = [re.findall(r"-?\d[\d,]*(?:\.\d+)?", completion) for completion in completions]
    return [float(numbers[-1].replace(",", "")) if numbers else None for numbers in found]


def last_line(completions: Sequence[str]) -> list[str | None]:
    """
    The last line that is not empty, without spaces around it; texts that are the same are the same answer.

    Example:

    >>> last_line(["because\\n  Paris \\n", ""])
    ['Paris', None]
    """
    lines = [completion.strip().splitlines() for completion in completions]
    return [text[-1].strip() if text else None for text in lines]


CANONICALISERS: dict[str, Canonicaliser] = {"math": math_answers, "number": last_number, "line": last_line}
