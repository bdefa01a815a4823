"""Imports only point down, the light layers import nothing heavy, and what is imported is declared."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "trl_ext"

# From the bottom up: a layer may import those below it, and itself. Layers of one line do not import each other.
ORDER = (
    ("registry", "upstream", "logs", "style"),
    ("losses", "metrics"),
    ("data",),
    ("models",),
    ("serving",),
    ("trainers", "scoring"),
    ("evaluation",),
    ("pipelines",),
    ("bench", "demo"),
    ("fit",),  # it measures with the clocks of bench
    ("cli",),
)
BELOW = {layer: {low for line in ORDER[:place] for low in line} for place, line in enumerate(ORDER) for layer in line}
for pure in ("losses", "metrics"):
    BELOW[pure] -= {"upstream", "logs", "style"}
# The layers that may import the bare package, which leads to every public name: for the others that is an arrow up.
MAY_IMPORT_THE_PACKAGE = {"demo", "bench", "fit", "cli"}

# Layer -> the only third-party packages it may import. The layers that are not here may import any dependency.
THIRD_PARTY = {
    "registry": set(),
    "style": set(),
    "logs": {"transformers"},
    "upstream": {"packaging", "trl", "transformers", "peft"},
    "losses": {"torch"},
    "metrics": {"torch"},
    "data": {"torch", "numpy", "datasets", "tokenizers", "jinja2", "accelerate", "trl", "sentencex", "ruptures"},
}
TRL_IN_DATA = {"is_conversational", "maybe_extract_prompt", "apply_chat_template"}

FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(module: str) -> str | None:
    """`trl_ext.losses.ranking` -> `losses`; `None` for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imports_of(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """(line, module, imported name or None) for every import in a file, in functions and TYPE_CHECKING blocks too."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level] if path.name != "__init__.py" else module.split(".")[:-1]
                if path.name == "__init__.py" and node.level > 1:
                    package = package[: 1 - node.level]
                base = ".".join([*package, base]).rstrip(".")
            for alias in node.names:
                yield node.lineno, base, alias.name


def violations(path: Path) -> list[str]:
    """What a file imports that its layer may not."""
    layer = layer_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    found = []
    for line, module, name in imports_of(path):
        top = module.split(".")[0]
        where = f"{path.relative_to(ROOT)}:{line}"
        if top == "trl_ext":
            target = layer_of(module) or layer_of(f"trl_ext.{name}")
            if layer in BELOW and target in BELOW and target != layer and target not in BELOW[layer]:
                found.append(f"{where}: {layer} imports {target}")
            elif layer in BELOW and target not in BELOW and layer not in MAY_IMPORT_THE_PACKAGE:
                found.append(f"{where}: {layer} imports the package itself")
        elif top not in sys.stdlib_module_names and layer in THIRD_PARTY:
            if top not in THIRD_PARTY[layer]:
                found.append(f"{where}: {layer} imports {top}")
            if layer == "data" and top == "trl" and name not in TRL_IN_DATA:
                found.append(f"{where}: data imports {module}.{name}")
    return found


def test_imports_only_point_down():
    assert len(FILES) >= 15, f"found only {len(FILES)} files under {PACKAGE}"
    layers = {layer_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in FILES} - {"__init__"}
    assert layers <= set(BELOW), f"no rule for {layers - set(BELOW)}: add one to BELOW"
    assert not [line for path in FILES for line in violations(path)]


@pytest.mark.parametrize(
    ("where", "line", "complaint"),
    [
        ("losses/ranking.py", "from trl_ext.models import heads", "losses imports models"),
        ("losses/ranking.py", "import transformers", "losses imports transformers"),
        ("data/formats.py", "def f():\n    from trl_ext import trainers", "data imports trainers"),
        ("data/formats.py", "from trl.trainer.utils import pad", "data imports trl.trainer.utils.pad"),
        ("models/heads.py", "from ..cli import main", "models imports cli"),
        ("scoring/scorer.py", "from trl_ext.trainers.ranking.trainer import x", "scoring imports trainers"),
        ("bench/score.py", "from trl_ext.cli.ensemble import KINDS", "bench imports cli"),
        ("bench/score.py", "from trl_ext.fit import config", "bench imports fit"),
        ("pipelines/answers.py", "import trl_ext", "pipelines imports the package itself"),
        ("models/heads.py", "from trl_ext import RewardScorer", "models imports the package itself"),
    ],
)
def test_the_check_sees_a_wrong_import(tmp_path, monkeypatch, where, line, complaint):
    path = tmp_path / "trl_ext" / where
    path.parent.mkdir(parents=True)
    path.write_text(line)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert [found.split(": ", 1)[1] for found in violations(path)] == [complaint]


def graph_of(files: list[Path], root: Path) -> dict[str, set[str]]:
    """File -> the files of the package that it imports, in functions too, but not for type checkers only."""
    names = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    graph = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                node.body = []
        graph[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= {module if module in names else node.module for module in modules}
        graph[name] = graph[name] & set(names) - {name}
    return graph


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The files of one import circle, in order; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return trail[trail.index(name) :]
        if name in done:
            return []
        for target in sorted(graph[name]):
            if found := visit(target, [*trail, name]):
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := visit(name, []))), [])


def test_files_do_not_import_each_other_in_a_circle():
    """The bare package is left out: it is lazy, and leads to every public name."""
    graph = graph_of([path for path in FILES if path != PACKAGE / "__init__.py"], ROOT)
    assert len(graph) > 100 and graph["trl_ext.cli.reward"] >= {"trl_ext.cli.common.train"}
    assert not circle_in(graph)


def test_the_check_sees_a_circle(tmp_path):
    (tmp_path / "trl_ext").mkdir()
    files = {"a": "from trl_ext import b", "b": "def f():\n    from trl_ext.c import x", "c": "import trl_ext.a"}
    for name, text in files.items():
        (tmp_path / "trl_ext" / f"{name}.py").write_text(text)
    graph = graph_of(sorted((tmp_path / "trl_ext").glob("*.py")), tmp_path)
    assert circle_in(graph) == ["trl_ext.a", "trl_ext.b", "trl_ext.c"]
    (tmp_path / "trl_ext" / "c.py").write_text("if TYPE_CHECKING:\n    import trl_ext.a")
    assert not circle_in(graph_of(sorted((tmp_path / "trl_ext").glob("*.py")), tmp_path))


def test_files_stay_small():
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: lines for name, lines in long.items() if lines > 450}


def test_every_dependency_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = lambda requirements: {re.match(r"[\w-]+", item)[0].replace("-", "_") for item in requirements}  # noqa: E731
    extras = project["optional-dependencies"]
    declared = names(project["dependencies"]) | names(extras["plots"]) | names(extras["segment"])
    declared |= {"yaml"} if "pyyaml" in declared else set()
    declared |= names(extras["math"]) | names(extras["self-instruct"])
    declared |= {"sklearn"} if "scikit_learn" in names(extras["fusion"]) else set()
    used = {module.split(".")[0] for path in FILES for _, module, _ in imports_of(path)}
    used -= {*sys.stdlib_module_names, "trl_ext"}
    assert used - declared == set()


def test_importing_the_package_and_the_registry_is_light():
    code = (
        "import sys, trl_ext, trl_ext.cli.main, trl_ext.registry\n"
        "heavy = {'torch', 'trl', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
