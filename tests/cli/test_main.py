"""The `trl-ext` command: help without torch, dispatch, `reward` from files of every format, `merge`."""

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

from tests.tiny import pair_rows, ranked_rows, save_tiny_model
from trl_ext.cli import main as cli
from trl_ext.cli.common.train import load_data
from trl_ext.data.sources import file_format, load_source, select_split
from trl_ext.trainers.common.command_line import ArgumentsError, DataArguments


ROOT = Path(__file__).resolve().parents[2]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), "llama")


# Top level


@pytest.mark.parametrize("command", ["choose", "evaluate", "label_preferences", "label_steps", "self_instruct"])
def test_a_misspelt_tracker_is_refused(command):
    parser = importlib.import_module(f"trl_ext.cli.{command}").make_parser()
    with pytest.raises(ArgumentsError, match="invalid choice: 'wandbb'"):
        parser.parse_args(["--report_to", "wandbb"])


def test_help_names_every_command_and_does_not_import_torch():
    code = (
        "import sys; from trl_ext.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'trl', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    for command, line in cli.COMMANDS.items():
        assert f"{command} " in done.stdout
        assert line in done.stdout


def test_no_command_shows_the_help(capsys):
    assert cli.main([]) == 0
    assert "commands:" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("trl-ext 0.")


def test_unknown_command_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["rewrad", "--config", "x.yaml"])
    assert stop.value.code == 2
    assert "unknown command 'rewrad': did you mean 'reward'?" in capsys.readouterr().err


def test_unknown_option_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--verbose"])
    assert stop.value.code == 2
    assert "--verbose" in capsys.readouterr().err


def test_dispatch_passes_the_rest_and_returns_the_status(monkeypatch):
    seen = []
    module = types.ModuleType("trl_ext.cli.score")
    module.main = lambda argv: seen.append(argv) or 3
    monkeypatch.setitem(sys.modules, "trl_ext.cli.score", module)
    assert cli.main(["score", "--model", "x"]) == 3
    assert seen == [["--model", "x"]]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_its_own_help(command, capsys):
    module = importlib.import_module(cli.module_of(command))
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    assert f"usage: trl-ext {command}" in capsys.readouterr().out
    assert module.make_parser().prog == f"trl-ext {command}"


# Where data comes from


def test_a_local_file_of_each_format(tmp_path):
    rows = Dataset.from_list(pair_rows(3))
    write_jsonl(tmp_path / "rows.jsonl", rows.to_list())
    (tmp_path / "rows.json").write_text(json.dumps(rows.to_list()))
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_csv(tmp_path / "rows.csv")
    for extension in ("jsonl", "json", "parquet", "csv"):
        loaded = load_source(str(tmp_path / f"rows.{extension}"))
        assert list(loaded) == ["train"]
        assert loaded["train"].to_list() == rows.to_list()


def test_a_folder_splits_by_file_name(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ranked_rows(3))
    write_jsonl(tmp_path / "test.jsonl", ranked_rows(2))
    loaded = load_source(str(tmp_path))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 3, "test": 2}


def test_a_folder_that_is_named_like_a_file(tmp_path):
    """As Spark writes them."""
    (tmp_path / "rows.parquet").mkdir()
    Dataset.from_list(pair_rows(3)).to_parquet(tmp_path / "rows.parquet" / "part-0.parquet")
    assert len(load_source(str(tmp_path / "rows.parquet"))["train"]) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_that_save_to_disk_wrote(tmp_path, streaming):
    rows = Dataset.from_list(pair_rows(3))
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "both")
    rows.save_to_disk(tmp_path / "one")
    assert list(load_source(str(tmp_path / "both"), streaming=streaming)) == ["train", "test"]
    loaded = load_source(str(tmp_path / "one"), streaming=streaming)["train"]
    assert isinstance(loaded, IterableDataset) == streaming
    assert list(loaded) == rows.to_list()


def test_streaming_a_local_file(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", pair_rows(3))
    loaded = load_source(str(path), streaming=True)["train"]
    assert isinstance(loaded, IterableDataset)
    assert len(list(loaded)) == 3


def test_names_that_cannot_be_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.jsonl"):
        load_source(str(tmp_path / "missing.jsonl"))
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(ValueError, match=r"'\.xlsx'.*\.jsonl"):
        load_source(str(tmp_path / "rows.xlsx"))
    path = write_jsonl(tmp_path / "rows.jsonl", pair_rows(1))
    with pytest.raises(ValueError, match="has no configurations"):
        load_source(str(path), config="en")
    assert file_format("trl-lib/ultrafeedback_binarized") is None


def test_missing_split_says_which_there_are(tmp_path):
    loaded = load_source(str(write_jsonl(tmp_path / "rows.jsonl", pair_rows(1))))
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train'\].*--dataset_test_split"):
        select_split(loaded, "test", "--dataset_test_split")


def load(share, name, datasets=(), streaming=False, **splits):
    script = DataArguments(dataset_name=name, dataset_streaming=streaming, **splits)
    mixture = DatasetMixtureConfig(datasets=list(datasets), test_split_size=share)
    return load_data(script, mixture, evaluate=True, seed=3)


@pytest.mark.parametrize("share", [0.25, 3.0])
@pytest.mark.parametrize("mixture", [False, True])
def test_rows_of_one_file_are_held_out(share, mixture, tmp_path):
    path = str(write_jsonl(tmp_path / "rows.jsonl", pair_rows(12)))
    arguments = (share, None, [DatasetConfig(path=path)]) if mixture else (share, path)
    train, test = load(*arguments)
    assert (len(train), len(test)) == (9, 3)
    texts = [*train["chosen"], *test["chosen"]]
    assert sorted(texts) == sorted(row["chosen"] for row in pair_rows(12))
    again, _ = load(*arguments)
    assert again["chosen"][:] == train["chosen"][:]  # a resumed run, and every process, holds out the same rows


def test_rows_of_a_public_data_set_are_converted_after_the_split(tmp_path):
    said = [f"\n\nHuman: {n}?\n\nAssistant: " for n in range(8)]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"chosen": f"{text}yes", "rejected": f"{text}no"} for text in said])
    train, test = load(2.0, str(path), dataset_format="hh_rlhf")
    assert (len(train), len(test)) == (6, 2) and train.column_names == ["prompt", "chosen", "rejected"]
    assert test[0]["chosen"] == [{"role": "assistant", "content": "yes"}]


