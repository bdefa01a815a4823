"""The page of a scored completion: nothing of the text is lost, colours follow scores, and markup stays text."""

import html
import re

import pytest

from trl_ext.scoring.view import to_html, to_text


PIECES = ["3 < 4 & so\n", "größe 🙂\n", "<script>alert(1)</script>", "rest"]
SCORES = [1.0, 0.5, 0.0, None]


def test_the_page_holds_the_text_and_no_markup_of_it():
    page = to_html(PIECES, SCORES, prompt="Is <b> so?\n", title="a & b")
    body = page.split("<body>")[1].split("</body>")[0]
    assert html.unescape(re.sub(r"<[^>]*>", "", body)) == "Is <b> so?\n" + "".join(PIECES)
    assert "<script" not in page and "http" not in page and "<title>a &amp; b</title>" in page


def test_colours_follow_scores():
    page = to_html(PIECES, SCORES)
    colours = [tuple(map(int, found)) for found in re.findall(r"rgb\((\d+), (\d+), (\d+)\)", page)]
    assert len(colours) == 3  # a piece without a score has none
    (red_1, green_1, _), _, (red_0, green_0, _) = colours
    assert green_1 > red_1 and red_0 > green_0
    assert re.findall(r'title="([^"]*)"', page) == ["1", "0.5", "0"]
    assert to_html(["a"], [-3.0], low=-1, high=1) == to_html(["a"], [-3.0], low=-3, high=1)  # cut at the ends


def test_text_puts_scores_behind_pieces():
    assert to_text(PIECES, [0.98, 0.5, 0.031, None]) == (
        "3 < 4 & so[0.98]\ngröße 🙂[0.50]\n<script>alert(1)</script>[0.03]rest"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], [0.1, 0.2]), "1 pieces and 2 scores"),
        ((["a"], [float("nan")]), "piece 0 is NaN"),
        ((["a"], [[0.1, 0.9]]), r"piece 0 is \[0.1, 0.9\].*take one for each token"),
        ((["a"], [0.1], 1.0, 1.0), "not below"),
    ],
)
def test_what_cannot_be_shown(arguments, message):
    pieces, scores, *ends = arguments
    with pytest.raises(ValueError, match=message):
        to_html(pieces, scores, **dict(zip(("low", "high"), ends, strict=False)))
