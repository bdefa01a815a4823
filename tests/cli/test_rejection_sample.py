"""`trl-ext rejection-sample`: its configs, its arguments, and the stages one by one."""

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from tests.tiny import save_tiny_model
from trl_ext.cli.best_of_n import BestOfNArguments
from trl_ext.cli.common.generation import SERVER
from trl_ext.cli.main import main
from trl_ext.cli.rejection_sample import RejectionSampleArguments, make_parser
from trl_ext.pipelines.generation.backends import make_generator
from trl_ext.pipelines.generation.sampling import Sampling


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "rejection_sampling").glob("*.yaml"))
ROWS = [{"prompt": f"Question: tell me about {word}. Answer:"} for word in ("snow", "tests", "apples")]


def vowels(completions, **columns):
    """The share of vowels, or nothing where there is no letter."""
    return [sum(c in "aeiou" for c in text) / len(text) if text.strip() else None for text in completions]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("policy"), "llama")


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def command(tiny, folder, rows, *more):
    arguments = ["rejection-sample", "--model_name_or_path", str(tiny), "--dataset_name", str(rows)]
    arguments += ["--output_dir", str(folder), "--num_generations", "3", "--max_completion_length", "6"]
    return main([*arguments, "--reward_funcs", f"{__name__}.vowels", "--reward_weights", "1", *more])


def test_stage_by_stage(tiny, tmp_path, rows, capsys):
    out = tmp_path / "out"
    assert command(tiny, out, rows, "--stage", "score") == 1
    assert "Run the stage 'generate'" in capsys.readouterr().err
    for stage in ("generate", "score"):
        assert command(tiny, out, rows, "--stage", stage) == 0
        assert capsys.readouterr().out == ""
    assert command(tiny, out, rows, "--stage", "select", "--selection", "best_worst_pairs") == 0
    report = json.loads(capsys.readouterr().out)
    pairs = [json.loads(line) for line in Path(report["path"]).read_text().splitlines()]
    assert len(pairs) == report["rows"] == report["counts"]["selected"] and set(pairs[0]) > {"chosen", "rejected"}
    assert command(tiny, out, rows, "--selection_kwargs", '{"n": 2}', "--server_timeout", "1") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 6
    assert len(list(out.glob("rollouts/*"))) == 1


def test_every_way_to_sample_reaches_the_store(tiny, tmp_path, rows):
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "1+1=", "completion": "2"}\n')
    given = {"temperature": 0.7, "top_p": 0.9, "top_k": 7, "min_p": 0.01, "repetition_penalty": 1.1}
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    flags += ["--stop", "\n", ";", "--generation_kwargs", '{"typical_p": 0.9}', "--few_shot", str(few)]
    flags += ["--chat_template_kwargs", '{"think": false}', "--system_prompt", "kind", "--seed", "3"]
    flags += ["--chat_template", "{{ messages[0].content }}"]
    assert command(tiny, tmp_path / "out", rows, *flags) == 0
    (path,) = (tmp_path / "out").glob("rollouts/*/manifest.json")
    manifest = json.loads(path.read_text())
    expected = given | {"stop": ["\n", ";"], "generation_kwargs": {"typical_p": 0.9}, "system_prompt": "kind"}
    expected |= {"few_shot": [{"prompt": "1+1=", "completion": "2"}], "chat_template_kwargs": {"think": False}}
    expected |= {"max_completion_length": 6, "chat_template": "{{ messages[0].content }}"}
    assert manifest["sampling"] == expected and manifest["seed"] == 3 and manifest["num_generations"] == 3


@pytest.mark.parametrize("arguments", [RejectionSampleArguments, BestOfNArguments])
def test_there_is_an_argument_for_everything_that_a_backend_takes(arguments):
    defaults = {item.name: item.default for item in fields(arguments)}
    assert all(defaults[item.name] == item.default for item in fields(Sampling))
    taken = inspect.signature(make_generator).parameters
    assert all(defaults[name] == taken[name].default for name in (*SERVER, "generation_batch_size", "backend"))


def test_what_is_wrong_is_said(tiny, tmp_path, rows, capsys):
    assert command(tiny, tmp_path, rows, "--selection", "top_per_promt") == 1
    assert "Did you mean 'top_per_prompt'" in capsys.readouterr().err
    for flags, message in (
        (["--selection_kwargs", "{n: 2}"], "--selection_kwargs is '{n: 2}', which is not valid JSON"),
        (["--generation_kwargs", "[1]"], "needed: a JSON object"),
        (["--temprature", "1"], "--temprature"),
    ):
        with pytest.raises(SystemExit):
            command(tiny, tmp_path, rows, *flags)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["rejection-sample", "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path)])
    assert "--stage all needs --reward_funcs" in capsys.readouterr().err


def test_there_are_configs():
    assert len(CONFIGS) >= 3


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_each_config_says_what_it_must_and_runs(path, tiny, tmp_path, rows):
    text = path.read_text()
    header, name = text.split("\n\n")[0], path.relative_to(ROOT).as_posix()
    assert f"trl-ext rejection-sample --config {name}" in header and "Memory: " in header
    assert json.loads(re.search(r"\{.*\}", header)[0])["prompt"]
    for line in text.splitlines():
        if re.match(r"\w+: .*\d", line) and not re.match(
            r"(model_name_or_path|dataset_name|output_dir|reward_f)", line
        ):
            assert "#" in line or line.startswith("dtype"), f"no source beside: {line}"
    config = yaml.safe_load(text)
    (parsed,) = make_parser().parse_args_and_config(["--config", str(path)])
    assert {key: getattr(parsed, key) for key in config} == config
    more = ["--config", str(path), "--backend", "transformers", "--load_in_4bit", "false", "--drop_truncated", "false"]
    assert command(tiny, tmp_path / "out", rows, *more, "--selection_kwargs", "{}") == 0
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text + "\ntemprature: 1.0\n")
    with pytest.raises(SystemExit):
        main(["rejection-sample", "--config", str(wrong)])
