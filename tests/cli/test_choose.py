"""`trl-ext choose`: the chosen rows in a file, a report, and arguments that cannot work."""

import json
import math
from datetime import datetime
from pathlib import Path

import pytest
import wandb
from datasets import Dataset

from tests.scoring.conftest import save_reward_model
from tests.tiny import pair_rows
from trl_ext.cli import main as cli
from trl_ext.cli.choose import log_to_wandb, make_parser
from trl_ext.pipelines.choice.choose import choose_rows, chosen_rows


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    for name, rows in (("pool", pair_rows(20)), ("labelled", pair_rows(10, seed=3))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_reward_model(folder)
    return folder


def run(folder, output, *more):
    return cli.main(["choose", "--dataset_name", str(folder / "pool.jsonl"), "--output", str(output), *more])


def test_rows_are_written_in_order_with_a_report(folder, tmp_path, capsys):
    flags = ("--n", "4", "--model", str(folder / "reward"), "--fit_uncertainty", str(folder / "labelled.jsonl"))
    assert run(folder, tmp_path / "new" / "chosen.jsonl", *flags) == 0
    report = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (tmp_path / "new" / "chosen.jsonl").read_text().splitlines()]
    pool = pair_rows(20)
    assert [row["choice_order"] for row in rows] == [0, 1, 2, 3]
    assert all(row["prompt"] == pool[row["choice_row"]]["prompt"] for row in rows)
    assert report["labelled"] == 10 and report["strategy"] == "fisher" and report["chosen"] == 4


def test_values_of_the_pool_are_written_as_they_are(tmp_path):
    more = {"x": [0.1234567890123456, 1e-12, math.nan], "day": [datetime(2020, 1, 2)] * 3, "note": ["a/ä\u2028"] * 3}
    pool = Dataset.from_list(pair_rows(3))
    for name, values in more.items():
        pool = pool.add_column(name, values)
    pool.to_parquet(tmp_path / "pool.parquet")
    arguments = ["--dataset_name", str(tmp_path / "pool.parquet"), "--output", str(tmp_path / "chosen.jsonl")]
    assert cli.main(["choose", *arguments, "--n", "3", "--strategy", "random"]) == 0
    lines = (tmp_path / "chosen.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    rows = sorted(map(json.loads, lines), key=lambda row: row["choice_row"])
    assert [row["x"] for row in rows] == [0.1234567890123456, 1e-12, None]
    assert {row["day"] for row in rows} == {"2020-01-02 00:00:00"} and {row["note"] for row in rows} == {"a/ä\u2028"}


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--n", "2"], "needs --model"),
        (["--n", "2", "--strategy", "random", "--batch_size", "0"], "batch_size"),
    ],
)
def test_wrong_arguments(folder, tmp_path, capsys, flags, complaint):
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "out.jsonl", *flags)
    assert complaint in capsys.readouterr().err


def test_more_rows_than_the_pool_and_an_existing_output(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out.jsonl", "--n", "21", "--strategy", "random") == 1
    assert "20 rows" in capsys.readouterr().err
    assert run(folder, tmp_path / "out.jsonl", "--n", "3", "--strategy", "random") == 0
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "out.jsonl", "--n", "3", "--strategy", "random")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "choose").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_parsed_and_say_their_command(path):
    (args,) = make_parser().parse_args_and_config(["--config", str(path)])
    assert f"trl-ext choose --config configs/choose/{path.name}" in path.read_text()
    assert args.n == 500 and args.diversity == "determinant"


def test_numbers_and_rows_go_to_the_run_that_is_open(monkeypatch):
    logged = {}
    run = type("Run", (), {"log": lambda self, values: logged.update(values)})()
    monkeypatch.setattr(wandb, "run", run)
    pool = pair_rows(20)
    choice = choose_rows(None, pool, 3, "random")
    log_to_wandb(choice.report, chosen_rows(pool, choice))
    assert logged["choose/pool"] == 20 and logged["choose/chosen"] == 3
    table = logged["choose/rows"]
    place = table.columns.index("choice_row")
    assert [int(row[place]) for row in table.data] == choice.rows
