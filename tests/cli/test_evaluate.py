"""`trl-ext evaluate` from files to files."""

import json

import pytest

from tests.scoring.conftest import save_reward_model
from trl_ext.cli import main as cli


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PAIRS = [
    {"prompt": f"What is {n} and {n}?", "chosen": f"It is {2 * n}. So it is.", "rejected": "I do not know. Who does?"}
    for n in range(12)
]


def test_a_model_is_evaluated_and_the_report_says_so(tmp_path, capsys):
    model = save_reward_model(tmp_path)
    samples = [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]]} for row in PAIRS]
    status = cli.main(
        ["evaluate", "--model", str(model), "--dataset_name", write(tmp_path / "pairs.jsonl", PAIRS)]
        + ["--samples", write(tmp_path / "samples.jsonl", samples), "--output_dir", str(tmp_path / "out")]
        + ["--resamples", "50", "--probe_rows", "5", "--device", "cpu"]
    )
    assert status == 0
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert 0 <= report["metrics"]["data/accuracy"] <= 1
    assert report["metrics"]["samples/word_distance_to_data"] == pytest.approx(0)
    assert {probe["name"] for probe in report["probes"]} >= {"padding", "eos_text"}
    assert "accuracy" in capsys.readouterr().out


def test_a_function_of_a_file_is_evaluated(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def longest(prompts, completions, **kw):\n    return [len(c) for c in completions]\n"
    )
    rows = write(tmp_path / "pairs.jsonl", PAIRS)
    arguments = ["--reward_funcs", f"{tmp_path}/mine.py:longest", "--dataset_name", rows, "--probes", "false"]
    assert cli.main(["evaluate", *arguments, "--output_dir", str(tmp_path / "out"), "--resamples", "20"]) == 0
    metrics = json.loads((tmp_path / "out" / "evaluation.json").read_text())["metrics"]
    assert metrics["accuracy"] == metrics["length_accuracy"]


def test_a_public_data_set_is_evaluated_as_it_is_released(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def right(prompts, completions, **kw):\n    return [float(c[0]['content'] == 'yes') for c in completions]\n"
    )
    released = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no", "subset": "a", "id": n} for n in range(8)]
    arguments = ["--reward_funcs", f"{tmp_path}/mine.py:right", "--probes", "false", "--resamples", "20"]
    arguments += ["--dataset_name", write(tmp_path / "rows.jsonl", released), "--dataset_format", "rewardbench"]
    assert cli.main(["evaluate", *arguments, "--output_dir", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["metrics"]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needed: one of them"),
        (["--model", "a", "--reward_funcs", "b"], "needed: one of them"),
        (["--reward_funcs", "a", "b"], "names 2 functions"),
        (["--model", "a", "--batch_size", "none"], "--batch_size is 'none'"),
    ],
)
def test_wrong_arguments_fail_in_a_sentence(arguments, message, tmp_path, capsys):
    given = ["evaluate", *arguments, "--dataset_name", "x.jsonl", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        cli.main(given)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