def test_an_unknown_format_ends_the_command_before_it_reads(capsys):
    arguments = ["--model_name_or_path", "none", "--dataset_name", "none", "--output_dir", "none"]
    with pytest.raises(SystemExit):
        cli.main(["reward", *arguments, "--dataset_format", "nektar"])
    assert "Did you mean 'nectar'?" in capsys.readouterr().err


def test_rows_that_cannot_be_held_out(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", pair_rows(4))
    write_jsonl(tmp_path / "test.jsonl", pair_rows(4))
    with pytest.raises(ValueError, match="the data set already has one"):
        load(0.5, str(tmp_path))
    train, test = load(0.5, str(tmp_path), dataset_test_split="held_out")
    assert (len(train), len(test)) == (2, 2)
    with pytest.raises(ValueError, match="a stream"):
        load(0.5, str(tmp_path / "train.jsonl"), streaming=True)


# trl-ext reward and trl-ext merge


SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--use_cpu", "--bf16", "false"]


def test_reward_trains_and_merge_makes_one_checkpoint(tiny_base, tmp_path, capsys):
    path = write_jsonl(tmp_path / "rankings.jsonl", ranked_rows(8, k=3))
    out = tmp_path / "out"
    arguments = ["reward", "--model_name_or_path", str(tiny_base), "--dataset_name", str(path), *SHORT]
    arguments += ["--output_dir", str(out), "--loss_type", "plackett_luce", "--use_peft", "--lora_r", "4"]
    assert cli.main(arguments) == 0
    assert (out / "adapter_config.json").is_file()

    capsys.readouterr()
    assert cli.main(["merge", str(out), str(tmp_path / "merged")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["max_change"] < 1e-4
    assert (tmp_path / "merged" / "model.safetensors").is_file()

    from trl_ext import RewardScorer

    prompts, completions = ["What? "] * 3, ["one", "two", "three"]
    before = RewardScorer(str(out))(prompts, completions)
    after = RewardScorer(str(tmp_path / "merged"))(prompts, completions)
    assert after == pytest.approx(before, abs=1e-5)


def test_reward_with_a_mixture_that_names_a_file(tiny_base, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", pair_rows(4))
    write_jsonl(tmp_path / "b.jsonl", pair_rows(4, seed=1))
    config = {
        "datasets": [{"path": str(tmp_path / f"{name}.jsonl")} for name in "ab"],
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "mixture.yaml").write_text(json.dumps(config))  # JSON is YAML
    arguments = ["--config", str(tmp_path / "mixture.yaml"), "--model_name_or_path", str(tiny_base), *SHORT]
    assert cli.main(["reward", *arguments]) == 0
    assert (tmp_path / "out" / "reward_model.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "--learning_rat"),
        (["--loss_typ", "listnet"], "--loss_typ"),
        (["--config", "no/such/file.yaml"], "no/such/file.yaml"),
    ],
)
def test_reward_refuses_what_it_does_not_know(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        cli.main(["reward", "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_reward_refuses_an_unknown_loss_and_names_the_nearest(tiny_base, tmp_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", pair_rows(4))
    arguments = ["--model_name_or_path", str(tiny_base), "--dataset_name", str(path), *SHORT]
    status = cli.main(["reward", *arguments, "--output_dir", str(tmp_path / "out"), "--loss_type", "placket_luce"])
    assert status == 1
    assert "plackett_luce" in capsys.readouterr().err


def test_reward_needs_a_model_and_data(tiny_base, tmp_path, capsys):
    assert cli.main(["reward", "--output_dir", str(tmp_path), *SHORT]) == 1
    assert "--model_name_or_path" in capsys.readouterr().err
    assert cli.main(["reward", "--output_dir", str(tmp_path), "--model_name_or_path", str(tiny_base), *SHORT]) == 1
    assert "--dataset_name" in capsys.readouterr().err


@pytest.mark.slow
def test_reward_under_accelerate_launch(tiny_base, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", pair_rows(8))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command = [*launch, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "trl_ext.cli.reward"]
    command += ["--model_name_or_path", str(tiny_base), "--dataset_name", str(path), *SHORT]
    done = subprocess.run([*command, "--output_dir", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "reward_model.json").is_file()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_name_is_no_pattern(streaming, tmp_path):
    (tmp_path / "x[1].jsonl").write_text('{"a": "right"}\n')
    (tmp_path / "x1.jsonl").write_text('{"a": "wrong"}\n')
    rows = load_source(str(tmp_path / "x[1].jsonl"), streaming=streaming)["train"]
    assert [row["a"] for row in rows] == ["right"]
    folder = tmp_path / "d[1]"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"a": "right"}\n')
    with pytest.raises(ValueError, match="reads as a pattern. Rename it"):
        load_source(str(folder), streaming=streaming)
    assert load_source(str(folder / "train.jsonl"), streaming=streaming)["train"] is not None
