"""One HTML page of a report: nothing is loaded from a network, and it reads on a phone, on paper and in the dark.

It knows a report and how to write HTML.
"""

import html
import math
from collections.abc import Iterator, Sequence

import numpy as np

from trl_ext.evaluation.report.figures import draw
from trl_ext.evaluation.report.findings import Findings, Mistake, number
from trl_ext.style import matplotlib_is_there


_STYLE = """
:root { color-scheme: light dark; --text: #1c2128; --soft: #5b6470; --line: #d6dae0; --page: #ffffff; --card: #f6f7f9;
  --good: #2f8f57; --look: #b7791f; --bad: #c8443c; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --soft: #9aa3ae; --line: #3a414b; --page: #15181c;
  --card: #1e2329; --good: #58b987; --look: #d9a441; --bad: #e5726b; } }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.soft { color: var(--soft); font-size: .9rem; }
ul.summary { list-style: none; padding: 0; } ul.summary li { margin: .5rem 0; padding: .5rem .75rem;
  background: var(--card); border-left: .3rem solid; border-radius: .2rem; }
.good { border-color: var(--good) !important; } .look { border-color: var(--look) !important; }
.bad { border-color: var(--bad) !important; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th + th { text-align: right; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; } .figures svg { width: 100%; height: auto; }
details { margin: .5rem 0; padding: .5rem .75rem; background: var(--card); border-radius: .2rem; break-inside: avoid; }
summary { cursor: pointer; } pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: .25rem 0; }
.candidate { border-left: .3rem solid; padding-left: .5rem; margin: .5rem 0; }
.token { border-radius: .15rem; }
@media print { :root { color-scheme: light; --text: #1c2128; --soft: #5b6470; --line: #d6dae0; --page: #ffffff;
  --card: #f6f7f9; font-size: 11px; } details::details-content { content-visibility: visible; height: auto; }
  h2, h2 + .soft, summary { break-after: avoid; } details { break-inside: auto; }
  figure, tr, .candidate { break-inside: avoid; } .wide { overflow: visible; } table { font-size: .82rem; }
  ul.summary li { break-inside: avoid; }
  ul.summary li, .candidate, .token { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""

_WORDS = {"good": "Good", "look": "Look", "bad": "Bad"}

# Characters of a completion that are shown; texts of thousands of tokens would hide the rest of the page.
SHOWN = 1_500


def to_html(report: Findings) -> str:
    """The page as text."""
    title = f"Evaluation of {report.model}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(_sections(report)) + "\n</body></html>\n"
    )


def _sections(report: Findings) -> Iterator[str]:
    settings = report.settings
    data = ", ".join(settings.get("datasets", [])) or "one data set"
    yield (
        f'<p class="soft">{settings.get("rows", 0)} rows ({html.escape(data)}), seed {settings.get("seed", 0)}, '
        f"{settings.get('seconds', 0)} seconds, of which {settings.get('seconds_scoring', 0)} for the model.</p>"
    )
    yield '<ul class="summary">'
    for verdict in report.verdicts:
        advice = f'<br><span class="soft">{html.escape(verdict.advice)}</span>' if verdict.advice else ""
        mark = f"<b>{_WORDS[verdict.level]}.</b> "  # not by colour alone
        yield f'<li class="{verdict.level}">{mark}{html.escape(verdict.reason)}{advice}</li>'
    yield "</ul>"
    if matplotlib_is_there():
        pictures = draw(report, "svg")
        if pictures:
            body = "".join(f"<figure>{_svg(picture.decode())}</figure>" for picture in pictures.values())
            yield f'<h2>Pictures</h2><div class="figures">{body}</div>'
    else:
        install = '<code>pip install "trl-ext[plots]"</code>'
        yield f'<p class="soft">There are no pictures here: install matplotlib with {install}.</p>'
    yield "<h2>Metrics</h2>"
    yield (
        f'<p class="soft">Intervals hold {report.level()} of the bootstrap samples of prompts. Detectable: the '
        "smallest true difference that this sample shows with 80 % power.</p>"
    )
    yield _table(("metric", "value", "interval", "detectable", "n"), report.rows())
    if report.probes:
        yield "<h2>Bias probes</h2>"
        yield '<p class="soft">The same completions with one feature changed. Effects are in sd of the score.</p>'
        says = {probe.name: probe.says for probe in report.probes}
        rows = [(f"{row[0]}: {says[row[0]]}", *row[1:]) for row in report.probe_rows()]
        yield _table(("probe", "effect", "interval", "p", "n", "bias"), rows)
    if report.compared:
        yield f"<h2>Compared with {html.escape(str(report.compared['model']))}</h2>"
        yield _table(("metric", "difference", "interval", "p"), report.comparison_rows())
    if report.omitted:
        lost = ", ".join(f"{count} {reason}" for reason, count in report.omitted.items())
        yield f"<h2>Rows that do not count</h2><p>{html.escape(lost)}</p>"
    if report.mistakes:
        yield f"<h2>The {len(report.mistakes)} worst mistakes</h2>"
        if any(mistake.tokens for mistake in report.mistakes):
            yield '<p class="soft">Tokens are green where their score is high, red where it is low.</p>'
        yield from (_mistake(mistake) for mistake in report.mistakes)


def _mistake(mistake: Mistake) -> str:
    scores = [score for _, score, _ in mistake.completions]
    low, high = (0.0, 1.0) if mistake.family == "stepwise" else (min(scores), max(scores))
    tokens = mistake.tokens or [None] * len(scores)
    ends = _range([score for row in mistake.tokens or [] for _, score in row])
    parts = []
    for (text, score, rating), own in zip(mistake.completions, tokens, strict=True):
        what = f"score {number(score)}" + ("" if math.isnan(rating) else f", label {number(rating)}")
        shown = html.escape(text if len(text) <= SHOWN else text[:SHOWN] + " ...")
        shown = shown if own is None else _coloured(own, *ends)
        parts.append(
            f'<div class="candidate" style="border-color: {_hue(score, low, high)}"><span class="soft">{what}</span>'
            f"<pre>{shown}</pre></div>"
        )
    prompt = mistake.prompt if len(mistake.prompt) <= SHOWN else "... " + mistake.prompt[-SHOWN:]
    return (
        f"<details><summary>Row {mistake.row}, {mistake.family}, margin {number(mistake.margin)}</summary>"
        f'<pre class="soft">{html.escape(prompt)}</pre>{"".join(parts)}</details>'
    )


def _coloured(tokens: Sequence[tuple[str, float]], low: float, high: float) -> str:
    """Tokens on a background from red to green; the score is in the tooltip."""
    parts, length = [], 0
    for text, score in tokens:
        if length > SHOWN:
            return "".join(parts) + " ..."
        colour = f"{_hue(score, low, high)[:-1]} / .35)"
        parts.append(
            f'<span class="token" style="background: {colour}" title="{number(score)}">{html.escape(text)}</span>'
        )
        length += len(text)
    return "".join(parts)


def _range(scores: Sequence[float]) -> tuple[float, float]:
    """The ends of the colours: the outer 2 % on either side do not stretch them."""
    return tuple(np.quantile(scores, [0.02, 0.98]).tolist()) if scores else (0.0, 0.0)


def _hue(score: float, low: float, high: float) -> str:
    share = min(1.0, max(0.0, (score - low) / (high - low))) if high > low else 0.5
    return f"hsl({120 * share:.0f} 45% 50%)"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = [[f"<td>{html.escape(row[0])}</td>", *map(_cell, row[1:])] for row in rows]
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    """A number stands right; a sentence, such as why there is no interval, stands left and wraps."""
    return f"<td class={'n' if len(text) < 24 else 'text'}>{html.escape(text)}</td>"


def _svg(text: str) -> str:
    """The picture without the XML declaration, which has no place inside a page."""
    return text[text.index("<svg") :]
