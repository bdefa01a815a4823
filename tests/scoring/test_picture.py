"""The PNG of a scored completion: every character is in it, lines are not too long, and colours follow scores."""

import logging
import random
import sys

import pytest

from trl_ext.scoring.picture import _cells, _wrap, to_png
from trl_ext.scoring.view import colour


pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")

STEPS = ["Half of $100 is <<100/2=50>>$50.\n", "größe: 100 % e\u0301\tkm\n", "\n", "So 7.\x07\nA: 7"]


def pixels(path):
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(int)


def share_of(image, wanted: tuple[int, int, int]) -> float:
    return (abs(image - wanted).max(-1) <= 2).mean()


def test_colours_follow_scores(tmp_path):
    shares = {}
    for score in (0.0, 1.0, None):
        to_png(tmp_path / "a.png", ["some text"], [score])
        image = pixels(tmp_path / "a.png")
        shares[score] = [share_of(image, colour(end)) for end in (0.0, 1.0)]
    (red, green), plain = zip(shares[0.0], shares[1.0], strict=True), shares[None]
    assert red[0] > 2 * plain[0] > 0 and red[1] == pytest.approx(plain[0])  # the legend has both ends
    assert green[1] > 2 * plain[1] > 0 and green[0] == pytest.approx(plain[1])


def test_what_is_drawn_is_kept_in_lines_of_the_width(tmp_path):
    text = "".join(random.Random(0).choices("ab \n\u0301語", weights=[6, 6, 3, 1, 1, 1], k=900)).lstrip("\u0301")
    lines = _wrap(list(_cells(text, 0)), 30)
    assert all(sum(cell.width for cell in line) <= 30 for line in lines)
    assert "".join(cell.text for line in lines for cell in line).replace("↵", "\n") == text
    # words stay whole where they fit
    lines = _wrap(list(_cells("one two three four five six seven", 0)), 20)
    assert ["".join(cell.text for cell in line) for line in lines] == ["one two three four ", "five six seven"]
    to_png(tmp_path / "a.png", [text], [0.5], columns=30)
    assert pixels(tmp_path / "a.png").shape[1] < 34 * 14


def test_prompt_numbers_and_odd_characters(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        to_png(tmp_path / "a.png", STEPS, [0.98, None, 0.5, 0.0], prompt="What is $x$?\n", numbers=True, title="$a_b$")
        assert not caplog.records
        to_png(tmp_path / "b.png", ["\U000f1234 x"], [0.3])
    assert "U+F1234" not in caplog.text  # not a character at all: shown as a replacement
    heights = [pixels(tmp_path / name).shape[0] for name in ("a.png", "b.png")]
    assert heights[0] > heights[1] + 100


def test_characters_without_a_font_are_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        to_png(tmp_path / "a.png", ["\U00013000 x"], [0.3])  # an Egyptian hieroglyph
    assert not caplog.text or "U+13000" in caplog.text  # a machine may have the font


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["a"], [0.1, 0.2]), {}, "1 pieces and 2 scores"),
        ((["a"], [0.1]), {"columns": 5}, "at least 20"),
        ((["a\n" * 1001], [0.1]), {}, "1001 lines"),
    ],
)
def test_what_cannot_be_drawn(tmp_path, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        to_png(tmp_path / "a.png", *arguments, **options)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'trl-ext\[plots\]'"):
        to_png(tmp_path / "a.png", ["a"], [0.1])
