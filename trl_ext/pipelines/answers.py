"""Reads the answers in completions and brings them to one form, so that equal answers compare equal in a vote.

A canonicaliser is a function from the completions of *one* question to an answer for each, `None` for no answer.
This module knows only texts.
"""

import importlib.util
import re
import threading
from collections.abc import Callable, Hashable, Sequence


Canonicaliser = Callable[[Sequence[str]], list[Hashable | None]]


_OTHER_ANSWERS = "read answers by answers='number' or 'line' (--answers number)"


def load_answers(answers: "str | Canonicaliser") -> Canonicaliser:
    """
    The function that reads answers: one of [`CANONICALISERS`] by name, or `answers` if it is a function already.

    Raises:
        ValueError: the name is not known. ImportError: it needs a package that is missing.
    """
    if not isinstance(answers, str):
        return answers
    if answers not in CANONICALISERS:
        raise ValueError(f"answers={answers!r}; needed: a function or one of {', '.join(CANONICALISERS)}.")
    if answers == "math":
        check_math_verify("answers='math'", _OTHER_ANSWERS)
    return CANONICALISERS[answers]


def check_math_verify(what: str, otherwise: str) -> None:
    """Raise `ImportError` if math-verify, which `what` needs, is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError(
            f"{what} needs math-verify, which is not installed. Run: pip install 'trl-ext[math]', or {otherwise}."
        )


def math_answers(completions: Sequence[str]) -> list[str | None]:
    r"""
    The mathematical answer of each completion; completions with equal values get the same text.

    [math-verify](https://github.com/huggingface/Math-Verify) (the extra `math`) finds and compares them, as in TRL's
    `accuracy_reward`: the last `\boxed{}`, LaTeX or plain number.

    Args:
        completions (`Sequence[str]`):
            Completions of one question.

    Returns:
        `list[str | None]`: for each completion the text of the first answer that equals its own.

    Raises:
        ImportError: if math-verify is not installed.

    Example:

    ```python
    >>> math_answers(["so \\boxed{1/2}", "The answer is 0.5", "A: 3", "I do not know"])
    ['\\frac{1}{2}', '\\frac{1}{2}', '3', None]
    ```
    """
    check_math_verify("answers='math'", _OTHER_ANSWERS)
    from math_verify import parse, verify

    # math-verify limits its time by a signal, which only the main thread can receive; TRL handles it the same way
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    known: dict[str, list] = {}  # text of the first of equal answers -> what it was parsed to
    same: dict[str, str] = {}  # text of any answer -> text of the first that is equal to it
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
    r"""
    The value of the last number in each completion.

    - A minus counts if it stands directly before the number and does not follow a number, letter or bracket: "3-4" and
      "pages 3–4" end in 4, "x = -4" in -4.
    - Thousands may be separated by commas, apostrophes or narrow spaces: "1,234" is 1234. A comma between groups that
      are not of three digits separates the items of a list: "1,2,3" ends in 3.
    - A comma is a decimal comma only where no other reading is possible: "1.234,50", "0,5", and two digits beside a
      currency sign ("3,50 €"). Otherwise the decimal sign is the point.
    - Fractions are divided: "3/4", "2 1/2" and "\frac{3}{4}" are 0.75, 2.5 and 0.75. Dates such as 1/2/2024 are not.
      A minus belongs to the whole mixed number: "-2 1/2" and "-2\frac{1}{2}" are -2.5.
    - Currency and percent signs are ignored: "$5" and "5%" are 5. Exponents are read: "1.5e-3" is 0.0015.

    Example:

    >>> last_number(["He has 12 left.\nA: 1,234", "#### -3.50", "none", "pages 3-4"])
    [1234.0, -3.5, None, 4.0]
    """
    return [_last_number(completion) for completion in completions]


_GAP = "'\u2019\u00a0\u2009\u202f"  # apostrophes and spaces that do not break a line: between thousands
_CURRENCY = "$\u00a3\u20ac\u00a5"
_LATEX_FRACTION = re.compile(
    r"""
    (?:(?<=\d)(?P<space>[ \u2009]?))?                      # the whole number of a mixed one
    \\[cdt]?frac
    \s*(?:\{\s*(?P<above>-?[\d.]+)\s*\}|(?P<one>\d))       # {12} or, of one digit, 1
    \s*(?:\{\s*(?P<below>[\d.]+)\s*\}|(?P<other>\d))
    """,
    re.VERBOSE,
)
_NUMBER = re.compile(
    rf"""
    (?P<minus>(?<![\w)\]}}%.,\-\u2212\u2013])[-\u2212\u2013](?=[{_CURRENCY}]?\s?[.\d]))?   # not that of "3-4" or "x-1"
    (?P<before>[{_CURRENCY}]\s?)?
    (?P<digits>(?:(?<![\w.,])\.)?\d(?:[\d.,{_GAP}]*\d)?)
    (?P<exponent>[eE][+-]?\d+(?!\w))?
    (?P<after>\s?[{_CURRENCY}%])?
    (?:\s?/\s?(?P<below>\d+(?:\.\d+)?)(?!\s?/\s?\d|\d|[.,]\d))?
    """,
    re.VERBOSE,
)
_THOUSANDS = re.compile(rf"(\d{{1,3}}(?:,\d{{3}})+|\d{{1,3}}(?:[{_GAP}]\d{{3}})+)(\.\d+)?")  # 1,234.5
_POINT_THOUSANDS = re.compile(r"(\d{1,3}(?:\.\d{3})+),(\d+)|(\d{1,3}(?:\.\d{3}){2,})")  # 1.234,5 or 1.234.567


def _last_number(text: str) -> float | None:
    text = text.replace("{,}", ",").replace("\\,", "\u2009").replace("\\$", "$")  # LaTeX
    text = _LATEX_FRACTION.sub(_plain_fraction, text)
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    last = found[-1]
    digits = _value(last["digits"], last["before"], last["after"])
    value, whole, minus = float(f"{digits}{last['exponent'] or ''}"), 0.0, last["minus"]
    if last["below"] is not None:
        below = float(last["below"])
        if text[: last.start()].rstrip().endswith("/"):  # a date
            return below
        if below == 0:
            return 0.0  # not a fraction: the last number is the zero
        if len(found) > 1 and value < below and _is_whole_of(found[-2], last, text):
            whole, minus = float(_value(found[-2]["digits"], None, None)), found[-2]["minus"]
        value /= below
    return -(whole + value) if minus else whole + value


def _plain_fraction(found: re.Match[str]) -> str:
    above, below = found["above"] or found["one"], found["below"] or found["other"]
    return f"{'' if found['space'] is None else ' '}{above}/{below}"


def _is_whole_of(number: re.Match[str], fraction: re.Match[str], text: str) -> bool:
    """Whether a number and the fraction after it are one mixed number, such as "2 1/2"."""
    alone = number["below"] is None and number["exponent"] is None and number["after"] is None
    thousands = _THOUSANDS.fullmatch(number["digits"])
    whole = number["digits"].isdecimal() or (thousands is not None and thousands[2] is None)
    return alone and whole and text[number.end() : fraction.start()] == " " and fraction["minus"] is None


def _value(digits: str, before: str | None, after: str | None) -> str:
    """A written number in Python's notation; for a list its last item."""
    if (found := _THOUSANDS.fullmatch(digits)) is not None:
        return re.sub(rf"[,{_GAP}]", "", digits)
    if (found := _POINT_THOUSANDS.fullmatch(digits)) is not None:
        return f"{found[1].replace('.', '')}.{found[2]}" if found[1] else digits.replace(".", "")
    money = re.fullmatch(r"\d+,\d\d", digits) and ((before or "").strip() or (after or "").strip())
    if money or re.fullmatch(r"0,\d+", digits):
        return digits.replace(",", ".")
    digits = re.split(rf"[,{_GAP}]", digits)[-1]
    return digits if re.fullmatch(r"\d*\.?\d+", digits) else digits.rsplit(".", 1)[-1]  # versions and dates


def last_line(completions: Sequence[str]) -> list[str | None]:
    """
    The last line that is not empty, without spaces around it. Equal texts are equal answers.

    Example:

    >>> last_line(["because\\n  Paris \\n", ""])
    ['Paris', None]
    """
    lines = [completion.strip().splitlines() for completion in completions]
    return [text[-1].strip() if text else None for text in lines]


CANONICALISERS: dict[str, Canonicaliser] = {"math": math_answers, "number": last_number, "line": last_line}
