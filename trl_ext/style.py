"""The look of pages and pictures: their colours, the style sheet of a page, and the settings of matplotlib.

It knows nothing of what they show. matplotlib is optional, and is imported only by those that draw.
"""

import importlib.util
import io
from typing import Any


GREY = "#808590"
BLUE, ORANGE, GREEN = "#3b7dd8", "#e08a3c", "#3f9b63"
# The colours of low, middle and high scores behind a text, as red, green and blue from 0 to 255.
LOW, MIDDLE, HIGH = (244, 143, 137), (255, 244, 200), (142, 206, 141)

PICTURE_STYLE = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": GREY,
    "axes.titlesize": 11,
    "font.size": 10,
    "legend.frameon": False,
    "legend.labelcolor": GREY,
    "svg.hashsalt": "trl_ext",  # the same report gives the same file
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}

PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #ffffff; --faint: #666666; --line: #d0d0d0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181d; --faint: #a0a0a0; --line: #3a3d45; }
}
body { margin: 2rem auto; padding: 0 1rem; max-width: 60em; background: var(--paper); color: var(--ink);
  font: 1rem/1.9 system-ui, sans-serif; }
h1 { font-size: 1.2rem; line-height: 1.3; margin: 0 0 .8rem; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem .7rem; font-size: .85rem; line-height: 1.4;
  color: var(--faint); border-bottom: 1px solid var(--line); padding-bottom: .8rem; margin-bottom: 1rem; }
.bar { width: 14rem; max-width: 60vw; height: .9rem; border-radius: .2rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { color: var(--faint); }
.piece { color: #1c1c1c; border-radius: .2rem; padding: .1em 0; -webkit-box-decoration-break: clone;
  box-decoration-break: clone; }
.numbers .piece::after { content: attr(data-score); font-size: .7em; font-variant-numeric: tabular-nums;
  vertical-align: .35em; padding: 0 .35em; color: #444444; }
"""


def colour(share: float) -> tuple[int, int, int]:
    """A colour from red through pale yellow to green, as red, green and blue from 0 to 255."""
    start, end, part = (LOW, MIDDLE, 2 * share) if share < 0.5 else (MIDDLE, HIGH, 2 * share - 1)
    red, green, blue = (round(a + part * (b - a)) for a, b in zip(start, end, strict=True))
    return red, green, blue


def colour_bar() -> str:
    """The scale of `colour` as an element of a page with `PAGE_STYLE`."""
    stops = ", ".join("#{:02x}{:02x}{:02x}".format(*stop) for stop in (LOW, MIDDLE, HIGH))
    return (
        '<span class="bar" role="img" aria-label="red is low, green is high" '
        f'style="background: linear-gradient(90deg, {stops})"></span>'
    )


def matplotlib_is_there() -> bool:
    """Whether pictures can be made: matplotlib comes with `pip install "trl-ext[plots]"`."""
    return importlib.util.find_spec("matplotlib") is not None


def as_file(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    options = {"dpi": 144, "facecolor": "white"} if kind == "png" else {"transparent": True}
    figure.savefig(buffer, format=kind, metadata=None if kind == "png" else {"Date": None}, **options)
    return buffer.getvalue()
