"""Tests of trl_ext.data."""
