"""What tests of models get: tables printed after the results, and a short garbage collection."""

import gc

import pytest


_TABLES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session", autouse=True)
def freeze_imported_objects():
    """Accelerate collects garbage whenever a training starts; going over the imported libraries took 85 % of a run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def show(pytestconfig: pytest.Config):
    """A function that takes a text and has it printed after the test results."""
    return pytestconfig.stash.setdefault(_TABLES, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for text in config.stash.get(_TABLES, []):
        terminalreporter.write_line("")
        terminalreporter.write_line(text)
