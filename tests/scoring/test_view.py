"""The page of a scored completion: nothing of the text is lost, colours follow scores, and markup stays text."""

import html
import re

import pytest

from trl_ext.scoring.view import choose_scale, to_html, to_text


PIECES = ["3 < 4 & so\n", "größe 🙂\n", "<script>alert(1)</script>", "rest"]
SCORES = [1.0, 0.5, 0.0, None]


def test_the_page_holds_the_text_and_no_markup_of_it():
    page = to_html(PIECES, SCORES, prompt="Is <b> so?\n", title="a & b")
    body = page.split('<div class="text numbers">')[1].split("</div>")[0]
    assert html.unescape(re.sub(r"<[^>]*>", "", body)) == "Is <b> so?\n" + "".join(PIECES)
    assert "<script" not in page and "http" not in page and "<title>a &amp; b</title>" in page
    assert "<h1>a &amp; b</h1>" in page


def test_colours_follow_scores():
    page = to_html(PIECES, SCORES)
    colours = [tuple(map(int, found)) for found in re.findall(r"rgb\((\d+), (\d+), (\d+)\)", page)]
    assert len(colours) == 3  # a piece without a score has none
    (red_1, green_1, _), _, (red_0, green_0, _) = colours
    assert green_1 > red_1 and red_0 > green_0
    assert re.findall(r'title="([^"]*)"', page) == ["1", "0.5", "0"]
    cut, whole = (re.findall(r"rgb.*?\)", to_html(["a"], [-3.0], low=low, high=1)) for low in (-1, -3))
    assert cut == whole  # cut at the ends


def legend(page):
    return re.sub(r"<[^>]*>", "|", page.split('<div class="legend">')[1].split("</div>")[0])


def test_the_scale_follows_the_kind_of_score():
    assert choose_scale([0.2, None, 1.0]) == (0, 1, "probability")
    assert choose_scale([0.2, 3.4]) == (-4, 4, "score")
    assert choose_scale([0.2, 0.4], "log_odds") == (-1, 1, "log_odds")
    assert choose_scale([-7.5], "log_odds", high=2) == (-8, 2, "log_odds")
    with pytest.raises(ValueError, match="kind='logit' is not known. Needed: 'probability', 'log_odds', 'score'"):
        to_html(["a"], [0.5], kind="logit")
    page = to_html(["a", "b", "c"], [-2.5, 0.0, 2.5], kind="log_odds")
    assert "log-odds||-3|" in legend(page) and "|3|" in legend(page)
    colours = [tuple(map(int, found)) for found in re.findall(r"rgb\((\d+), (\d+), (\d+)\)", page)]
    assert colours[0][0] > colours[0][1] and colours[2][1] > colours[2][0]  # not all red, as on a scale from 0 to 1
    assert "no score" not in legend(page) and "prompt" not in legend(page)
    assert "no colour: no score" in legend(to_html(["a"], [None], prompt="p"))


def test_numbers_are_beside_the_text_and_no_part_of_it():
    page = to_html(PIECES, SCORES)
    assert re.findall(r'data-score="([^"]*)"', page) == ["1.00", "0.50", "0.00"]
    assert '<div class="text numbers">' in page and "prefers-color-scheme: dark" in page
    assert '<div class="text">' in to_html(PIECES, SCORES, numbers=False)
    assert '<div class="text">' in to_html(["a"] * 100, [0.5] * 100)  # of so many tokens they would hide the text


def test_text_puts_scores_behind_pieces():
    assert to_text(PIECES, [0.98, 0.5, 0.031, None]) == (
        "3 < 4 & so[0.98]\ngröße 🙂[0.50]\n<script>alert(1)</script>[0.03]rest"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], [0.1, 0.2]), "1 pieces and 2 scores"),
        ((["a"], [float("nan")]), "piece 0 is NaN"),
        ((["a"], [[0.1, 0.9]]), r"piece 0 is \[0.1, 0.9\].*choose one for each token"),
        ((["a"], [0.1], 1.0, 1.0), "not below"),
    ],
)
def test_what_cannot_be_shown(arguments, message):
    pieces, scores, *ends = arguments
    with pytest.raises(ValueError, match=message):
        to_html(pieces, scores, **dict(zip(("low", "high"), ends, strict=False)))
