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

# Layer -> the layers it may import. Each layer may import itself.
BELOW = {
    "registry": set(),
    "upstream": set(),
    "losses": {"registry"},
    "metrics": {"registry"},
    "data": {"losses", "metrics", "registry", "upstream"},
    "models": {"data", "losses", "metrics", "registry", "upstream"},
    "trainers": {"models", "data", "losses", "metrics", "registry", "upstream"},
    "scoring": {"models", "data", "losses", "metrics", "registry", "upstream"},
    "evaluation": {"trainers", "scoring", "models", "data", "losses", "metrics", "registry", "upstream"},
    "pipelines": {"trainers", "scoring", "models", "data", "losses", "metrics", "registry", "upstream"},
}
BELOW |= {name: {*BELOW} for name in ("fit", "bench", "demo")}
BELOW["bench"] |= {"cli"}
BELOW["fit"] |= {"bench", "cli"}
BELOW["cli"] = {*BELOW}

# Layer -> the only third-party packages it may import. The layers that are not here may import any dependency.
THIRD_PARTY = {
    "registry": set(),
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
    ],
)
def test_the_check_sees_a_wrong_import(tmp_path, monkeypatch, where, line, complaint):
    path = tmp_path / "trl_ext" / where
    path.parent.mkdir(parents=True)
    path.write_text(line)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert [found.split(": ", 1)[1] for found in violations(path)] == [complaint]


def test_files_stay_small():
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: lines for name, lines in long.items() if lines > 450}


def test_every_dependency_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = lambda requirements: {re.match(r"[\w-]+", item)[0].replace("-", "_") for item in requirements}  # noqa: E731
    extras = project["optional-dependencies"]
    declared = names(project["dependencies"]) | names(extras["plots"]) | names(extras["segment"])
    declared |= {"yaml"} if "pyyaml" in declared else set()
    declared |= names(extras["math"])
    declared |= {"sklearn"} if "scikit_learn" in names(extras["fusion"]) else set()
    used = {module.split(".")[0] for path in FILES for _, module, _ in imports_of(path)}
    used -= {*sys.stdlib_module_names, "trl_ext"}
    assert used - declared == set()


def test_importing_the_package_and_the_registry_is_light():
    code = (
        "import sys, time; start = time.perf_counter(); import trl_ext; seconds = time.perf_counter() - start\n"
        "import trl_ext.cli.main, trl_ext.registry\n"
        "heavy = {'torch', 'trl', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert seconds < 0.3, seconds\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
