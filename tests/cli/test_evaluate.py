"""`trl-ext evaluate` from files to files."""

import json

import pytest
from peft import LoraConfig

from tests.scoring.conftest import save_reward_model
from tests.serving.served_folders import save_base, save_reward
from tests.tiny import save_tiny_model
from trl_ext import RewardEnsemble, RewardScorer
from trl_ext.cli import main as cli
from trl_ext.cli.evaluate import EvaluateArguments


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


def save_adapter(folder):
    """A reward adapter with probes on the base `folder / "base"`."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    return save_reward(save_base(folder / "base"), folder / "reward", seed=1, lora=lora)


def margins(scorer):
    """The mean score difference of the pairs."""
    prompts = [row["prompt"] for row in PAIRS]
    chosen, rejected = (scorer(prompts, [row[name] for row in PAIRS]) for name in ("chosen", "rejected"))
    return sum(c - r for c, r in zip(chosen, rejected, strict=True)) / len(PAIRS)


def test_a_model_that_is_compared_with_a_function_gets_the_options(tmp_path):
    model = save_adapter(tmp_path)
    (tmp_path / "mine.py").write_text("def zero(prompts, completions, **kw):\n    return [0.0 for c in completions]\n")
    base = (tmp_path / "base").rename(tmp_path / "moved")
    arguments = ["--reward_funcs", f"{tmp_path}/mine.py:zero", "--dataset_name", write(tmp_path / "p.jsonl", PAIRS)]
    arguments += ["--compare", str(model), "--base_model", str(base), "--max_length", "18", "--device", "cpu"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--resamples", "20", "--probes", "false"]
    assert cli.main(["evaluate", *arguments]) == 0
    compared = json.loads((tmp_path / "out" / "evaluation.json").read_text())["compared"]
    assert compared["model"] == str(model)
    cut = RewardScorer(model, base_model=base, max_length=18, device="cpu")
    assert compared["differences"]["margin"]["difference"] == pytest.approx(-margins(cut), abs=1e-5)
    assert cut.num_truncated > 0


def test_an_ensemble_is_put_on_a_base_that_moved(tmp_path):
    model = save_adapter(tmp_path)
    ensemble = RewardEnsemble([model])
    ensemble.save(tmp_path / "ensemble")
    base = (tmp_path / "base").rename(tmp_path / "moved")
    arguments = ["--model", str(tmp_path / "ensemble"), "--base_model", str(base), "--device", "cpu"]
    arguments += ["--dataset_name", write(tmp_path / "pairs.jsonl", PAIRS), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["evaluate", *arguments, "--resamples", "20", "--probes", "false"]) == 0
    metrics = json.loads((tmp_path / "out" / "evaluation.json").read_text())["metrics"]
    assert metrics["margin"] == pytest.approx(margins(ensemble), abs=1e-5)


def test_two_ways_to_calibrate_are_refused(tmp_path):
    (tmp_path / "reward_model.json").write_text("{}")
    with pytest.raises(ValueError, match="leave out --calibrated"):
        EvaluateArguments("rows", "out", model=str(tmp_path), calibrated=True, calibrate="isotonic")


def test_a_public_data_set_is_evaluated_as_it_is_released(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def right(prompts, completions, **kw):\n    return [float(c[0]['content'] == 'yes') for c in completions]\n"
    )
    released = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no", "subset": "a", "id": n} for n in range(8)]
    arguments = ["--reward_funcs", f"{tmp_path}/mine.py:right", "--probes", "false", "--resamples", "20"]
    arguments += ["--dataset_name", write(tmp_path / "rows.jsonl", released), "--dataset_format", "rewardbench"]
    assert cli.main(["evaluate", *arguments, "--output_dir", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["metrics"]["accuracy"] == 1.0


def test_a_policy_is_sampled_and_the_model_folder_keeps_card_and_calibration(tmp_path, monkeypatch):
    model = save_reward_model(tmp_path)
    policy = save_tiny_model(tmp_path / "policy", "llama")
    rows = [row | {"prompt": f"{n}: {row['prompt']}"} for n, row in enumerate(PAIRS * 4)]
    scorer, prompts = RewardScorer(model, device="cpu"), [row["prompt"] for row in rows]
    scores = [scorer(prompts, [row[name] for row in rows]) for name in ("chosen", "rejected")]
    for n, (row, chosen, rejected) in enumerate(zip(rows, *scores, strict=True)):
        if (chosen > rejected) != (n % 4 > 0):  # three of four are ordered right, whatever this random model prefers
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    arguments = (
        ["evaluate", "--model", str(model), "--dataset_name", write(tmp_path / "pairs.jsonl", rows)]
        + ["--policy", str(policy), "--policy_prompts", "5", "--num_generations", "3", "--max_completion_length", "4"]
        + ["--output_dir", str(tmp_path / "out"), "--resamples", "20", "--probes", "false", "--device", "cpu"]
    )
    assert cli.main([*arguments, "--update_model_card", "true", "--calibrate", "temperature"]) == 0
    file = tmp_path / "out" / "policy_samples.jsonl"
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert [len(row["completions"]) for row in samples] == [3] * 5
    assert {row["prompt"] for row in samples} <= {row["prompt"] for row in rows}
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert 0 <= report["metrics"]["samples/within_prompt_variance_share"] <= 1
    assert report["settings"]["rows"] == 48 + 5
    assert "within_prompt_variance_share" in (model / "README.md").read_text()
    calibration = json.loads((model / "reward_model.json").read_text())["calibration"]
    assert calibration["temperature"] == report["calibrations"]["temperature"]["temperature"]

    monkeypatch.delattr("trl_ext.pipelines.policy_samples.make_generator")  # a rerun reads the samples
    assert cli.main([*arguments, "--calibrated", "true"]) == 0
    assert [json.loads(line) for line in file.read_text().splitlines()] == samples
    again = json.loads((tmp_path / "out" / "evaluation.json").read_text())["metrics"]
    assert again["data/margin"] == pytest.approx(
        report["metrics"]["data/margin"] / calibration["temperature"], rel=1e-4
    )
    assert again["data/accuracy"] == report["metrics"]["data/accuracy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needed: one of them"),
        (["--model", "a", "--reward_funcs", "b"], "needed: one of them"),
        (["--reward_funcs", "a", "b"], "names 2 functions"),
        (["--model", "a", "--batch_size", "none"], "--batch_size is 'none'"),
        (["--model", "a", "--update_model_card", "true"], "--update_model_card writes into the folder of --model"),
        (["--reward_funcs", "a", "--calibrate", "temperature"], "--calibrate writes into the folder of --model"),
        (["--model", ".", "--calibrate", "isotonic"], "--calibrate stores into reward_model.json, and . has none"),
        (
            ["--reward_funcs", "a", "--max_length", "9", "--calibrated", "1"],
            "--max_length, --calibrated with --reward",
        ),
        (["--model", "a", "--policy", "b", "--samples", "c"], "Samples need no policy"),
        (["--model", "a", "--policy", "b", "--num_generations", "0"], "--num_generations is 0"),
    ],
)
def test_wrong_arguments_fail_in_a_sentence(arguments, message, tmp_path, capsys):
    given = ["evaluate", *arguments, "--dataset_name", "x.jsonl", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        cli.main(given)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
