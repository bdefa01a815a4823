"""`examples/measure_gpu.py`: rows run tiny on a CPU, go on where they stopped, keep the budget; bars on a GPU."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from tests.tiny import pair_rows, save_tiny_model


SCRIPT = runpy.run_path(
    str(Path(__file__).resolve().parents[2] / "examples" / "measure_gpu.py"), run_name="measure_gpu"
)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_rows_go_on_where_they_stopped_and_keep_the_budget(tmp_path, capsys):
    arguments = ["--smoke", "--output", str(tmp_path), "--only", "PRM", "profile"]
    assert SCRIPT["main"]([*arguments, "--budget", "20"]) == 0  # the PRM's row usually takes 30 seconds
    assert [row["row"] for row in rows_of(tmp_path)] == ["profile of a reward step"]
    assert "Not started within 20 s" in capsys.readouterr().out
    assert SCRIPT["main"](arguments) == 0
    profiled, stepped = rows_of(tmp_path)
    assert sum(profiled["shares"].values()) == pytest.approx(1.0)
    assert stepped["row"].startswith("PRM")
    assert stepped["token_bound"]["padded"] == pytest.approx(4 * 32 / (16 + 4 * 16))
    assert stepped["loss_difference"] < 1e-2 and stepped["gradient_difference"] < 1e-1


def test_a_row_that_cannot_run_says_why_and_the_others_run(tmp_path, monkeypatch):
    def fails(bed):
        raise torch.OutOfMemoryError("too little memory")

    rows = {"small": (lambda bed: {"ratio": 1.0}, 1), "large": (fails, 1), "last": (lambda bed: {}, 1)}
    monkeypatch.setitem(SCRIPT["main"].__globals__, "ROWS", rows)
    assert SCRIPT["main"](["--smoke", "--output", str(tmp_path)]) == 1
    assert [("error" in row) for row in rows_of(tmp_path)] == [False, True, False]
    assert "too little memory" in rows_of(tmp_path)[1]["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_sentence(tmp_path, capsys):
    assert SCRIPT["main"](["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_every_row_runs_at_tiny_size(tmp_path):
    assert SCRIPT["main"](["--smoke", "--output", str(tmp_path), "--budget", "3600"]) == 0
    rows = {row["row"]: row for row in rows_of(tmp_path)}
    assert list(rows) == list(SCRIPT["ROWS"]) and not [row for row in rows.values() if "error" in row]
    for row in rows.values():
        assert row.get("loss_difference", 0.0) < 1e-2
        assert all(apart < 1e-2 for apart in row.get("difference", {}).values())


@pytest.mark.slow
def test_a_real_model_is_trained_from_a_folder(tmp_path):
    model = save_tiny_model(tmp_path / "model", "qwen3")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(40)))
    arguments = ["--smoke", "--model", str(model), "--dataset", str(tmp_path / "rows.jsonl")]
    assert SCRIPT["main"]([*arguments, "--output", str(tmp_path / "out")]) == 0
    (row,) = rows_of(tmp_path / "out")
    assert "eval_accuracy" in row["metrics"] and row["rows"] == 36


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peaks_of_an_8b_model_are_below_their_bars(tmp_path):
    assert SCRIPT["main"](["--only", "peak", "--output", str(tmp_path)]) == 0
    assert all(row["bar_met"] for row in rows_of(tmp_path))
