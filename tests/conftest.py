"""What every test gets: no network, no telemetry, one torch thread, and the folder of real data when it is there.

The environment is set at import, before any test imports torch, transformers or trl.
"""

import os
from pathlib import Path

import pytest


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_DISABLED"] = "true"
os.environ["WANDB_SILENT"] = "true"

import torch


torch.set_num_threads(1)

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def wandb_elsewhere(tmp_path_factory):
    """A run that a test opens leaves nothing in the working tree, whichever test of the process uses W&B first."""
    os.environ["WANDB_DIR"] = str(tmp_path_factory.mktemp("wandb"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets: `TRL_EXT_DATA`, else ``shared/data`` beside the project; skips where absent."""
    named = os.environ.get("TRL_EXT_DATA")
    folder = Path(named) if named else PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not a folder (set TRL_EXT_DATA to point at it)")
    return folder


SLOW = PROJECT / "tests" / "slow.txt"


def slow_tests() -> list[str]:
    """The lines of slow.txt: tests, and cases of a test, that the default run leaves out because of their time."""
    lines = (line.partition("#")[0].strip() for line in SLOW.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = set(slow_tests())
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        if name in slow or name.partition("[")[0] in slow:
            item.add_marker(pytest.mark.slow)
