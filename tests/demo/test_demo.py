"""The demo: an exact verifier, honest picks, and every stage runs, is cached and reported."""

import json

import pytest

from trl_ext.cli import demo
from trl_ext.demo.picking import compare_picks
from trl_ext.demo.task import SPLITS, Problem, final_answer, make_problems, verify


def test_the_verifier_knows_every_line():
    problem = Problem(digits=(7, 2, 9))
    assert (problem.prompt, problem.solution) == ("729:\n", "2\n7\n9\n")
    assert verify(problem, "2\n7\n9\n").rating == 2.0
    assert verify(problem, "2\n7\n9").answer_right
    wrong = verify(problem, "2\n9\n9\n")
    assert (wrong.steps_right, wrong.answer_right, wrong.rating) == ((True, False, True), False, pytest.approx(2 / 3))
    assert not verify(problem, "2\n7\n9\n9\n").answer_right and not verify(problem, "").answer_right
    assert final_answer(" 2\n7 \n") == final_answer("2\n7")


def test_problems_are_drawn_once_and_never_from_another_split():
    drawn = {split: make_problems(200, split, seed=1) for split in SPLITS}
    assert len({problem for problems in drawn.values() for problem in problems}) == 200 * len(SPLITS)
    for split, problems in drawn.items():
        assert make_problems(200, split, seed=1) == problems
    with pytest.raises(ValueError, match="unknown split 'exam'"):
        make_problems(1, "exam", seed=1)


def test_picks_by_hand():
    """Two prompts with three samples: the model picks a right one, then a wrong one."""
    right = [[True, False, False], [True, True, False]]
    answers = [["a", "b", "b"], ["c", "c", "d"]]
    scores = [[2.0, 1.0, 0.0], [0.0, 0.5, 3.0]]
    picks = compare_picks(right, answers, scores)
    assert picks["random"]["mean"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert picks["majority"]["mean"] == pytest.approx(0.5)
    assert picks["best_of_n"]["mean"] == pytest.approx(0.5)
    assert picks["oracle"]["mean"] == pytest.approx(1.0)
    assert picks["best_of_n_over_random"]["mean"] == pytest.approx(0.0)


def test_a_smoke_run_reports_every_stage_and_the_next_one_reuses_them(tmp_path, capsys):
    assert demo.main(["--smoke", "--output_dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["stages"]) == ["policy", "samples", "reward", "reward_nf4"]
    assert report["passed"] is None  # a smoke run gives no verdict
    assert not any(stage["cached"] for stage in report["stages"].values())
    for name in ("reward", "reward_nf4"):
        stage = report["stages"][name]
        assert {"random", "majority", "best_of_n", "oracle"} <= set(stage)
        assert stage["reload_difference"] <= 1e-2 * max(1.0, stage["score_std"])
        assert (tmp_path / name / "reward_model.json").is_file()
    assert len(list((tmp_path / "wandb").rglob("*.wandb"))) == 3  # policy and two reward models, all offline
    assert "no verdict" in capsys.readouterr().out

    assert demo.main(["--smoke", "--output_dir", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "report.json").read_text())
    assert all(stage["cached"] for stage in again["stages"].values())
    assert again["stages"]["reward"]["best_of_n"] == report["stages"]["reward"]["best_of_n"]
