"""`policy_report`: a page about a policy that was trained with dense rewards or PPO: curves, and credit by token.

It reads what `DenseGRPOTrainer` and `PPOTrainer` leave in their folder: the metrics in `trainer_state.json` and, with
`log_completions=True`, completions in `completions/advantages.jsonl`. It loads no model.
"""

import base64
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_ext.evaluation.report.figures import BLUE, GREEN, GREY, ORANGE, STYLE, as_file, matplotlib_is_there
from trl_ext.scoring.view import STYLE as PAGE_STYLE
from trl_ext.scoring.view import colour, shares


_CSS = """
.text { margin: .2rem 0 1.4rem; }
.piece.rewarded { border-bottom: 2px solid #3b7dd8; }
img { width: 49%; min-width: 22rem; background: #ffffff; border-radius: .3rem; margin: .2rem 0; }
.note { color: var(--faint); font-size: .85rem; line-height: 1.5; }
"""
# Title, and the metrics of one picture with their names in its legend.
_CURVES = (
    ("Reward and verifier", {"reward": "reward"}),
    ("Critic: explained variance", {"critic/explained_variance": "explained variance"}),
    ("KL divergence to the reference", {"kl": "KL at a token"}),
    (
        "Clipped tokens",
        {"clip_ratio/region_mean": "probability ratio", "critic/clip_share": "value"},
    ),
    ("Repetition", {"watch/repetition": "runs of four tokens seen before"}),
    ("Length", {"completions/mean_length": "tokens in a completion", "watch/tokens_per_step": "tokens in a step"}),
)


def policy_report(folder: str | Path) -> Path:
    """
    Write `policy.html`, and a PNG for each picture where matplotlib is installed, into a trainer's output folder.

    The page has curves of the reward, the verifier, the critic, the KL divergence, clipping, repetition and length. It
    shows the reward by position of the step, and the completions that were logged last, coloured by the advantage of
    each token.

    Args:
        folder (`str` or `Path`): the trainer's `output_dir`.

    Returns:
        `Path`: the page.

    Raises:
        FileNotFoundError: the folder holds no `trainer_state.json`, in itself or in a checkpoint.
    """
    folder = Path(folder)
    history = _history(folder)
    samples = _last_samples(folder / "completions" / "advantages.jsonl")
    parts = ["<h1>Policy</h1>"]
    if matplotlib_is_there():
        for name, picture in _pictures(history).items():
            (folder / f"{name}.png").write_bytes(picture)
            data = base64.b64encode(picture).decode()
            parts.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
    else:
        parts.append('<p class="note">There are no pictures here: install matplotlib.</p>')
    parts.append("<h1>Completions and their advantages</h1>")
    if samples:
        parts.append(
            f'<p class="note">Step {samples[0]["step"]}. Green tokens become likelier, red ones less likely; a blue '
            "line marks a token with a reward. Rest the pointer on a token for its numbers.</p>"
        )
        largest = max((abs(a) for sample in samples for a in sample["advantages"]), default=0) or 1.0
        parts += [_credit(sample, largest) for sample in samples]
    else:
        parts.append('<p class="note">None were logged. Train with log_completions=True.</p>')
    page = folder / "policy.html"
    page.write_text(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Policy</title>'
        f"<style>{PAGE_STYLE}{_CSS}</style></head>\n<body>{''.join(parts)}</body></html>\n",
        encoding="utf-8",
    )
    return page


def _history(folder: Path) -> list[dict[str, Any]]:
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for place in (folder, *reversed(checkpoints)):
        file = place / "trainer_state.json"
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))["log_history"]
    raise FileNotFoundError(
        f"{folder} holds no trainer_state.json. Needed: the output folder of a trainer that saved a checkpoint, or "
        "called `trainer.save_state()`."
    )


def _last_samples(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["step"] == rows[-1]["step"]]


def _credit(sample: dict[str, Any], largest: float) -> str:
    """The text of one completion, coloured by advantages from `-largest` to `largest`."""
    advantages = sample["advantages"]
    values = sample.get("values") or [None] * len(advantages)
    places = shares(sample["pieces"], advantages, -largest, largest)
    spans = []
    for piece, advantage, reward, value, place in zip(
        sample["pieces"], advantages, sample["rewards"], values, places, strict=True
    ):
        notes = [f"advantage {advantage:.3g}"]
        notes += [] if reward is None else [f"reward {reward:.3g}"]
        notes += [] if value is None else [f"value before it {value:.3g}"]
        kind = "piece" if reward is None else "piece rewarded"
        # a token without text, such as EOS, shows as a sliver, and one of white space with a reward as a sign
        text = html.escape(piece) or "&#8203;"
        text = f"↵{text}" if reward is not None and not piece.strip() else text
        spans.append(
            f'<span class="{kind}" style="background: rgb{colour(place)}" title="{", ".join(notes)}">{text}</span>'
        )
    return f'<div class="text"><span class="prompt">{html.escape(sample["prompt"])}</span>{"".join(spans)}</div>'


def _pictures(history: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """The PNG of each picture that the log has numbers for, by file name."""
    import matplotlib
    from matplotlib.figure import Figure

    truths = [name for name in _names(history) if name.startswith("rewards/") and name.endswith("/mean")]
    pictures = {}
    with matplotlib.rc_context(STYLE):
        for title, wanted in _CURVES:
            if "reward" in wanted:
                wanted = wanted | {name: name.split("/")[1] for name in truths}
            curves = {label: _curve(history, name) for name, label in wanted.items()}
            curves = {label: points for label, points in curves.items() if len(points) > 1}
            if not curves:
                continue
            figure = Figure(figsize=(6.4, 3.2), layout="constrained")
            axes = figure.subplots()
            for (label, points), ink in zip(curves.items(), (BLUE, ORANGE, GREEN, GREY) * 5, strict=False):
                axes.plot(*zip(*points, strict=True), color=ink, label=label)
            axes.set(xlabel="step", title=title)
            axes.legend()
            pictures[f"policy_{title.split(':')[0].split()[0].lower()}"] = as_file(figure, "png")
        steps = _by_position(history)
        if steps:
            figure = Figure(figsize=(6.4, 3.2), layout="constrained")
            axes = figure.subplots()
            for (label, rewards), ink in zip(steps.items(), (GREY, BLUE), strict=False):
                axes.plot(range(1, len(rewards) + 1), rewards, marker="o", color=ink, label=label)
            axes.set(xlabel="position of the step", ylabel="mean reward", title="Reward by step")
            axes.set_xticks(range(1, max(map(len, steps.values())) + 1))
            axes.legend()
            pictures["policy_steps"] = as_file(figure, "png")
    return pictures


def _names(history: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for entry in history for name in entry))


def _curve(history: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """The logged values of a metric with their steps; gaps and values that are not finite are left out."""
    found = [(entry["step"], entry[name]) for entry in history if entry.get(name) is not None]
    return [(step, value) for step, value in found if math.isfinite(value)]


def _by_position(history: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """The mean reward of first, second ... steps, at the first log with any and at the last."""
    prefix = "dense/reward_at_step_"
    logs = [entry for entry in history if f"{prefix}1" in entry]
    curves = {}
    for entry in logs[:1] + logs[1:][-1:]:
        positions = sorted(int(name.removeprefix(prefix)) for name in entry if name.startswith(prefix))
        curves[f"step {entry['step']}"] = [entry[f"{prefix}{n}"] for n in positions]
    return curves
