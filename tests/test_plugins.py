"""The example plugin package, installed as a user would and used by name in a fresh process without network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trl_ext.cli import plugins
from trl_ext.losses import ranking_losses


PROJECT = Path(__file__).resolve().parent.parent
PACKAGE = PROJECT / "examples" / "plugin_package"

NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError("a socket was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""

USE_BY_NAME = """
import sys
import torch
from trl_ext.losses import ranking_losses

assert ranking_losses.get("plackett_luce").__module__ == "trl_ext.losses.ranking"
assert "trl_ext_plugin_hinge" not in sys.modules
scores = torch.tensor([[0.5, 0.0]], requires_grad=True)
loss = ranking_losses.get("hinge")(scores, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool), width=2.0)
loss.sum().backward()
print(loss.item(), scores.grad.tolist())
"""

LIST = """
import sys
from trl_ext.cli.plugins import main

assert main([]) == 0
assert not {"trl_ext_plugin_hinge", "trl", "transformers"} & set(sys.modules)
assert main(["--check"]) == 0
assert "trl_ext_plugin_hinge" in sys.modules
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which pip installed the package, from a copy: building leaves files beside the source."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(PACKAGE, folder / "source")
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder / "target"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "target"


def run(*arguments: str, installed: Path) -> str:
    path = os.pathsep.join([str(installed), str(PROJECT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_loss_is_used_by_name_in_a_fresh_process(installed):
    assert run("-c", NO_NETWORK + USE_BY_NAME, installed=installed) == "1.5 [[-1.0, 1.0]]\n"


def test_the_listing_names_the_distribution_without_importing_it(installed):
    output = run("-c", NO_NETWORK + LIST, installed=installed)
    width = 2 + max(len(name) for name, _ in ranking_losses.available())  # another loss may widen the column
    assert "ranking loss (entry-point group 'trl_ext.ranking_losses')" in output
    assert f"  {'plackett_luce':<{width}}trl_ext.losses.ranking\n" in output
    assert f"  {'hinge':<{width}}trl-ext-plugin-hinge 0.1.0 (trl_ext_plugin_hinge:hinge)\n" in output
    assert "CONFLICT" not in output
    declared = "uses_distances=False, max_candidates=None, takes_margin=True, takes_target=False, "
    declared += "learns_from_ties=False"
    assert f"\n  {'':<{width}}  {declared}\n" in output  # --check shows what the plugin declares


def test_the_tests_of_the_package_pass(installed):
    output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(PACKAGE / "tests"), installed=installed)
    assert "8 passed" in output


def test_a_conflict_is_shown_and_fails_the_check(tmp_path, monkeypatch, capsys):
    info = tmp_path / "greedy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: greedy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[trl_ext.ranking_losses]\npairwise = greedy:pairwise\nlost = greedy:lost\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert plugins.main([]) == 0
    output = capsys.readouterr().out
    assert "pairwise greedy 1.0 (greedy:pairwise) CONFLICT: this name cannot be used" in " ".join(output.split())
    assert "pairwise trl_ext.losses.ranking CONFLICT" in " ".join(output.split())
    assert plugins.main(["--check"]) == 1
    errors = capsys.readouterr().err
    assert "'pairwise' is claimed by trl_ext.losses.ranking and by greedy 1.0" in errors
    assert "'lost' comes from the plugin greedy 1.0 (greedy:lost), which failed to import" in errors
