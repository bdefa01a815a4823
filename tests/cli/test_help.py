"""Help is short, quick and true; a mistake in arguments or a config is one line with the nearest name."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trl_ext.cli import dense_grpo, ensemble, orm, ppo, prm, ranked_dpo, reward, segment, weak_to_strong
from trl_ext.cli import main as cli
from trl_ext.cli.best_of_n import make_parser as best_of_n
from trl_ext.cli.common import options
from trl_ext.cli.label_preferences import make_parser as label_preferences
from trl_ext.cli.label_steps import make_parser as label_steps
from trl_ext.cli.rejection_sample import make_parser as rejection_sample
from trl_ext.cli.score import make_parser as score


ROOT = Path(__file__).resolve().parents[2]
# arguments that choose among dataclasses -> the parser that must agree with the short help
PARSERS = {
    ("reward",): reward.make_parser,
    ("orm",): orm.make_parser,
    ("prm",): prm.make_parser,
    ("segment",): segment.make_parser,
    **{("ensemble", "--kind", kind): (lambda kind=kind: ensemble.make_parser(kind=kind)) for kind in ensemble.KINDS},
    **{
        ("weak-to-strong", "--task", task): (lambda task=task: weak_to_strong.make_parser(task=task))
        for task in weak_to_strong.CONFIGS
    },
    ("dense-grpo",): dense_grpo.make_parser,
    ("ppo",): ppo.make_parser,
    ("ranked-dpo",): ranked_dpo.make_parser,
    ("score",): score,
    ("label-preferences",): label_preferences,
    ("rejection-sample",): rejection_sample,
    ("best-of-n",): best_of_n,
    ("label-steps",): label_steps,
}
POLICIES = ("dense-grpo", "ppo", "ranked-dpo")
TRAINS = ("reward", "orm", "prm", "segment", "ensemble", "weak-to-strong", *POLICIES)


def test_help_of_a_command_imports_neither_torch_nor_trl():
    code = (
        "import sys; from trl_ext.cli.main import COMMANDS, main\n"
        "from trl_ext.cli.common.options import places_of\n"
        "for command in COMMANDS:\n"
        "    if places_of(command): assert main([command, '--help']) == 0\n"
        "assert not {'torch', 'trl', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.count("usage: trl-ext ") >= 9


@pytest.mark.parametrize("arguments", PARSERS, ids=" ".join)
def test_the_short_help_is_what_the_real_parser_has(arguments):
    command, parser = arguments[0], PARSERS[arguments]()
    actions = {action.dest: action for action in reversed(parser._actions)}  # the first of a --x and --no_x pair
    ours = {}
    for place in options.places_of(command, arguments[1:]):
        ours |= options.options_of(place)
    defined = {
        name
        for kind in parser.dataclass_types
        for name in kind.__dataclass_fields__
        if options.owner_of(kind, name) == "trl_ext" and kind.__dataclass_fields__[name].init
    }
    assert set(ours) == defined
    shared = [name for name in ours if sum(name in kind.__dataclass_fields__ for kind in parser.dataclass_types) > 1]
    for name, option in ours.items():
        if name in shared:  # the field of the first dataclass
            first = next(kind for kind in parser.dataclass_types if name in kind.__dataclass_fields__)
            assert actions[name].help == first.__dataclass_fields__[name].metadata["help"]
            continue
        action = actions[name]
        assert option.help == action.help, name
        assert (option.default is options.MISSING) == action.required, name
        if not action.required:
            assert option.default == action.default, name
        assert option.choices == (None if action.choices is None else tuple(action.choices)), name
    text = options.short_help(command, "What it does.", arguments[1:])
    assert text.startswith(f"usage: trl-ext {command} ") and "--config FILE" in text
    if command in TRAINS:
        assert "--help-all" in text and len(text.splitlines()) < 220
        inherited = {*options.USED_MOST, *options.ASKED_FIRST}
        if command == "weak-to-strong":
            inherited -= {"test_split_size"}  # it splits by prompts itself
        if command in POLICIES:
            inherited -= {"max_length"}  # the length of a completion is limited instead
        assert inherited <= set(actions), inherited - set(actions)


@pytest.mark.parametrize("arguments", PARSERS, ids=" ".join)
def test_no_help_says_a_default_twice(arguments):
    for text in (options.short_help(arguments[0], "", arguments[1:]), PARSERS[arguments]().format_help()):
        flat = " ".join(text.split())
        assert "(default: None)" not in flat and "default: no limit) (default" not in flat
        entries = flat.split(" --")
        assert not [entry for entry in entries if entry.count("(default:") > 1]


def test_the_whole_help_has_ours_first(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["orm", "--help-all"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    places = [text.index(part) for part in ("--config FILE", "--label_placement", "--lora_r", "--adam_beta1")]
    assert places == sorted(places)


@pytest.mark.parametrize("command", ["demo", "merge", "serve-info", "plugins", "bench"])
def test_a_command_whose_help_is_whole_takes_it_too(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help-all"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith(f"usage: trl-ext {command}")


@pytest.mark.parametrize(
    ("config", "flags", "words"),
    [
        ("learning_rat: 1.0\n", [], "x.yaml: unknown argument 'learning_rat'. Did you mean 'learning_rate'?"),
        ("", ["--learning_rat", "1"], "unknown argument '--learning_rat'. Did you mean '--learning_rate'?"),
        ("", ["--learning_rate", "fast"], "--learning_rate"),
        ("eval_strategy: sometimes\n", [], "sometimes"),
        ("- a\n", [], "x.yaml must contain a YAML mapping"),
    ],
)
def test_a_wrong_argument_is_one_line(config, flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(config or "seed: 1\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["reward", "--output_dir", "out", "--use_cpu", "--config", "x.yaml", *flags])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said
    assert said.startswith("trl-ext reward: error: ") and len(said.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="bf16 works on this machine")
def test_a_machine_without_a_gpu_is_told_both_options(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["reward", "--model_name_or_path", "x", "--dataset_name", "y", "--output_dir", str(tmp_path)])
    assert "On a CPU add: --use_cpu --bf16 false" in capsys.readouterr().err


@pytest.mark.parametrize("how", [["--config", "x.yaml"], ["--config=x.yaml"]])
def test_an_unquoted_no_is_the_word(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text("eval_strategy: no\nsave_strategy: no\nlearning_rate: 1e-4\nenv: {TRL_EXT_TEST: 3}\n")
    monkeypatch.setenv("TRL_EXT_TEST", "0")
    _, training, _, _ = reward.make_parser().parse_args_and_config(["--output_dir", "out", "--use_cpu", *how])
    assert training.eval_strategy == "no" and training.save_strategy == "no"
    assert training.learning_rate == 1e-4
    import os

    assert os.environ["TRL_EXT_TEST"] == "3"


def test_a_name_that_two_dataclasses_share_sets_the_first():
    models = ["--weak_model_name_or_path", "a", "--strong_model_name_or_path", "b", "--output_dir", "out", "--use_cpu"]
    task = next(name for name, config in weak_to_strong.CONFIGS.items() if config == "PRMConfig")
    parser = weak_to_strong.make_parser(task=task)
    parsed = parser.parse_args_and_config([*models, "--bf16", "false", "--max_completion_length", "9"])
    assert parsed[1].max_completion_length == 9 and parsed[2].max_completion_length is None
    assert type(parsed[2]).__dataclass_fields__["max_completion_length"].init


def test_a_formatter_shows_a_default_once():
    parser = argparse.ArgumentParser(formatter_class=options.HelpFormatter, prog="x")
    parser.add_argument("--a", default=3, help="a number")
    parser.add_argument("--b", default=None, help="no number (default: no limit)")
    parser.add_argument("--c", default=True, help="defaults to what fits")
    text = parser.format_help()
    assert "a number (default: 3)" in text and "(default: None)" not in text and "(default: True)" not in text
