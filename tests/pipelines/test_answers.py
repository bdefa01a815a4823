"""Answers read off completions: what is the last number of a text, and what is missing is said before it is needed."""

import pytest

from trl_ext.pipelines.answers import last_line, last_number, load_answers, math_answers


NUMBERS = {
    # ranges, subtractions and words end without a minus; signs stand directly before a number
    "pages 3-4": 4.0,
    "pages 3\u20134": 4.0,
    "5-3": 3.0,
    "5 - 3": 3.0,
    "COVID-19": 19.0,
    "x-1": 1.0,
    "f(2)-1": 1.0,
    "#### -3.50": -3.5,
    "x = -4": -4.0,
    "x=\u22124": -4.0,
    "(-7)": -7.0,
    "(3, -4)": -4.0,
    "between 3 and -4": -4.0,
    # lists and thousands
    "1,2,3": 3.0,
    "1, 2, 3": 3.0,
    "[1,22,333]": 333.0,
    "1,200,30": 30.0,
    "A: 1,234": 1234.0,
    "12,345,678.90": 12345678.9,
    "-1,234": -1234.0,
    "the total is 1,000,000!": 1e6,
    "1'234.50": 1234.5,
    "1\u202f234": 1234.0,
    "1.234.567": 1234567.0,
    r"\boxed{1{,}234}": 1234.0,
    # decimals
    "1.234,56": 1234.56,
    "0,5": 0.5,
    "is .5": 0.5,
    "...5": 5.0,
    "3.": 3.0,
    "version 1.2.3": 3.0,
    "12.05.2024": 2024.0,
    "1.5e-3": 0.0015,
    # percent and currency
    "50%": 50.0,
    "12.5 %": 12.5,
    "12,50 %": 12.5,
    "$1,234.50": 1234.5,
    "-$5": -5.0,
    "$-5": -5.0,
    "3,50 \u20ac": 3.5,
    "\u20ac3,50": 3.5,
    r"\$18": 18.0,
    # fractions, and what is none
    "1/2": 0.5,
    "2 1/2": 2.5,
    "3/4 of 12": 12.0,
    "1/2, 3/4": 0.75,
    r"\boxed{-\frac{1}{2}}": -0.5,
    r"\frac12": 0.5,
    r"\dfrac{3}4": 0.75,
    # mixed numbers
    r"2\frac{1}{2}": 2.5,
    r"1\frac{3}{4}": 1.75,
    r"\boxed{-2\frac{1}{2}}": -2.5,
    r"2\,\tfrac12": 2.5,
    "-2 1/2": -2.5,
    "-$2 1/2": -2.5,
    "1,234 1/2": 1234.5,
    "-1,234 1/2": -1234.5,
    "1,234.5 1/2": 0.5,
    "5-2 1/2": 2.5,
    "from 2 -1/2": -0.5,
    "10 3/2": 1.5,
    "1.5 1/2": 0.5,
    "x, 1/2 3/4": 0.75,
    r"5/6\frac{1}{2}": 0.5,
    "on 1/2/2024": 2024.0,
    "5/0": 0.0,
    # no number
    "": None,
    "none": None,
    "A: -": None,
}


@pytest.mark.parametrize(("text", "number"), NUMBERS.items())
def test_the_last_number_of_a_text(text, number):
    assert last_number([text]) == [number if number is None else pytest.approx(number)]


def test_math_groups_equal_values():
    pytest.importorskip("math_verify")
    texts = ["so \\boxed{1/2}", "The answer is 0.5", "A: 3", "I do not know", "$x = 3$", "\\boxed{\\frac{2}{4}}"]
    answers = math_answers(texts)
    assert answers[0] == answers[1] == answers[5] and answers[2] == answers[4] and answers[3] is None
    assert len(set(answers)) == 3


def test_number_and_line():
    assert last_number(["12 left.\nA: 1,234", "#### -3.50", "none", "3."]) == [1234.0, -3.5, None, 3.0]
    assert last_line(["because\n  Paris \n", "", " \n"]) == ["Paris", None, None]


def test_a_missing_package_is_said_with_another_way(without_math_verify):
    with pytest.raises(ImportError, match=r"answers='math' needs math-verify.*'trl-ext\[math\]'.*--answers number"):
        load_answers("math")
    with pytest.raises(ImportError, match="needs math-verify"):
        math_answers(["1"])
    assert load_answers("number") is last_number and load_answers(last_line) is last_line
    with pytest.raises(ValueError, match="answers='words'; needed: a function or one of math, number, line"):
        load_answers("words")
