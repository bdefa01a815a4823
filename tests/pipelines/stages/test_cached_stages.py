"""Stages: each runs once, after those that it needs, in this process or side by side, and a failure ends all of it."""

import io
import logging
import os
import sys

import pytest

from tests.pipelines.stages.stages_program import add, fail, kill, meet, sleep
from trl_ext.pipelines.stages.cached_stages import Stage, find_done, run_stages
from trl_ext.pipelines.stages.progress import Progress, seconds_left
from trl_ext.pipelines.stages.runner import OwnProcesses, StageError


def stages(number=1):
    return [
        Stage("one", "One", add, {"number": number}),
        Stage("two", "Two", add, {"number": 2}),
        Stage("three", "Three", add, {"number": 3}, needs=("one", "two")),
        Stage("four", "Four", add, {"number": 4}, needs=("two",)),
    ]


def totals(outcomes):
    return {name: outcome.result["total"] for name, outcome in outcomes.items()}


def test_stages_run_once_and_again_where_something_changed(tmp_path):
    first = run_stages(stages(), tmp_path)
    assert totals(first) == {"one": 1, "two": 2, "three": 6, "four": 6}
    again = run_stages(stages(), tmp_path)
    assert all(outcome.cached for outcome in again.values()) and totals(again) == totals(first)
    changed = run_stages(stages(number=5), tmp_path)
    assert totals(changed) == {"one": 5, "two": 2, "three": 10, "four": 6}
    assert [name for name, outcome in changed.items() if not outcome.cached] == ["one", "three"]
    assert not any(outcome.cached for outcome in run_stages(stages(5), tmp_path, fresh=True).values())


def test_side_by_side_gives_the_same_in_other_processes(tmp_path):
    told = []
    with OwnProcesses(2) as processes:
        outcomes = run_stages(
            stages(),
            tmp_path / "beside",
            on_start=lambda stage: told.append(("start", stage.name)),
            on_progress=lambda stage, share: told.append((share, stage.name)),
            on_end=lambda stage, outcome: told.append(("end", stage.name)),
            runner=processes,
        )
    assert totals(outcomes) == totals(run_stages(stages(), tmp_path / "after"))
    assert os.getpid() not in {outcome.result["process"] for outcome in outcomes.values()}
    assert len({outcome.result["process"] for outcome in outcomes.values()}) <= 2
    for name in outcomes:
        assert [what for what, who in told if who == name] == ["start", 0.5, "end"]
    assert told.index(("end", "two")) < told.index(("start", "four"))
    assert find_done(stages(), tmp_path / "beside").keys() == outcomes.keys()


def test_two_stages_really_run_at_the_same_time(tmp_path):
    both = [Stage(here, here, meet, {"here": here, "there": there}) for here, there in ("ab", "ba")]
    with OwnProcesses(2) as processes:
        run_stages(both, tmp_path, runner=processes)


@pytest.mark.parametrize(
    ("run", "error", "message"), [(fail, LookupError, "nothing there"), (kill, StageError, "'bad'.*-9")]
)
def test_a_failure_ends_the_others_at_once_and_leaves_what_was_done(tmp_path, run, error, message):
    both = [Stage("long", "Long", sleep, {}), Stage("good", "Good", add, {"number": 1})]
    bad = Stage("bad", "Bad", run, {}, needs=("good",))
    with pytest.raises(error, match=message) as raised, OwnProcesses(2) as processes:
        run_stages([*both, bad], tmp_path, runner=processes)
    if error is LookupError:
        assert "in fail" in raised.value.__notes__[0]  # where in the other process
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "sleeps").read_text()), 0)
    assert find_done([*both, bad], tmp_path).keys() == {"good"}


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        OwnProcesses(0)
    with pytest.raises(StageError, match="two stages are called 'one'"):
        run_stages([*stages(), *stages()], tmp_path)
    with pytest.raises(StageError, match="put them before it"):
        run_stages(stages()[::-1], tmp_path)
    (tmp_path / "one").mkdir()
    with pytest.raises(StageError, match="not replaced"):
        run_stages(stages(), tmp_path)


def test_seconds_left_by_hand():
    needs = {"c": ["a"], "d": ["a", "b"]}
    left = {"a": 2.0, "b": 3.0, "c": 4.0, "d": 1.0}
    assert seconds_left(left, needs, workers=1) == 10.0
    assert seconds_left(left, needs, workers=2) == 6.0  # a b, then c beside the rest of b, then d
    assert seconds_left({}, needs, workers=2) == 0.0


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_live_display_with_log_lines_above_it(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    handler = logging.StreamHandler()  # keeps today's standard error, as those of transformers do
    monkeypatch.setattr(logging.getLogger("trl_ext.some_module"), "handlers", [handler])
    with Progress({"A": 10.0}, stream=terminal) as progress:
        progress.start("A")
        progress.update("A", 0.5)
        assert handler.stream is not terminal and sys.stderr is handler.stream
        logging.getLogger("trl_ext.some_module").warning("mind the gap")
        progress._live.refresh()
        progress.finish("A", "A: done in 0:05")
    assert sys.stderr is terminal and handler.stream is terminal
    shown = terminal.getvalue()
    assert "50%" in shown and "so far, about" in shown and "mind the gap\n" in shown and "A: done in 0:05\n" in shown


def test_without_expectations_there_is_no_estimate():
    lines = io.StringIO()
    with Progress(stream=lines, interval=0.0, now=lambda: 0.0) as progress:
        progress.start("A")
        progress.update("A", 0.25)
    assert lines.getvalue().splitlines() == ["A 0%; 0:00 so far", "A 25%; 0:00 so far"]


def test_the_progress_line_counts_and_estimates_by_this_machines_speed():
    clock, lines = [0.0], io.StringIO()
    progress = Progress({"A": 10.0, "B": 10.0, "C": 20.0}, {"C": ["A"]}, 2, lines, interval=0.0, now=lambda: clock[0])
    progress.start("A")
    progress.start("B")
    assert progress.remaining() == pytest.approx(30.0)
    clock[0] = 30.0  # half as fast as the reference: ten seconds of it took thirty, and ten count for ten
    progress.update("A", 1.0)
    progress.finish("A", "A: done")
    progress.start("C")
    progress.update("B", 0.5)
    assert progress.remaining() == pytest.approx(20.0 * (30.0 + 10.0) / (10.0 + 10.0))
    assert lines.getvalue().splitlines()[-2:] == [
        "[1/3] B 0%, C 0%; 0:30 so far, about 0:40 left",
        "[1/3] B 50%, C 0%; 0:30 so far, about 0:40 left",
    ]
