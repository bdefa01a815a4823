"""`examples/measure_gpu.py`: rows run tiny on a CPU, go on where they stopped, keep the budget; bars on a GPU."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from tests.tiny import pair_rows, save_tiny_model


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = runpy.run_path(str(ROOT / "examples" / "measure_gpu.py"), run_name="measure_gpu")


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
        assert row.get("loss_difference", 0.0) < 1e-2 and row.get("gradient_difference", 0.0) < 1e-1
        assert all(apart < 1e-2 for apart in row.get("difference", {}).values())


def test_pairs_stand_beside_trl_and_configs_have_their_peak(tmp_path):
    """The loss and the gradients of `trl.RewardTrainer` on the same model and pairs."""
    only = ["reward step, pairs", "config prm/"]
    assert SCRIPT["main"](["--smoke", "--output", str(tmp_path), "--budget", "3600", "--only", *only]) == 0
    pairs, config = rows_of(tmp_path)
    assert set(pairs["seconds"]) == {"flat", "padded", "trl.RewardTrainer"}
    assert pairs["loss_difference"] < 1e-2 and pairs["gradient_difference"] < 1e-1
    assert pairs["token_bound"]["trl.RewardTrainer"] == pytest.approx(4 / 3)
    assert pairs["groups"] == [[16, [16, 16]]] * 2
    assert config["config"] == "configs/prm/prm_qlora_8b.yaml" and config["batch"] == "2 rows of 512 + 512 tokens"


def test_the_page_is_made_of_the_rows(tmp_path):
    """The tables of docs/results and the header of a config, from rows as a GPU would write them."""
    page = runpy.run_path(str(ROOT / "docs" / "make_gpu_page.py"), run_name="page")
    about = {"machine": "NVIDIA H100", "shape": "Qwen/Qwen3-8B", "torch": "2.13.0"}
    peak = {"allocated_gib": 6.25, "reserved_gib": 6.5}
    rows = [
        about
        | peak
        | {
            "row": "reward step",
            "ratio": {"padded": 2.3},
            "token_bound": {"padded": 2.5},
        },
        about | {"row": "attention", "fastest": "b", "seconds": {"a": 0.2, "b": 0.1}, "difference": {"a": 0, "b": 0}},
        about | peak | {"row": "config", "config": "configs/prm/prm_qlora_8b.yaml", "batch": "2 rows of 9 tokens"},
        about | {"row": "failed", "error": "RuntimeError"},
    ]
    rows[0] |= {"groups": [], "tokens_per_second": 5000.0, "percent_of_bf16": 41.0, "loss_difference": 1e-4}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "configs" / "prm" / "prm_qlora_8b.yaml"
    config.parent.mkdir(parents=True)
    config.write_text((ROOT / "configs" / "prm" / "prm_qlora_8b.yaml").read_text())
    (tmp_path / "docs" / "results").mkdir(parents=True)
    assert page["main"]([str(tmp_path / "rows.jsonl"), "--root", str(tmp_path), "--no_estimates"]) == 0
    speed, memory, attention = (
        json.loads((tmp_path / "docs" / "results" / f"gpu_{name}.json").read_text())
        for name in ("speed", "memory", "attention")
    )
    assert speed["rows"][0][:5] == ["reward step", "2.30x padded", "2.50", "5,000", "41 %"]
    assert [row[1:3] for row in memory["rows"]] == [["6.2", "6.5"]] * 2
    assert attention["rows"][1] == ["attention: b", "100.00", "0.0e+00", "fastest"]
    assert "# Memory: 6.5 GiB reserved (6.2 allocated)" in config.read_text()
    assert "capped at 24 GB for 2 rows of 9 tokens" in config.read_text() and "# Data: " in config.read_text()
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1] | {"machine": "L4"}))
    assert page["main"]([str(tmp_path / "rows.jsonl"), "--root", str(tmp_path)]) == 2


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
