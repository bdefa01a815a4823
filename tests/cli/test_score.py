"""`trl-ext score`: rows in order with their scores, resumed at any point, refused where that would be wrong."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.scoring.conftest import save_reward_model
from tests.tiny import pair_rows, ranked_rows
from trl_ext import RewardScorer
from trl_ext.cli import main as cli
from trl_ext.cli import score


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="module")
def rows():
    """Rows of every kind, of many lengths."""
    completion = [
        {
            "id": i,
            "prompt": row["prompt"] * (1 + i % 3),
            "completion": row["completions"][0],
            "extra": {"größe": [1.5, None]},
        }
        for i, row in enumerate(ranked_rows(7, k=2))
    ]
    several = [{"prompt": r["prompt"], "completions": r["completions"]} for r in ranked_rows(5, k=4, ragged=True)]
    chats = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pair_rows(3, chat=True)]
    mixed = [row for group in zip(completion, several, pair_rows(5), strict=False) for row in group]
    return [*mixed, *chats, *pair_rows(2, chat=True), {"completion": "The quick test"}, *completion[5:]]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def run(model, source, target, *more):
    return cli.main(["score", "--model", str(model), "--input", str(source), "--output", str(target), *more])


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(score, "CHUNK_ROWS", 4)


def numbers(row):
    found = [row[name] for name in score.SCORE_COLUMNS if name in row]
    return [number for value in found for number in (value if isinstance(value, list) else [value])]


def test_every_row_in_order_whatever_the_batch(model, rows, tmp_path, small_chunks):
    source = write(tmp_path / "rows.jsonl", rows)
    scorer = RewardScorer(model, batch_size=1)
    want = []
    for row in rows:
        values = row.get("completions") or (
            [row["completion"]] if "completion" in row else [row["chosen"], row["rejected"]]
        )
        want.append(scorer([row.get("prompt")] * len(values), values))
    for batch_size in ("1", "3", "64", "auto"):
        target = tmp_path / f"{batch_size}.jsonl"
        assert run(model, source, target, "--batch_size", batch_size) == 0
        scored = read(target)
        assert len(scored) == len(rows)
        for before, after, scores in zip(rows, scored, want, strict=True):
            assert {k: v for k, v in after.items() if k not in score.SCORE_COLUMNS} == before
            assert numbers(after) == pytest.approx(scores, abs=1e-6)
            names = set(after) - set(before)
            kind = {"completion": {"score"}, "completions": {"scores"}, "chosen": {"chosen_score", "rejected_score"}}
            assert names == next(value for key, value in kind.items() if key in before)


def test_other_columns_config_file_and_cut_rows(model, tmp_path, capsys):
    data = [{"question": r["prompt"], "answers": [r["chosen"], r["rejected"]]} for r in pair_rows(3)]
    source = write(tmp_path / "rows.jsonl", data)
    config = tmp_path / "score.yaml"
    config.write_text(
        f"model: {model}\nprompt_column: question\ncompletion_column: answers\nbatch_size: 2\nmax_length: 12\n"
    )
    target = tmp_path / "out" / "scored.jsonl"  # its folder is made
    assert cli.main(["score", "--config", str(config), "--input", str(source), "--output", str(target)]) == 0
    scorer = RewardScorer(model, max_length=12)
    for row, scored in zip(data, read(target), strict=True):
        assert scored["scores"] == pytest.approx(scorer([row["question"]] * 2, row["answers"]), abs=1e-6)
    assert "Scored 3 rows, 6 completions cut to max_length=12." in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        config.write_text("model: x\nbatchsize: 2\n")
        cli.main(["score", "--config", str(config), "--input", str(source), "--output", str(target)])
    assert stop.value.code == 2
    assert "batchsize" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [(["--batch_size", "0"], "batch_size"), (["--batch_size", "many"], "batch_size"), (["--nothing", "1"], "nothing")],
)
def test_bad_flags(model, tmp_path, capsys, flags, complaint):
    with pytest.raises(SystemExit) as stop:
        run(model, "rows.jsonl", tmp_path / "out.jsonl", *flags)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


def test_tools_and_template_arguments_are_used(model, tmp_path):
    row = pair_rows(1, chat=True)[0]
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    data = [{"prompt": row["prompt"], "completion": row["chosen"], **extra} for extra in (
        {}, {"tools": [tool]}, {"chat_template_kwargs": {"thinking": True}}
    )]  # fmt: skip
    target = tmp_path / "out.jsonl"
    assert run(model, write(tmp_path / "rows.jsonl", data), target) == 0
    assert len({round(scored["score"], 5) for scored in read(target)}) == 3


def test_standard_input_and_output(model, rows, tmp_path, monkeypatch, capsysbinary):
    text = "".join(json.dumps(row) + "\n" for row in rows[:6]).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert run(model, "-", "-") == 0
    scored = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    assert [{k: v for k, v in row.items() if k not in score.SCORE_COLUMNS} for row in scored] == rows[:6]


# Resuming


@pytest.fixture(scope="module")
def finished(model, rows, tmp_path_factory):
    """The output of an uninterrupted run, and its manifest."""
    folder = tmp_path_factory.mktemp("finished")
    write(folder / "rows.jsonl", rows)
    assert run(model, folder / "rows.jsonl", folder / "out.jsonl") == 0
    return folder


def test_a_run_cut_off_anywhere_is_completed(model, finished, tmp_path, small_chunks):
    whole = (finished / "out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    start = sum(map(len, lines[:5]))
    assert b"\xc3\xb6" in b"".join(lines)  # two bytes of one letter are a place to be cut off as well
    letter = whole.index(b"\xc3\xb6") + 1
    for at in (0, 3, letter, start, start + 1, start + len(lines[5]) - 1, len(whole) - 1, len(whole)):
        folder = tmp_path / str(at)
        shutil.copytree(finished, folder)
        os.truncate(folder / "out.jsonl", at)
        assert run(model, folder / "rows.jsonl", folder / "out.jsonl") == 0
        again = read(folder / "out.jsonl")
        assert len(again) == len(lines)
        for a, b in zip(again, map(json.loads, lines), strict=True):
            assert list(a) == list(b)
            assert numbers(a) == pytest.approx(numbers(b), abs=1e-6)
        kept = whole[:at].rfind(b"\n") + 1
        assert (folder / "out.jsonl").read_bytes()[:kept] == whole[:kept]  # what was there is not scored again


def test_nothing_is_loaded_when_nothing_is_left(model, finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.setattr("trl_ext.RewardScorer", None)
    assert run(model, tmp_path / "copy" / "rows.jsonl", tmp_path / "copy" / "out.jsonl") == 0
    assert "Scored 0 rows; 23 rows already had scores" in capsys.readouterr().err


def test_rows_added_to_the_input_are_scored(model, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    source = tmp_path / "copy" / "rows.jsonl"
    with open(source, "a") as file:
        file.write("\n" + json.dumps({"completion": "A good answer"}) + "\n")
    assert run(model, source, tmp_path / "copy" / "out.jsonl") == 0
    assert (tmp_path / "copy" / "out.jsonl").read_bytes().startswith((finished / "out.jsonl").read_bytes())
    assert read(tmp_path / "copy" / "out.jsonl")[-1]["score"] is not None


def test_a_wrong_continuation_is_refused(model, rows, finished, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    source, target = folder / "rows.jsonl", folder / "out.jsonl"
    before = target.read_bytes()

    def refused(*arguments):
        assert run(*arguments) == 1
        assert target.read_bytes() == before
        return capsys.readouterr().err

    swapped = write(tmp_path / "swapped.jsonl", [*rows[1::-1], *rows[2:]])
    assert "line 1: this row is not line 1 of" in refused(model, swapped, target)
    short = write(tmp_path / "short.jsonl", rows[:3])
    assert "which is shorter" in refused(model, short, target)
    assert "max_length=None, now 9" in refused(model, source, target, "--max_length", "9")
    other = save_reward_model(tmp_path / "other", "qwen2")
    assert f"another model at {model}, now {other}" in refused(other, source, target)
    same = tmp_path / "moved"
    shutil.copytree(model, same)
    assert run(same, source, target) == 0  # moved, and still the same
    RewardScorer(same).fit_normalizer(["a", "b"], [" test", " a short line"])
    assert "another model" in refused(same, source, target)  # its scores are other ones now
    (folder / "out.jsonl.manifest.json").unlink()
    assert "did not write" in refused(model, source, target)
    assert "is the input file" in refused(model, target, target)


def test_an_output_that_was_deleted_starts_again(model, finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / "out.jsonl").unlink()
    assert run(model, folder / "rows.jsonl", folder / "out.jsonl", "--max_length", "9") == 0
    assert len(read(folder / "out.jsonl")) == len(read(finished / "out.jsonl"))
    assert json.loads((folder / "out.jsonl.manifest.json").read_text())["max_length"] == 9


def test_a_killed_process_is_completed(model, tmp_path):
    data = [{"id": i, **row} for i, row in enumerate(pair_rows(4000))]
    source, target = write(tmp_path / "rows.jsonl", data), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "trl_ext.cli.main", "score", "--model", str(model)]
    command += ["--input", str(source), "--output", str(target)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 600
        while not (target.exists() and target.stat().st_size > 50_000):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = target.read_bytes().count(b"\n")
    assert 0 < done < 4000
    assert run(model, source, target) == 0
    scored = read(target)
    assert [row["id"] for row in scored] == list(range(4000))
    flat = [value for row in scored[::97] for value in (row["chosen_score"], row["rejected_score"])]
    texts = [(row["prompt"], row[name]) for row in data[::97] for name in ("chosen", "rejected")]
    want = RewardScorer(model)([p for p, _ in texts], [c for _, c in texts])
    assert flat == pytest.approx(want, abs=1e-6)


# Errors


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "a", "completion": ', "line 6: not valid JSON"),
        ("[1]", "line 6: found a list"),
        ('{"prompt": "a"}', r"line 6: found the columns ['prompt']; needed: 'completion'"),
        ('{"prompt": "a", "completions": "b"}', "line 6: found a str in 'completions'"),
        ('{"completion": "b", "score": 1}', "line 6: found a column 'score'"),
        ('{"prompt": "a", "completion": null}', "line 6: found None; needed"),
        ('{"prompt": "a", "completions": ["b", 3]}', "line 6: found int 3; needed"),
    ],
)
def test_a_bad_line_names_its_number_and_keeps_the_good_ones(
    model, rows, tmp_path, capsys, monkeypatch, line, complaint
):
    monkeypatch.setattr(score, "CHUNK_ROWS", 3)
    source, target = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    good = [json.dumps(row) for row in rows[:4]]
    source.write_text("\n".join([*good[:2], "", *good[2:], line, *good]) + "\n")
    assert run(model, source, target) == 1
    assert complaint in capsys.readouterr().err
    unread = complaint.startswith(("line 6: not valid", "line 6: found a list"))
    assert len(read(target)) == (4 if unread else 3)  # what can be read but not scored costs the rows of its chunk
    source.write_text("\n".join([*good, json.dumps(rows[4])]) + "\n")  # corrected
    assert run(model, source, target) == 0
    assert len(read(target)) == 5


def test_half_a_letter_in_a_column_that_is_not_scored(model, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"completion": "The quick test", "note": "\\ud83d é"}\n')
    assert run(model, source, tmp_path / "out.jsonl") == 0
    assert read(tmp_path / "out.jsonl")[0]["note"] == "\ud83d é"


def test_no_model_and_no_input(model, tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", [{"completion": "a"}])
    assert run(tmp_path / "nothing", source, tmp_path / "out.jsonl") == 1
    assert "nothing is not a folder" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    assert run(model, tmp_path / "none.jsonl", tmp_path / "out.jsonl") == 1
    assert "none.jsonl" in capsys.readouterr().err


def test_parts_are_merged_in_order_and_checked(model, rows, tmp_path, small_chunks, capsys):
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in rows[:10]) + "\n\n")
    whole, merged, outputs = tmp_path / "whole.jsonl", tmp_path / "merged.jsonl", []
    assert run(model, source, whole) == 0
    for number in (1, 2, 3):
        outputs.append(str(tmp_path / f"part-{number}.jsonl"))
        assert run(model, source, outputs[-1], "--shard", f"{number}/3") == 0
    assert [len(read(path)) for path in outputs] == [3, 3, 4]
    kept = Path(outputs[1]).read_bytes()

    def refused(*parts, text, flags=()):
        capsys.readouterr()
        assert run(model, source, merged, "--shards_from", *parts, *flags) == 1
        assert text in capsys.readouterr().err and not merged.exists()

    refused(*outputs[:2], text="Part 3/3 is missing")
    refused(*outputs, outputs[0], text="are both part 1/3")
    refused(*outputs, text="other settings (max_length=None, now 50)", flags=("--max_length", "50"))
    refused(*outputs, str(whole), text="was made without --shard")
    refused(*outputs[:2], str(tmp_path / "nowhere"), text="is not there")
    lines = kept.splitlines(keepends=True)
    Path(outputs[1]).write_bytes(b"".join(lines[:2]))
    refused(*outputs, text="(part 2/3) holds 2 of 3 whole rows. Run its command again")
    for cut in (lines[2][:9], lines[2][:-1]):  # killed within a line
        Path(outputs[1]).write_bytes(b"".join([*lines[:2], cut]))
        refused(*outputs, text="(part 2/3) holds 2 of 3 whole rows. Run its command again")
    Path(outputs[1]).write_bytes(b"".join([lines[1], lines[0], lines[2]]))
    refused(*outputs, text="made from another row")
    Path(outputs[1]).write_bytes(b"".join(lines[:1]))
    assert run(model, source, outputs[1], "--shard", "2/3") == 0 and len(read(outputs[1])) == 3  # it goes on
    assert run(model, source, outputs[1], "--shard", "3/3") == 1  # another part has another output
    for _ in range(2):  # a second merge finds nothing to do
        assert run(model, source, merged, "--shards_from", *reversed(outputs)) == 0
        for one, other in zip(read(merged), read(whole), strict=True):
            assert numbers(one) == pytest.approx(numbers(other), abs=1e-5)
            assert one.keys() == other.keys()
    assert run(model, source, merged) == 0  # and it is an output of the command
    assert "10 rows already had scores" in capsys.readouterr().err

    few = write(tmp_path / "few.jsonl", rows[:1])  # more parts than rows
    outputs = [str(tmp_path / f"few-{number}.jsonl") for number in (1, 2)]
    assert [run(model, few, outputs[n], "--shard", f"{n + 1}/2") for n in (0, 1)] == [0, 0]
    assert run(model, few, tmp_path / "one.jsonl", "--shards_from", *outputs) == 0
    assert len(read(tmp_path / "one.jsonl")) == 1


def test_a_public_data_set_is_scored_as_released(model, tmp_path, capsys):
    released = [
        {"prompt": "2 + 2?", "chosen": ["4"], "rejected": ["5", "6"], "subset": "Math"},
        {"prompt": "3 + 3?", "chosen": ["6"], "rejected": ["7"], "subset": "Math"},
    ]
    source, target = write(tmp_path / "released.jsonl", released), tmp_path / "scored.jsonl"
    assert run(model, source, target, "--dataset_format", "rewardbench2") == 0
    rows = read(target)
    assert [len(row["scores"]) for row in rows] == [3, 2] and rows[0]["ratings"] == [1.0, 0.0, 0.0]
    prompts, answers = [rows[0]["prompt"]] * 3, rows[0]["completions"]
    assert rows[0]["scores"] == pytest.approx(RewardScorer(str(model))(prompts, answers), abs=1e-5)

    parts = [str(tmp_path / f"part-{number}.jsonl") for number in (1, 2)]
    for number, part in enumerate(parts, start=1):
        assert run(model, source, part, "--dataset_format", "rewardbench2", "--shard", f"{number}/2") == 0
    merged = tmp_path / "merged.jsonl"
    assert run(model, source, merged, "--dataset_format", "rewardbench2", "--shards_from", *parts) == 0
    assert [len(row["scores"]) for row in read(merged)] == [3, 2]

    with source.open("a") as file:
        file.write(json.dumps({"prompt": "4 + 4?"}) + "\n")
    assert run(model, source, target, "--dataset_format", "rewardbench2") == 1
    assert "released.jsonl, line 3: found a row that the format 'rewardbench2'" in capsys.readouterr().err
    assert run(model, source, target) == 1  # another format: the rows of the output are not those of the input
    with pytest.raises(SystemExit):
        run(model, source, target, "--dataset_format", "rewardbnch")
    assert "Did you mean 'rewardbench'" in capsys.readouterr().err


def test_standard_deviations_are_written_and_fitted_once(tmp_path, capsys):
    model = save_reward_model(tmp_path / "fit")
    train = write(tmp_path / "train.jsonl", pair_rows(12, seed=1))
    source = write(tmp_path / "rows.jsonl", [*pair_rows(2), *ranked_rows(1, k=3)])
    assert run(model, source, tmp_path / "out.jsonl", "--uncertainty") == 1
    assert "fit_uncertainty" in capsys.readouterr().err
    assert run(model, source, tmp_path / "out.jsonl", "--fit_uncertainty", str(train)) == 0
    pair, _, ranking = read(tmp_path / "out.jsonl")
    scores, deviations = RewardScorer(model).score_with_uncertainty([ranking["prompt"]] * 3, ranking["completions"])
    assert ranking["scores"] == pytest.approx(scores, abs=1e-5)
    assert ranking["scores_std"] == pytest.approx(deviations, rel=1e-4) and pair["chosen_score_std"] > 0
    (tmp_path / "out.jsonl").unlink()
    stored = (model / "uncertainty" / "last_layer.safetensors").stat().st_mtime_ns
    assert run(model, source, tmp_path / "out.jsonl", "--fit_uncertainty", str(train)) == 0
    assert (model / "uncertainty" / "last_layer.safetensors").stat().st_mtime_ns == stored
