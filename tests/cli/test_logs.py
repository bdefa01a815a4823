"""Noise that is known to be harmless is hidden, everything else is shown; our lines follow transformers' verbosity."""

import logging
import warnings

import pytest

from trl_ext.cli import _logs


HEAD = "LlamaForSequenceClassification LOAD REPORT from: x\nKey          | Status  |  | \n"
REPORTS = {
    "a new head": (HEAD + "score.weight | MISSING |  | \n\nNotes:\n- MISSING: newly initialized", False),
    "a new and an unused head": (HEAD + "lm_head.weight | UNEXPECTED |  | \nscore.weight | MISSING |  | \n", False),
    "a missing layer": (HEAD + "model.layers.0.mlp.up_proj.weight | MISSING |  | \nscore.weight | MISSING | | ", True),
    "another size": (HEAD + "score.weight | MISMATCH | Reinit due to size mismatch", True),
    "no report": ("something else", True),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_load_report_is_hidden_only_where_it_is_about_heads(name):
    text, shown = REPORTS[name]
    logger = logging.getLogger("transformers.modeling_utils")
    _logs.quiet_noise()
    try:
        record = logger.makeRecord(logger.name, logging.WARNING, "f", 1, text, (), None)
        assert bool(logger.filter(record)) == shown
    finally:
        for name in _logs.HARMLESS:
            logging.getLogger(name).filters.clear()


def test_warnings_about_calls_that_are_not_the_users_are_hidden():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        _logs.quiet_noise()
        warnings.warn("`gradient_checkpointing` is deprecated, use another", FutureWarning, stacklevel=1)
        warnings.warn("`something_of_yours` is deprecated", FutureWarning, stacklevel=1)
    for name in _logs.HARMLESS:
        logging.getLogger(name).filters.clear()
    assert [str(one.message) for one in found] == ["`something_of_yours` is deprecated"]


@pytest.mark.parametrize(
    ("verbosity", "level"), [("info", logging.INFO), ("error", logging.ERROR), ("", logging.WARNING)]
)
def test_our_lines_follow_the_verbosity_of_transformers(verbosity, level, monkeypatch):
    ours = logging.getLogger("trl_ext")
    before = ours.level
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", verbosity)
    try:
        _logs.show_logs()
        assert ours.level == level
        _logs.show_logs(logging.DEBUG)
        assert logging.getLogger("trl_ext.trainers.x").isEnabledFor(logging.DEBUG)
    finally:
        ours.setLevel(before)
