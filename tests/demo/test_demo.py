"""The demo: an exact verifier, honest picks, and every stage runs, is cached and reported."""

import json

import pytest

from trl_ext.cli import demo
from trl_ext.demo import token_stages
from trl_ext.demo.dense_stages import LineRewards, right
from trl_ext.demo.model import tiny_reward_base
from trl_ext.demo.picking import compare_picks
from trl_ext.demo.report import _dense_lines
from trl_ext.demo.task import SPLITS, Problem, final_answer, make_problems, verify
from trl_ext.pipelines.stages.cached_stages import StageContext


MODELS = ("reward", "reward_nf4", "orm", "prm", "ensemble")


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
        assert make_problems(150, split, seed=1) == problems[:150]  # what a stage draws further on is new
    with pytest.raises(ValueError, match="unknown split 'exam'"):
        make_problems(1, "exam", seed=1)


def test_picks_by_hand():
    """Two prompts with three samples: the model picks a right one, then a wrong one."""
    right = [[True, False, False], [True, True, False]]
    answers = [["a", "b", "b"], ["c", "c", "d"]]
    scores = [[2.0, 1.0, 0.0], [0.0, 0.5, 3.0]]
    weights = [[0.9, 0.1, 0.2], [0.1, 0.1, 0.3]]
    picks = compare_picks(right, answers, scores, weights)
    assert picks["random"]["mean"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert picks["majority"]["mean"] == pytest.approx(0.5)
    assert picks["best_of_n"]["mean"] == pytest.approx(0.5)
    assert picks["weighted_vote"]["mean"] == pytest.approx(0.5)  # 0.9 against 0.3, then 0.2 against 0.3
    assert picks["oracle"]["mean"] == pytest.approx(1.0)
    assert picks["best_of_n_over_random"]["mean"] == pytest.approx(0.0)


@pytest.mark.slow  # `.ci/run` runs the whole demo
def test_a_smoke_run_reports_every_stage_and_the_next_one_reuses_them(tmp_path, capsys):
    assert demo.main(["--smoke", "--output_dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["stages"]) == ["policy", "samples", *MODELS, "weak_to_strong", "rejection", "dense"]
    assert report["passed"] is None  # a smoke run gives no verdict
    assert not any(stage["cached"] for stage in report["stages"].values())
    for name in MODELS:
        stage = report["stages"][name]
        assert {"random", "majority", "best_of_n", "weighted_vote", "oracle"} <= set(stage)
        assert stage["oracle"] == report["oracle"] and stage["majority"] == report["majority"]  # the same samples
        assert stage["reload_difference"] <= 1e-2 * max(1.0, stage["score_std"])
        sidecar = "member-0/reward_model.json" if name == "ensemble" else "reward_model.json"
        assert (tmp_path / name / sidecar).is_file()
    assert len(list((tmp_path / "wandb").rglob("*.wandb"))) == 2 + len(MODELS)  # with policy and dense, all offline
    kinds = {name: json.loads((tmp_path / name / "reward_model.json").read_text())["kind"] for name in MODELS[:-1]}
    assert kinds == {"reward": "scalar", "reward_nf4": "scalar", "orm": "outcome", "prm": "process"}
    assert {"mean", "standard_error"} == set(report["stages"]["prm"]["best_of_n_prod"])
    assert list(report["stages"]["ensemble"]["best_of_n_by"]) == ["member-0", "member-1", "member-2", "min", "uwo"]
    arms = report["stages"]["rejection"]["arms"]
    assert list(arms) == ["random", "verifier", "orm", "reward"] and {arm["rows"] for arm in arms.values()} == {32}
    assert arms["random"]["right"] <= arms["verifier"]["right"]
    dense = report["stages"]["dense"]
    assert list(dense["arms"]) == ["outcome", "shaped"] and dense["samples"] == 2 * 2 * 8
    assert {"mean", "standard_error"} == set(dense["before"]) == set(dense["arms"]["shaped"]["over_outcome"])
    assert "piece rewarded" in (tmp_path / "dense" / "shaped" / "policy.html").read_text(encoding="utf-8")
    assert list((tmp_path / "wandb").rglob("media/html/train/completions/*.html"))
    models = report["stages"]["weak_to_strong"]
    assert models["test_rows"] == 12 and all(0 <= models[name] <= 1 for name in ("weak", "student", "ceiling"))
    printed = capsys.readouterr().out
    assert "no verdict" in printed and "performance gap recovered" in printed
    for line in (
        "by outcome model (all weights)",
        "by process model (all weights), prod",
        "vote weighted by process model",
        "the outcome, shaped by the process model",
    ):
        assert line in printed
    assert (tmp_path / "plot.png").stat().st_size > 10_000

    assert demo.main(["--smoke", "--output_dir", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "report.json").read_text())
    assert all(stage["cached"] for stage in again["stages"].values())
    for name in MODELS:
        assert again["stages"][name]["best_of_n"] == report["stages"][name]["best_of_n"]


def test_the_verdicts_become_labels_of_answers_and_lines(tmp_path, monkeypatch):
    """Lines after the first wrong one have no label in training."""
    seen = {}

    def prepared(trainer_class):
        class Recorded(trainer_class):
            def train(self, *args, **kwargs):
                seen[self.kind] = self.train_dataset
                return super().train(*args, **kwargs)

        return Recorded

    monkeypatch.setattr(token_stages, "ORMTrainer", prepared(token_stages.ORMTrainer))
    monkeypatch.setattr(token_stages, "PRMTrainer", prepared(token_stages.PRMTrainer))
    problems = make_problems(4, "train", seed=3)
    rows = [
        {
            "prompt": problem.prompt,
            "completions": (texts := [problem.solution, "9\n" * len(problem.digits)]),
            "steps_right": [list(verify(problem, text).steps_right) for text in texts],
            "answer_right": [verify(problem, text).answer_right for text in texts],
        }
        for problem in problems
    ]
    samples = tmp_path / "samples"
    samples.mkdir()
    for split in ("train", "held_out"):
        (samples / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_reward_base(tmp_path / "policy", hidden_size=16, num_layers=1, num_heads=2)
    settings = {"seed": 0, "steps": 1, "batch_size": 8, "learning_rate": 1e-3, "lora_rank": 2}
    for name in ("orm", "prm"):
        (tmp_path / name).mkdir()
        folders = {"policy": tmp_path / "policy", "samples": samples}
        context = StageContext(tmp_path / name, settings, {}, folders, "none", lambda share: None)
        result = {"orm": token_stages.run_orm, "prm": token_stages.run_prm}[name](context)
        assert (result["n"], result["random"]["mean"], result["oracle"]["mean"]) == (2, 0.5, 1.0)
    for row, other in zip(*[iter(seen["outcome"])] * 2, strict=True):
        assert (row["label_values"], other["label_values"]) == ([1.0], [0.0])
    for row, other, problem in zip(*[iter(seen["process"])] * 2, problems, strict=True):
        assert row["label_values"] == [1.0] * (len(problem.digits) + 1)  # to end there is right as well
        assert other["label_values"] == [0.0]  # the first line is wrong, and no other counts


def test_the_last_line_of_a_solution_gets_the_reward_of_ending_there():
    class Scorer:
        def score_steps(self, prompts, steps):
            assert steps == [["2", "7", ""], [""], ["2", ""]]
            return [[0.9, 0.8, 0.1], [0.5], [0.7, 0.3]]

    rewards = LineRewards(Scorer())(["72:\n"] * 3, ["2\n7\n", "", "2"])
    assert rewards == [[(0, 2, 0.9), (2, 4, 0.1)], None, [(0, 1, 0.3)]]
    assert right(["72:\n"] * 3, ["2\n7\n", "7\n2\n", ""]) == [1.0, 0.0, 0.0]


def test_a_table_of_grpo_compares_it_with_the_outcome_alone():
    figure = {"mean": 0.5, "standard_error": 0.01}
    arms = {"outcome": {"exact_match": figure}, "shaped": {"exact_match": figure, "over_outcome": figure}}
    lines = _dense_lines({"before": figure, "samples": 5120, "arms": arms})
    assert "5120 samples" in lines[0] and len(lines) == 5
    assert lines[-1].endswith("gain over the outcome alone +0.500 ± 0.010")
