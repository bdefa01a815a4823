"""Tests; a package so that helpers import as ``from tests.tiny import ...``."""
