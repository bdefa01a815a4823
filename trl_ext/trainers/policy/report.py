"""`policy_report`: a page about a policy in training, with curves, and with completions coloured by their advantages.

It reads what `DenseGRPOTrainer` and `PPOTrainer` log, and the completions that they keep in
`completions/advantages.jsonl` with `log_completions=True`. It loads no model.
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from trl_ext.style import PAGE_STYLE, colour, colour_bar, matplotlib_is_there
from trl_ext.trainers.policy.pictures import CURVES, curve, draw, metrics_of
from trl_ext.trainers.policy.watch import SAMPLES


PAGE = "policy.html"
# Of a completion with more tokens than `LONG`, the page shows so many of the first and last ones.
LONG, FIRST, LAST = 1200, 800, 300

_CSS = """
body { max-width: 72em; line-height: 1.6; }
h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
.note { color: var(--faint); font-size: .85rem; line-height: 1.5; margin: .3rem 0; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: .8rem; }
.pictures img { width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.5; margin-bottom: 1.5rem; }
th, td { text-align: left; padding: .15rem 1rem .15rem 0; border-bottom: 1px solid var(--line); font-weight: normal; }
th { color: var(--faint); }
td.unit { color: var(--faint); }
td + td:not(.unit), th + th { text-align: right; font-variant-numeric: tabular-nums; }
.box { border-left: 3px solid var(--line); padding: 0 0 0 .9rem; margin: .2rem 0 1.2rem; }
.box.prompt { max-height: 16rem; overflow: auto; }
.text { line-height: 1.9; }
.piece.rewarded { border-bottom: 2px solid #2f6fca; }
.piece[data-mark]::after { content: attr(data-mark); font-size: .75em; opacity: .65; }
.gap { color: var(--faint); font-style: italic; }
.swatch { border-bottom: 2px solid #2f6fca; padding: 0 .2rem; }
"""


def policy_report(folder: str | Path, history: Sequence[Mapping[str, Any]] | None = None) -> Path:
    """
    Write `policy.html`, and a PNG for each picture where matplotlib is installed, into a trainer's output folder.

    The page has curves of the reward, the verifier, the dense rewards, the critic, the KL divergence, clipping, the
    trends of the hacking watch, lengths, steps and repetition. It shows the reward by position of the step, the share
    of completions by their first low step, and the completions that were kept last, coloured token by token.

    Args:
        folder (`str` or `Path`): the trainer's `output_dir`.
        history (`Sequence[Mapping]`, *optional*):
            The trainer's `state.log_history`. By default it is read from `trainer_state.json`, which
            `trainer.save_state()` and checkpoints write.

    Returns:
        `Path`: the page.

    Raises:
        FileNotFoundError: `history` is left out, and neither the folder nor a checkpoint in it has a
            `trainer_state.json`.

    Example:

    ```python
    trainer.train()
    print(policy_report("outputs/ppo", trainer.state.log_history))  # outputs/ppo/policy.html
    ```
    """
    folder = Path(folder)
    history = _saved_history(folder) if history is None else history
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(history, "png", "svg")
    for name, files in pictures.items():
        (folder / f"{name}.png").write_bytes(files["png"])
    page = folder / PAGE
    page.write_text(
        _page(
            "Training of a policy",
            _table(history),
            _shown({name: files["svg"] for name, files in pictures.items()}),
            "<h2>Completions and the advantages of their tokens</h2>",
            _completions(_last_samples(folder / "completions" / SAMPLES)),
        ),
        encoding="utf-8",
    )
    return page


def completions_page(samples: Sequence[Mapping[str, Any]]) -> str:
    """
    A page with completions of one training step, each token coloured by its advantage.

    Args:
        samples (`Sequence[Mapping]`): rows of `advantages.jsonl`, see `trl_ext.trainers.policy.watch.samples_of`.
    """
    return _page("Completions and the advantages of their tokens", _completions(samples))


def _page(title: str, *parts: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{PAGE_STYLE}{_CSS}</style></head>\n<body><h1>{title}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _saved_history(folder: Path) -> list[dict[str, Any]]:
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for place in (folder, *reversed(checkpoints)):
        file = place / "trainer_state.json"
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))["log_history"]
    raise FileNotFoundError(
        f"{folder} holds no trainer_state.json. Needed: the output folder of a trainer that saved a checkpoint, or "
        "called `trainer.save_state()`; or pass `trainer.state.log_history` as `history`."
    )


def _table(history: Sequence[Mapping[str, Any]]) -> str:
    """The first and the last logged value of each metric that the pictures show."""
    found = {}
    for name, each in CURVES.items():
        metrics = metrics_of(name, history)
        for metric, label in metrics.items():
            title = f"{each.title}: {label}" if len(metrics) > 1 or name == "reward" else each.title
            found[title, each.axis] = curve(history, metric)
    rows = [(title, points[0], points[-1]) for title, points in found.items() if points]
    if not rows:
        return '<p class="note">Nothing was logged. Set `logging_steps` below the number of training steps.</p>'
    lines = "".join(
        f'<tr><td>{html.escape(title)}</td><td>{first:.4g}</td><td>{last:.4g}</td><td class="unit">{axis}</td></tr>'
        for (title, axis), (_, first), (_, last) in rows
    )
    begin, end = min(step for _, (step, _), _ in rows), max(step for _, _, (step, _) in rows)
    return (
        f"<table><thead><tr><th>metric</th><th>step {begin}</th><th>step {end}</th><th></th></tr></thead>"
        f"<tbody>{lines}</tbody></table>"
    )


def _shown(pictures: Mapping[str, bytes]) -> str:
    if not matplotlib_is_there():
        return '<p class="note">There are no pictures here: install matplotlib.</p>'
    images = "".join(
        f'<img alt="{name}" src="data:image/svg+xml;base64,{base64.b64encode(picture).decode()}">'
        for name, picture in pictures.items()
    )
    return f'<div class="pictures">{images}</div>'


def _last_samples(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["step"] == rows[-1]["step"]]


def _completions(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return '<p class="note">No completions were kept. Train with log_completions=True.</p>'
    sizes = sorted(abs(advantage) for sample in samples for advantage in sample["advantages"])
    # a few extreme tokens do not make all others pale
    end = (sizes[int(0.98 * (len(sizes) - 1))] or sizes[-1]) if sizes else 0.0
    parts = [
        f'<div class="legend"><span>advantage {-end:.2g} (less likely)</span>{colour_bar()}'
        f"<span>{end:.2g} (more likely)</span>"
        '<span><span class="swatch">blue line</span>: a token with a reward</span>'
        f"<span>training step {samples[0]['step']}; rest the pointer on a token for its numbers</span></div>"
    ]
    if end == 0:
        parts.append('<p class="note">All advantages are 0: the completions of each prompt were equally good.</p>')
    number = 0
    for prompt, group in groupby(samples, key=lambda sample: sample["prompt"]):
        parts.append(f'<p class="note">Prompt</p><div class="box text prompt">{html.escape(prompt)}</div>')
        for sample in group:
            number += 1
            parts.append(f'<p class="note">Completion {number}: {_facts(sample)}</p>')
            parts.append(f'<div class="box text">{_pieces(sample, end or 1.0)}</div>')
    return "\n".join(parts)


def _facts(sample: Mapping[str, Any]) -> str:
    rewards = [reward for reward in sample["rewards"] if reward is not None]
    facts = [f"{len(sample['pieces'])} tokens"]
    if sample.get("reward") is not None:
        facts.append(f"scalar reward {sample['reward']:.3g}")
    if rewards:
        several = "s" if len(rewards) > 1 else ""
        facts.append(f"{len(rewards)} dense reward{several}, lowest {min(rewards):.3g}, sum {sum(rewards):.3g}")
    return ", ".join(facts)


def _pieces(sample: Mapping[str, Any], end: float) -> str:
    """The tokens of a completion, coloured by advantages from `-end` to `end`. Equal neighbours form one element."""
    names = ("pieces", "advantages", "rewards")
    values = sample.get("values") or [None] * len(sample["pieces"])
    tokens = list(zip(*(sample[name] for name in names), values, strict=True))
    if len(tokens) <= LONG:
        return _joined(tokens, end, ends=True)
    left_out = len(tokens) - FIRST - LAST
    gap = f'<span class="gap"> ... {left_out:,} tokens are not shown ... </span>'
    return _joined(tokens[:FIRST], end, ends=False) + gap + _joined(tokens[-LAST:], end, ends=True)


def _joined(tokens: Sequence[tuple[str, float, float | None, float | None]], end: float, ends: bool) -> str:
    spans, start = [], 0
    while start < len(tokens):
        text, advantage, reward, value = tokens[start]
        stop = start + 1
        if reward is None and value is None:
            while stop < len(tokens) and tokens[stop][1:] == (advantage, None, None):
                text += tokens[stop][0]
                stop += 1
        is_last = ends and stop == len(tokens)
        spans.append(_span(text, advantage, reward, value, end, is_last))
        start = stop
    return "".join(spans)


def _span(text: str, advantage: float, reward: float | None, value: float | None, end: float, is_last: bool) -> str:
    notes = [f"advantage {advantage:.3g}"]
    notes += [] if reward is None else [f"reward {reward:.3g}"]
    notes += [] if value is None else [f"value before it {value:.3g}"]
    share = (min(max(advantage, -end), end) + end) / (2 * end)
    # a token that shows nothing, such as a line break with a reward or the end of the text, gets a sign
    mark, body = "", text
    if not text and (is_last or reward is not None):
        mark = ' data-mark="end"'
    elif reward is not None and not text.strip():
        mark, body = ' data-mark="↵"' if "\n" in text else ' data-mark="␣"', text.rstrip("\n")
    kind = "piece" if reward is None else "piece rewarded"
    return (
        f'<span class="{kind}" style="background: rgb{colour(share)}" title="{", ".join(notes)}"{mark}>'
        f"{html.escape(body)}</span>{html.escape(text[len(body) :])}"
    )
