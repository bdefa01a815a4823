"""Tests of the losses; a package so that helpers import as ``from tests.losses.helpers import ...``."""
