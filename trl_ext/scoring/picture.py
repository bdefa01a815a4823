"""A scored completion as a PNG: the text in a grid of cells, each piece on the colour of its score, and a legend.

Knows texts, numbers and matplotlib (the extra `plots`), which it imports when it draws. Knows nothing of models.
"""

import logging
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from trl_ext.scoring.view import colour, shares


logger = logging.getLogger(__name__)

FONT = "DejaVu Sans Mono"  # comes with matplotlib
FONT_SIZE, DPI = 11, 120
LINE = 1.55  # height of a line, in heights of the font
MARGIN, LEGEND = 2, 3  # cells around the text; lines below it
MOST_LINES = 1000
GREY = "#777777"


class Cell(NamedTuple):
    """A character with the marks on it."""

    text: str
    width: int  # 1, or 2 for wide characters (CJK, emoji)
    piece: int  # -1 for the prompt


def to_png(
    path: str | Path,
    pieces: Sequence[str],
    scores: Sequence[float | None],
    *,
    prompt: str = "",
    low: float = 0.0,
    high: float = 1.0,
    title: str = "Scored completion",
    numbers: bool = False,
    columns: int = 96,
) -> None:
    """
    Draw a scored completion, wrapped between words.

    Characters for which no installed font has a sign are drawn as a box, and a warning names them.

    Args:
        path (`str` or `Path`): the file to write.
        pieces, scores, prompt, low, high, title: as in [`~trl_ext.scoring.view.to_html`].
        numbers (`bool`, *optional*, defaults to `False`): write each score behind its piece; for steps and segments.
        columns (`int`, *optional*, defaults to `96`): characters of a line.

    Raises:
        `ImportError`: matplotlib is not installed.
        `ValueError`: as in `to_html`; fewer than 20 columns; or a text of more than 1,000 lines.

    Example:

    ```python
    (scores,) = scorer.score_tokens([prompt], [completion])
    (texts,) = scorer.token_texts([prompt], [completion])
    to_png("tokens.png", texts, scores, prompt=prompt, low=-3, high=3)  # log-odds
    ```
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "A picture needs matplotlib: pip install 'trl-ext[plots]'. `to_html` needs nothing."
        ) from error
    places = shares(pieces, scores, low, high)
    if columns < 20:
        raise ValueError(f"columns={columns}; needed: at least 20.")
    cells = list(_cells(prompt, -1))
    for number, (piece, score) in enumerate(zip(pieces, scores, strict=True)):
        behind = f" {score:.2f} " if numbers and score is not None else ""
        text = piece.rstrip("\n")
        cells += [*_cells(text, number), *_cells(behind, -1), *_cells(piece[len(text) :], number)]
    lines = _wrap(cells, columns)
    if len(lines) > MOST_LINES:
        raise ValueError(f"The text has {len(lines)} lines; a picture has at most {MOST_LINES}. Use to_html.")

    width, height = _cell_size()
    rows = (len(lines) + LEGEND + 2) * LINE
    figure = Figure(figsize=((columns + 2 * MARGIN) * width / DPI, rows * height / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-MARGIN, columns + MARGIN), ylim=(rows / LINE, 0))
    axes.axis("off")
    fonts = _Fonts("".join(cell.text for cell in cells) + title)
    axes.text(0, 0.75, fonts.drawable(title), **fonts.style(title), fontweight="bold", va="center", parse_math=False)
    for number, line in enumerate(lines, start=2):
        column = 0
        for run in _runs(line, fonts):
            first = run[0]
            size = sum(cell.width for cell in run)
            share = places[first.piece] if first.piece >= 0 else None
            if share is not None:
                axes.axhspan(
                    number - 0.5, number + 0.5,
                    (column + MARGIN) / (columns + 2 * MARGIN), (column + size + MARGIN) / (columns + 2 * MARGIN),
                    color=[part / 255 for part in colour(share)], linewidth=0,
                )  # fmt: skip
            text = "".join(cell.text for cell in run)
            ink = "black" if first.piece >= 0 else GREY
            axes.text(
                column, number, fonts.drawable(text), **fonts.style(text), color=ink,
                va="center_baseline", parse_math=False,
            )  # fmt: skip
            column += size
    _draw_legend(axes, len(lines) + 3, low, high, prompt)
    FigureCanvasAgg(figure).print_png(path)


# -------------------------------------------------------------------------------------------------------------- layout
def _cells(text: str, piece: int) -> Iterator[Cell]:
    """One cell for each character that takes room; marks stay with the character before them."""
    waiting = ""
    for character in text.replace("\r\n", "\n").replace("\t", "    "):
        joins = unicodedata.category(character) in ("Mn", "Me", "Cf")
        if joins:
            waiting += character
            continue
        if waiting:
            yield _cell(waiting, piece)
        shown = character == "\n" or unicodedata.category(character)[0] != "C"
        waiting = character if shown else "\N{REPLACEMENT CHARACTER}"
    if waiting:
        yield _cell(waiting, piece)


def _cell(text: str, piece: int) -> Cell:
    return Cell(text, 2 if unicodedata.east_asian_width(text[0]) in "WF" else 1, piece)


def _wrap(cells: list[Cell], columns: int) -> list[list[Cell]]:
    """Lines of at most `columns` cells, broken behind a space if there is one; a line break is a cell of its own."""
    lines: list[list[Cell]] = [[]]
    for cell in cells:
        if cell.text == "\n":
            lines[-1].append(cell._replace(text="\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"))
            lines.append([])
            continue
        line = lines[-1]
        if sum(other.width for other in line) + cell.width > columns - 1:  # one is kept for the sign of a line break
            cut = max((place for place, other in enumerate(line, start=1) if other.text == " "), default=len(line))
            lines[-1], rest = line[:cut], line[cut:]
            lines.append(rest)
        lines[-1].append(cell)
    return lines if lines[-1] else lines[:-1]


def _runs(line: list[Cell], fonts: "_Fonts") -> Iterator[list[Cell]]:
    """Neighbours of one piece that can be drawn as one string: single characters of the main font."""
    run: list[Cell] = []
    for cell in line:
        alone = len(cell.text) > 1 or cell.width > 1 or not fonts.is_main(cell.text)
        if run and (alone or run[0].piece != cell.piece or len(run[-1].text) > 1 or not fonts.is_main(run[-1].text)):
            yield run
            run = []
        run.append(cell)
    if run:
        yield run


def _cell_size() -> tuple[float, float]:
    """Width and height of a character, in pixels."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(FONT))
    font.set_size(FONT_SIZE, DPI)
    return font.load_char(ord("0")).linearHoriAdvance / 65536, FONT_SIZE * DPI / 72


