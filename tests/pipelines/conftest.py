"""Fixtures of the pipelines' tests: servers that are asked again at once, and a machine without `math_verify`."""

import sys

import pytest


@pytest.fixture
def short_pauses(monkeypatch):
    """Pauses between two attempts have a random part; this one makes them short."""
    monkeypatch.setattr("random.random", lambda: -0.45)


@pytest.fixture
def without_math_verify(monkeypatch):
    """As on a machine on which the extra `math` is not installed."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
