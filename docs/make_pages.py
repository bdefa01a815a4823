"""Makes the parts of the documentation that nobody types: result tables, the tree, the API pages and the front page.

MkDocs calls the `on_*` functions while it builds the site. The tables come from docs/results/*.json, the tree from the
first line of every module docstring, the API pages from the public names, and the front page from README.md.
`python docs/make_pages.py` draws the picture of README.md. Knows files and their text; imports nothing
of trl_ext.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any


DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PICTURE = DOCS / "assets" / "demo.svg"

# The line of a page where a table goes, and the text that stands there while the result does not exist.
TABLE = re.compile(r"^<!-- table: (\w+)(?: \| ([^>]+))? -->$", re.MULTILINE)
TREE = "<!-- tree -->"
TOP_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "development/contributing.md"}

# The API reference: page -> what is on it. Every public name is on exactly one page, which a test checks.
API = {
    "trainers": (
        "Trainers of reward models",
        "RewardTrainer RewardConfig ORMTrainer ORMConfig PRMTrainer PRMConfig SegmentRewardTrainer "
        "SegmentRewardConfig",
    ),
    "ensembles": (
        "Ensembles",
        "RewardEnsemble RewardEnsembleTrainer RewardEnsembleConfig ORMEnsembleTrainer ORMEnsembleConfig "
        "PRMEnsembleTrainer PRMEnsembleConfig SegmentEnsembleTrainer SegmentEnsembleConfig",
    ),
    "scoring": ("Scoring and checkpoints", "RewardScorer load_reward_model merge_reward_model merge_reward_models"),
    "evaluation": ("Evaluation", "evaluate_reward_model EvaluationReport EvaluationCallback"),
    "sampling": (
        "Rejection sampling and best of n",
        "rejection_sample best_of_n RejectionSamplingTrainer RejectionSamplingConfig",
    ),
    "labels": ("Labels and tasks", "label_preferences JudgeReward label_steps choose self_instruct"),
    "policies": (
        "Policies",
        "DenseGRPOTrainer DenseGRPOConfig PPOTrainer PPOConfig RankedDPOTrainer RankedDPOConfig",
    ),
    "weak_to_strong": (
        "Weak to strong",
        "weak_to_strong WeakToStrongArguments WeakToStrongTrainer WeakToStrongConfig performance_gap_recovered",
    ),
}
# Modules with functions that users call by their path.
API_MODULES = {
    "losses": (
        "Losses",
        "losses.ranking losses.lambda_loss losses.judged_pairs losses.penalties losses.token losses.distillation "
        "losses.advantages",
    ),
    "data": ("Segmenters", "data.segmentation"),
    "views": ("Views of a scored text", "scoring.view"),
    "voting": ("Votes and estimators", "metrics.voting metrics.pgr"),
}


def read_result(name: str) -> dict[str, Any]:
    """The figures of docs/results/<name>.json. Raises `FileNotFoundError` for a name that has no file."""
    return json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))


def result_table(name: str) -> str:
    """A result as a Markdown table, with the command, the machine and the date below it."""
    result = read_result(name)
    rows = [result["columns"], ["---"] * len(result["columns"]), *result["rows"]]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    commands = "; ".join(f"`{command}`" if "`" not in command else command for command in result["command"])
    return "\n".join(
        [
            f"**{result['title']}**",
            "",
            *lines,
            "",
            f"<small>{result['note']} From {commands}. Machine: {result['machine']}. Recorded on {result['date']}.",
            "</small>",
        ]
    )


def fill_tables(text: str) -> str:
    """Put every table in its place, or the text for a result that does not exist yet."""

    def fill(match: re.Match) -> str:
        missing = match[2] is not None and not (DOCS / "results" / f"{match[1]}.json").is_file()
        return match[2] if missing else result_table(match[1])

    return TABLE.sub(fill, text)


def top_page(name: str, up: str = "") -> str:
    """
    README.md or CONTRIBUTING.md as a page of the site.

    Links into docs/ become links between pages (`up` is the way to the site's root), and links to other files become
    their names, since the site does not hold them.
    """
    text = fill_tables((ROOT / name).read_text(encoding="utf-8"))

    def link(match: re.Match) -> str:
        label, target = match[1], match[2]
        if target.startswith("docs/"):
            return f"[{label}]({up}{target.removeprefix('docs/')})"
        if target in TOP_PAGES:
            return f"[{label}]({up}{TOP_PAGES[target]}{match[3] or ''})"
        return f"`{label}`"

    if name == "README.md":
        text = "---\nhide: [navigation]\n---\n\n" + text  # the first page has no pages beside it
    return re.sub(r"\[([^]\[]*)\]\((?!https?:|#)([\w./-]*)(#[\w-]*)?\)", link, text)


def demo_picture(seed: int = 0) -> str:
    """The demo's picks as a bar chart (SVG): the rows of docs/results/demo.json that answer the held-out problems."""
    bars = [(row[0], float(row[1 + seed])) for row in read_result("demo")["rows"][:12]]
    bars = sorted((bar for bar in bars if "NF4" not in bar[0]), key=lambda bar: bar[1])
    left, width, step = 300, 380, 26
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 60} {step * len(bars) + 44}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="100%" height="100%" fill="#ffffff"/><text x="12" y="22" font-weight="bold">Right answers on '
        f"1,000 held-out problems (trl-ext demo, seed {seed})</text>",
    ]
    for number, (label, value) in enumerate(bars):
        y = 36 + number * step
        colour = "#3f51b5" if "model" in label or "ensemble" in label else "#9e9e9e"
        lines += [
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{label}</text>',
            f'<rect x="{left}" y="{y}" width="{value * width:.0f}" height="{step - 7}" fill="{colour}"/>',
            f'<text x="{left + value * width + 6:.0f}" y="{y + 14}">{value:.3f}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def first_line(path: Path) -> str:
    """The first sentence of a module's docstring, or of a folder's `__init__`."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.sub(r"\[(`[^`]*`)\]", r"\1", " ".join(docstring.split("\n\n")[0].split()))


def tree(folder: Path = ROOT / "trl_ext") -> str:
    """Every file of the package with the first paragraph of its docstring, folder by folder."""
    parts = []
    for path in sorted([folder, *(item for item in folder.rglob("*") if item.is_dir())]):
        files = sorted(path.glob("*.py"))
        if not files:
            continue
        name = path.relative_to(ROOT).as_posix()
        parts += [f"## `{name}/`", ""]
        init = path / "__init__.py"
        if init in files:
            parts += [first_line(init), ""]
        rows = [f"| `{file.name}` | {first_line(file)} |" for file in files if file != init]
        if rows:
            parts += ["| file | what it is |", "| --- | --- |", *rows, ""]
    return "\n".join(parts)


def api_pages() -> dict[str, str]:
    """The pages of the API reference, by their path in the site."""
    pages = {}
    for name, (title, names) in API.items():
        pages[name] = f"# {title}\n\n" + "\n\n".join(f"::: trl_ext.{item}" for item in names.split()) + "\n"
    for name, (title, modules) in API_MODULES.items():
        pages[name] = f"# {title}\n\n" + "\n\n".join(f"::: trl_ext.{item}" for item in modules.split()) + "\n"
    return {f"reference/api/{name}.md": text for name, text in pages.items()}


def on_files(files: Any, config: Any) -> Any:
    """MkDocs: add the pages that are made here."""
    from mkdocs.structure.files import File

    tops = {page: top_page(name, "../" * page.count("/")) for name, page in TOP_PAGES.items()}
    for path, text in {**tops, **api_pages()}.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """MkDocs: docstrings name objects as TRL's do, [`Name`] or [`~module.Name`]; show the name."""
    html = re.sub(r"\[<code>~?(?:[\w.]*\.)?(\w+)</code>\]", r"<code>\1</code>", html)
    # types in TRL's dialect, (`str`, *optional*), are one piece of code here
    return re.sub(r"<code>[^<]*`[^<]*</code>", lambda match: re.sub(r"\[`~?|`\]|[`*]", "", match[0]), html)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """MkDocs: fill in tables and the tree."""
    markdown = fill_tables(markdown)
    return markdown.replace(TREE, tree()) if TREE in markdown else markdown


if __name__ == "__main__":
    PICTURE.write_text(demo_picture(), encoding="utf-8")