def _draw_legend(axes, line: float, low: float, high: float, prompt: str) -> None:
    """The colours from low to high, with the numbers at their ends."""
    size, start = 24, 10
    style = {"family": FONT, "fontsize": FONT_SIZE, "va": "center", "color": GREY}
    axes.text(start - 1, line, f"{low:g}", ha="right", **style)
    for step in range(size):
        red, green, blue = (part / 255 for part in colour(step / (size - 1)))
        axes.fill_between(
            [start + step, start + step + 1], line - 0.4, line + 0.4, color=(red, green, blue), linewidth=0
        )
    note = "   grey: prompt and scores" if prompt else ""
    axes.text(start + size + 1, line, f"{high:g}   no colour: no score{note}", **style)


# --------------------------------------------------------------------------------------------------------------- fonts
class _Fonts:
    """Which installed font draws which character of a text."""

    def __init__(self, text: str):
        from matplotlib.font_manager import findfont, fontManager, get_font

        self._main = set(get_font(findfont(FONT)).get_charmap())
        missing = {ord(character) for character in text} - self._main - {ord("\n")}
        self._others: dict[int, str] = {}
        for entry in fontManager.ttflist if missing else []:
            if entry.name.startswith("Last Resort"):  # boxes for everything
                continue
            for found in missing & set(get_font(entry.fname).get_charmap()):
                self._others.setdefault(found, entry.name)
            missing -= self._others.keys()
        self._missing = missing
        if missing:
            names = " ".join(f"U+{code:04X}" for code in sorted(missing)[:10])
            logger.warning(f"No installed font draws {len(missing)} characters, shown as boxes: {names} ...")

    def is_main(self, text: str) -> bool:
        """Whether the main font draws all of it."""
        return all(ord(character) in self._main for character in text)

    def drawable(self, text: str) -> str:
        """The text with a box for each character that has no font."""
        return "".join("\N{WHITE SQUARE}" if ord(character) in self._missing else character for character in text)

    def style(self, text: str) -> dict:
        """Keyword arguments for a text: the main font, and after it those that fill its gaps."""
        others = dict.fromkeys(self._others[ord(c)] for c in text if ord(c) in self._others)
        return {"family": [FONT, *others], "fontsize": FONT_SIZE}
