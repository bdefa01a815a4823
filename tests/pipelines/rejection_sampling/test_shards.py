"""`--shard i/n`: machines make parts of a run in one folder or in several, and a merge finds what is missing."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset

from tests.tiny import save_tiny_model
from trl_ext import rejection_sample
from trl_ext.cli.main import main
from trl_ext.pipelines.rejection_sampling.sampler import RejectionSampler
from trl_ext.pipelines.stages.parts import Part
from trl_ext.pipelines.stages.store import StoreError, write_lines


ROWS = [{"prompt": f"Count to {n}:"} for n in range(7)]
OPTIONS = {"num_generations": 2, "shard_size": 2, "max_completion_length": 4}


def length(completions, **columns):
    return [float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("policy"), "llama")


def sampler(tiny, folder, **options):
    return RejectionSampler(tiny, length, Dataset.from_list(ROWS), folder, **OPTIONS | options)


def make_part(tiny, folder, shard, **options):
    part = sampler(tiny, folder, shard=shard, **options)
    part.generate()
    part.score()
    return part


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The selection of a run on one machine."""
    return rejection_sample(tiny, length, Dataset.from_list(ROWS), tmp_path_factory.mktemp("whole"), **OPTIONS)


@pytest.fixture(scope="module")
def parts(tiny, tmp_path_factory):
    """The folders of a run on three machines; copy one before you change it."""
    root = tmp_path_factory.mktemp("parts")
    for number in (1, 2, 3):
        make_part(tiny, root / str(number), f"{number}/3")
    return [root / str(number) for number in (1, 2, 3)]


def shards_in(folder):
    return sorted(int(path.stem[-6:]) for path in Path(folder).glob("rollouts/*/shard-*"))


def test_parts_divide_shards_and_rows():
    for total in (0, 1, 7, 12):
        for count in (1, 2, 3, 9):
            own = [Part(number, count) for number in range(1, count + 1)]
            assert sorted(shard for part in own for shard in part.shards(total)) == list(range(total))
            assert [row for part in own for row in part.rows(total)] == list(range(total))
    assert Part.parse(None) == (1, 1) and Part.parse("2/4") == (2, 4)
    for wrong in ("0/4", "5/4", "1", "a/b", "1/0", "-1/2", "1/2/3", ""):
        with pytest.raises(ValueError, match="needed: i/n with i from 1 to n"):
            Part.parse(wrong)


def test_machines_that_share_a_folder_make_the_run_of_one(tiny, whole, tmp_path):
    first = make_part(tiny, tmp_path, "2/2")
    assert shards_in(tmp_path) == [1, 3]
    with pytest.raises(StoreError, match="2 of 4 shards are missing"):
        first.select()
    make_part(tiny, tmp_path, "1/2")
    assert first.select().dataset.to_list() == whole.to_list()
    with pytest.raises(ValueError, match="a selection needs the samples of all shards"):
        rejection_sample(tiny, length, Dataset.from_list(ROWS), tmp_path, shard="1/2")


def test_folders_of_parts_are_merged_and_checked(tiny, whole, parts, tmp_path):
    assert [shards_in(folder) for folder in parts] == [[0, 3], [1], [2]]
    made = sampler(tiny, tmp_path)
    with pytest.raises(StoreError, match=r"lack 1 of 4 shards of completions \(number 2\).*found are kept"):
        made.merge(parts[:2])
    assert shards_in(tmp_path) == [0, 1, 3]
    made.merge([*parts, parts[0]])  # the same folder twice, and shards that are here already
    assert made.select().dataset.to_list() == whole.to_list()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        made.merge([tmp_path / "nowhere"])


def test_parts_that_do_not_fit_are_refused(tiny, parts, tmp_path):
    with pytest.raises(StoreError, match="2/rollouts holds completions made with other settings .*seed=0, now 1"):
        sampler(tiny, tmp_path / "seed", seed=1).merge([parts[1]])
    with pytest.raises(StoreError, match="rollouts holds no completions"):
        (tmp_path / "empty").mkdir()
        sampler(tiny, tmp_path / "none").merge([tmp_path / "empty"])

    twice = shutil.copytree(parts[1], tmp_path / "twice")
    (path,) = twice.glob("rollouts/*/shard-000001.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["crc"]
        line["samples"][0]["text"] += "!"
    write_lines(path, lines)
    with pytest.raises(StoreError, match="Shard 1 of the completions is there twice, with different content") as said:
        sampler(tiny, tmp_path / "both").merge([*parts, twice])
    assert str(path) in str(said.value) and str(parts[1]) in str(said.value)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StoreError, match="shard-000001.*truncated"):
        sampler(tiny, tmp_path / "damaged").merge([twice])

    unscored = shutil.copytree(parts[0], tmp_path / "unscored")
    shutil.rmtree(unscored / "scores")
    with pytest.raises(StoreError, match="scores/length holds no scores of length"):
        sampler(tiny, tmp_path / "scores").merge([unscored, *parts[1:]])
    sampler(tiny, tmp_path / "scores").merge([unscored, *parts[1:]], scores=False)


def test_the_command_makes_parts_and_merges_them(tiny, whole, tmp_path, capsys):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def command(folder, *more):
        flags = {"model_name_or_path": tiny, "reward_funcs": f"{__file__}:length", "dataset_name": rows} | OPTIONS
        flags["output_dir"] = tmp_path / folder
        return main(["rejection-sample", *(str(part) for n, v in flags.items() for part in (f"--{n}", v)), *more])

    for number in ("1", "2"):
        assert command(number, "--shard", f"{number}/2") == 0
        assert json.loads(capsys.readouterr().out)["shard"] == f"{number}/2"
    assert command("all", "--shards_from", str(tmp_path / "1")) == 1
    assert "lack 2 of 4 shards of completions (number 1, 3)" in capsys.readouterr().err
    assert command("all", "--shards_from", str(tmp_path / "1"), str(tmp_path / "2")) == 0
    report = json.loads(capsys.readouterr().out)
    picked = [json.loads(line)["completion"] for line in Path(report["path"]).read_text().splitlines()]
    assert picked == whole["completion"]
    for wrong in (["3/2"], ["1/2", "--stage", "select"], ["1/2", "--shards_from", "x"]):
        with pytest.raises(SystemExit):
            command("all", "--shard", *wrong)
        assert "shard" in capsys.readouterr().err
