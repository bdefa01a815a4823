"""One tiny checkpoint for all trainer tests."""

from pathlib import Path

import pytest

from tests.tiny import save_tiny_model


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A Llama of two layers, and its tokenizer with a dedicated pad token."""
    return save_tiny_model(tmp_path_factory.mktemp("base") / "tiny-llama", "llama")
