"""`trl-ext bench policy` times the three trainers and counts PPO's memory."""

import json

import pytest

from trl_ext.cli.main import main


@pytest.mark.slow
def test_every_side_is_timed_and_memory_is_counted(tmp_path, capsys):
    arguments = ["--hidden_size", "32", "--num_layers", "1", "--num_heads", "2", "--shapes", "6,5,2"]
    assert main(["bench", "policy", *arguments, "--steps", "1", "--repeats", "1", "--output_dir", str(tmp_path)]) == 0
    (case,) = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert case["name"] in capsys.readouterr().out
    assert set(case["sides"]) == {"grpo", "dense", "ppo"}
    assert all(side["cpu_seconds_per_step"] > 0 for side in case["sides"].values())
    assert 0 < case["own_share"] < 1 and case["ppo_ratio"] > 0
    memory = case["memory"]
    assert memory["ppo_weights"] > memory["sft_weights"] > 0  # the critic's adapter and head
    assert memory["ppo_peak"] > 0 and memory["ratio"] > 0
    more = ["--memory_only", "--load_in_4bit", "--vocab_size", "5000", "--output_dir", str(tmp_path)]
    assert main(["bench", "policy", *arguments, *more]) == 0
    (case,) = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert set(case) == {"name", "memory"} and case["memory"]["sft_weights"] < memory["sft_weights"] * 5000 / 4096
