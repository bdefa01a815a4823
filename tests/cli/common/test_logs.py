"""Noise that is known to be harmless is hidden, everything else is shown; our lines follow transformers' verbosity."""

import logging
import warnings

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as upstream

from tests.tiny import save_tiny_model
from trl_ext import logs
from trl_ext.cli.common import logs as command_logs


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
    command_logs.quiet_noise()
    try:
        record = logger.makeRecord(logger.name, logging.WARNING, "f", 1, text, (), None)
        assert bool(logger.filter(record)) == shown
    finally:
        for name in command_logs.HARMLESS:
            logging.getLogger(name).filters.clear()


def test_warnings_about_calls_that_are_not_the_users_are_hidden():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        command_logs.quiet_noise()
        warnings.warn("`gradient_checkpointing` is deprecated, use another", FutureWarning, stacklevel=1)
        warnings.warn("`something_of_yours` is deprecated", FutureWarning, stacklevel=1)
    for name in command_logs.HARMLESS:
        logging.getLogger(name).filters.clear()
    assert [str(one.message) for one in found] == ["`something_of_yours` is deprecated"]


@pytest.mark.parametrize(("verbosity", "shown"), [("", False), ("debug", True)])
def test_a_kernel_that_nobody_needs_is_not_missed(verbosity, shown, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", verbosity)
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    for text, passes in (("Failed to load CPU gemm_4bit_forward from x", shown), ("another line", True)):
        record = logger.makeRecord(logger.name, logging.WARNING, "f", 1, text, (), None)
        assert bool(logger.filter(record)) == passes


@pytest.fixture
def ours():
    """Our logger as it is in a new program."""
    logger = logging.getLogger("trl_ext")
    before, handlers = logger.level, list(logger.handlers)
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.setLevel(before)
    logger.handlers[:] = handlers


@pytest.mark.parametrize(
    ("verbosity", "level"),
    [("info", logging.INFO), ("error", logging.ERROR), ("warning", logging.WARNING), ("", logging.INFO)],
)
def test_a_command_shows_information_unless_the_verbosity_of_transformers_says_more(
    verbosity, level, ours, monkeypatch
):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", verbosity)
    logs.show_logs()
    assert ours.level == level
    logs.show_logs(default=logging.WARNING)
    assert ours.level == (level if verbosity else logging.WARNING)
    logs.show_logs(logging.DEBUG)
    assert logging.getLogger("trl_ext.trainers.x").isEnabledFor(logging.DEBUG)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.mark.parametrize("kind", ["scorer", "ensemble", "best of n"])
def test_what_is_used_alone_follows_it_too(kind, ours, base, tmp_path, capsys, monkeypatch):
    from trl_ext import RewardEnsemble, RewardScorer, best_of_n

    def use():
        if kind == "best of n":
            best_of_n(str(base), reward, ["a"], n=1, max_completion_length=2)
        elif kind == "scorer":
            RewardScorer(model, tokenizer, name="mine")(["a"], ["b"])
        else:
            RewardEnsemble([reward, reward], name="ours")(["a"], ["b"])

    def reward(completions, **columns):
        return [1.0] * len(completions)

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # those of pytest: no logging around us
    before = upstream.get_verbosity()
    start = {"scorer": "INFO: mine starts: scalar reward model", "ensemble": "INFO: ours starts: 2 members"}.get(kind)
    try:
        upstream.set_verbosity(upstream.INFO)
        use()
        assert ours.level == logging.INFO
        shown = capsys.readouterr().err
        assert start is None or shown.count(start) == 1
        upstream.set_verbosity(upstream.ERROR)
        use()
        assert ours.level == logging.ERROR and "starts" not in capsys.readouterr().err
    finally:
        upstream.set_verbosity(before)


def test_in_a_library_our_lines_follow_the_verbosity_of_transformers(ours, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # those of pytest: no logging around us
    before = upstream.get_verbosity()
    line = logging.getLogger("trl_ext.models.x")
    try:
        for verbosity, shown in ((upstream.WARNING, ""), (upstream.INFO, "INFO: told\n"), (upstream.ERROR, "")):
            upstream.set_verbosity(verbosity)
            logs.follow_transformers()
            line.info("told")
            assert capsys.readouterr().err == shown
        ours.setLevel(logging.DEBUG)  # the user's own level stays
        logs.follow_transformers()
        assert ours.level == logging.DEBUG
    finally:
        upstream.set_verbosity(before)


def test_where_a_program_shows_log_lines_itself_nothing_is_set_and_nothing_is_shown_twice(ours, capsys, monkeypatch):
    seen = []
    around = logging.Handler()
    around.emit = lambda record: seen.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger(), "handlers", [around])
    logs.follow_transformers(logging.DEBUG)
    assert ours.level == logging.NOTSET
    logs.show_logs(logging.INFO)
    logging.getLogger("trl_ext.x").info("once")
    assert seen == ["once"] and capsys.readouterr().err == ""


def test_the_ignored_columns_of_prepared_rows_are_not_shown():
    logger = logging.getLogger("transformers.trainer")
    command_logs.quiet_noise()
    text = "The following columns in the Training set don't have a corresponding argument in `X.forward` and have "
    text += "been ignored: chosen, rejected."
    try:
        assert not logger.filter(logger.makeRecord(logger.name, logging.INFO, "f", 1, text, (), None))
        assert logger.filter(logger.makeRecord(logger.name, logging.INFO, "f", 1, "Num examples = 4", (), None))
    finally:
        for name in command_logs.HARMLESS:
            logging.getLogger(name).filters.clear()
