"""`trl-ext score` with the folder of an ensemble: scores, members, disagreement, and what is refused."""

import json
import statistics

import pytest

from tests.scoring.ensemble_helpers import save_members
from tests.tiny import pair_rows, ranked_rows
from trl_ext import RewardEnsemble
from trl_ext.cli import main as cli


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble")
    RewardEnsemble(save_members(folder), reduce="min").save(folder / "saved")
    return folder / "saved"


@pytest.fixture
def source(tmp_path):
    row = ranked_rows(1, k=3)[0]
    rows = [
        {"prompt": row["prompt"], "completion": row["completions"][0]},
        {"prompt": row["prompt"], "completions": row["completions"]},
        *pair_rows(1),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(model, source, target, *more):
    return cli.main(["score", "--model", str(model), "--input", str(source), "--output", str(target), *more])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_are_those_of_the_ensemble(ensemble, source, tmp_path):
    assert run(ensemble, source, tmp_path / "out.jsonl") == 0
    one, several, pair = read(tmp_path / "out.jsonl")
    by_hand = RewardEnsemble(ensemble)
    assert one["score"] == pytest.approx(by_hand([one["prompt"]], [one["completion"]])[0], abs=1e-6)
    want = by_hand([several["prompt"]] * 3, several["completions"])
    assert several["scores"] == pytest.approx(want, abs=1e-6)
    assert {"chosen_score", "rejected_score"} <= set(pair)
    assert not [name for row in (one, several, pair) for name in row if name.endswith(("_members", "_disagreement"))]


def test_member_scores_and_disagreement(ensemble, source, tmp_path):
    assert run(ensemble, source, tmp_path / "out.jsonl", "--member_scores", "true") == 0
    one, several, pair = read(tmp_path / "out.jsonl")
    for row, name in ((one, "score"), (pair, "chosen_score"), (pair, "rejected_score")):
        assert len(row[f"{name}_members"]) == 3
        assert row[name] == pytest.approx(min(row[f"{name}_members"]))
        assert row[f"{name}_disagreement"] == pytest.approx(statistics.pstdev(row[f"{name}_members"]))
    assert [min(own) for own in several["scores_members"]] == pytest.approx(several["scores"])
    assert len(several["scores_disagreement"]) == 3
    # a second call has nothing left to do, and one with other columns is refused
    assert run(ensemble, source, tmp_path / "out.jsonl", "--member_scores", "true") == 0
    assert run(ensemble, source, tmp_path / "out.jsonl") == 1


def test_another_reducer_and_its_options(ensemble, source, tmp_path, capsys):
    flags = ["--reduce", "mean_minus_std", "--reduce_kwargs", '{"coefficient": 2.0}']
    assert run(ensemble, source, tmp_path / "out.jsonl", *flags, "--member_scores", "true") == 0
    one = read(tmp_path / "out.jsonl")[0]
    members = one["score_members"]
    assert one["score"] == pytest.approx(statistics.mean(members) - 2 * statistics.pstdev(members), abs=1e-5)
    assert run(ensemble, source, tmp_path / "out.jsonl", "--member_scores", "true") == 1
    assert "reduce='mean_minus_std', now None" in capsys.readouterr().err
    for flags, message in (
        (["--reduce", "meen"], "Did you mean 'mean'"),
        (["--reduce", "mean", "--reduce_kwargs", '{"x": 1}'], "x"),
    ):
        assert run(ensemble, source, tmp_path / "new.jsonl", *flags) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new.jsonl").exists()
    assert run(ensemble / "member-0", source, tmp_path / "new.jsonl", "--reduce", "min") == 1
    assert "Leave out --reduce" in capsys.readouterr().err


def test_another_member_is_another_model(ensemble, source, tmp_path, capsys):
    assert run(ensemble, source, tmp_path / "out.jsonl") == 0
    file = ensemble / "reward_ensemble.json"
    text = file.read_text()
    file.write_text(json.dumps(json.loads(text) | {"reduce": "mean"}))
    try:
        assert run(ensemble, source, tmp_path / "out.jsonl") == 1
        assert "another model" in capsys.readouterr().err
    finally:
        file.write_text(text)


def test_one_model_has_no_members(ensemble, source, tmp_path, capsys):
    assert run(ensemble / "member-0", source, tmp_path / "out.jsonl", "--member_scores", "true") == 1
    assert "reward_ensemble.json" in capsys.readouterr().err
