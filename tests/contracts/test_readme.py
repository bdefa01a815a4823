"""What the README claims about files, names and commands is true."""

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def command(name: str) -> str:
    return re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)\n```", README, re.DOTALL)[1]


def test_tree_names_every_file_and_no_other():
    listed, folders = set(), []
    block = re.search(r"```\n(trl_ext/\n.*?)```", section("The tree"), re.DOTALL)[1]
    for line in block.splitlines():
        if not line.startswith((" ", "trl_ext/")):
            break
        depth = (len(line) - len(line.lstrip())) // 2
        name, *comment = line.split(maxsplit=1)
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            assert comment, f"no comment beside {name}"
            listed.add("".join(folders) + name)
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "trl_ext").rglob("*.py")}
    assert not files - listed, "files that the tree in README.md does not name"
    assert not listed - files, "names in the tree in README.md that are no files"


@pytest.mark.parametrize("name", ["demo", "tests"])
def test_set_up_commands_use_the_constraints(name):
    assert command(name).startswith("python3.11 -m venv .venv && .venv/bin/pip install -c constraints.txt ")


def test_every_pip_install_uses_the_constraints():
    installs = re.findall(r"pip install[^\n]*", README)
    assert len(installs) >= 2
    assert all("-c constraints.txt" in line for line in installs)


@pytest.mark.parametrize("name", ["demo", "tests"])
def test_ci_extracts_the_same_command(name):
    script = (ROOT / ".ci" / "run").read_text()
    function = re.search(r"^readme_command\(\) \{.*?^\}", script, re.DOTALL | re.MULTILINE)[0]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'root="{ROOT}"\n{function}\nreadme_command {name}'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == command(name)


def test_links_and_files_exist():
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^###? (.*)$", README, re.MULTILINE)
    }
    links = re.findall(r"\]\(#([^)]*)\)", README)
    assert len(links) >= 10
    assert set(links) <= anchors
    files = re.findall(r"`((?:examples|configs|trl_ext)/[\w./-]*)`", README)
    assert len(files) >= 8
    assert not [name for name in files if not (ROOT / name).exists()]


def test_every_config_command_loss_metric_and_field_is_documented():
    import trl

    import trl_ext
    from trl_ext.cli.main import COMMANDS
    from trl_ext.losses import ranking_losses
    from trl_ext.metrics.ranking import StreamedMetrics, ranking_summary

    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")} <= set(
        re.findall(r"`(configs/[\w./-]*yaml)`", README)
    )
    assert all(f"trl-ext {name}" in section("Command line") for name in COMMANDS)
    assert all(
        f"| `{name}` |" in section("Losses") for name, origin in ranking_losses.available() if "trl_ext" in origin
    )
    assert all(f"`{name}`" in section("Metrics") for name in ranking_summary(StreamedMetrics()))
    new = {field.name for field in dataclasses.fields(trl_ext.RewardConfig)}
    new -= {field.name for field in dataclasses.fields(trl.RewardConfig)}
    assert set(re.findall(r"^\| `(\w+)` \|", section("Change one import line"), re.MULTILINE)) == new


def test_every_field_strategy_and_metric_of_ensembles_is_documented():
    import trl_ext
    from trl_ext.trainers.ensemble.data import STRATEGIES

    text = section("Ensembles")
    new = {field.name for field in dataclasses.fields(trl_ext.RewardEnsembleConfig)}
    new -= {field.name for field in dataclasses.fields(trl_ext.RewardConfig)}
    assert new <= set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert all(f'| `"{name}"` |' in text for name in (*STRATEGIES, "column:<name>"))
    assert all(f"`{name}`" in text for name in ("loss_member_0", "accuracy_member_0", "disagreement"))


def test_every_selector_field_and_metric_of_rejection_sampling_is_documented():
    import trl

    import trl_ext
    from trl_ext.pipelines.generation.records import Sample
    from trl_ext.pipelines.rejection_sampling.diagnostics import evaluation_metrics, round_metrics
    from trl_ext.pipelines.rejection_sampling.scored import Scored
    from trl_ext.pipelines.rejection_sampling.selection import select, selectors

    text = section("Rejection sampling")
    assert all(f"| `{name}` |" in text for name, origin in selectors.available() if "trl_ext" in origin)
    new = {field.name for field in dataclasses.fields(trl_ext.RejectionSamplingConfig)}
    new -= {field.name for field in dataclasses.fields(trl.SFTConfig)}
    rows = re.findall(r"^\| (`[^|]*)\|", text, re.MULTILINE)
    assert not new - {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    scored = Scored([0, 0], [0, 1], [0.0, 1.0], [1, 2], [3, 4], [True, True])
    metrics = set()
    for name in ("top_per_prompt", "best_worst_pairs", "budget_by_difficulty"):
        metrics |= set(round_metrics(scored, select(scored, name)))
    sample = Sample("", 0, "", "", [1], "stop", None, 0, scores={"a": 1.0, "v": 1.0})
    metrics |= set(evaluation_metrics([[sample]] * 2, {"a": 1.0}, "v"))
    assert len(metrics) > 20
    assert not {name for name in metrics if f"`{name}`" not in text}


def test_every_field_loss_and_metric_of_token_level_trainers_is_documented():
    import trl

    import trl_ext
    from trl_ext.losses.token import token_losses
    from trl_ext.trainers.token.evaluation import OutcomeEvaluator, SegmentEvaluator, StepEvaluator
    from trl_ext.trainers.token.objective import TokenObjective

    text = section("Token-level rewards")
    configs = (trl_ext.ORMConfig, trl_ext.PRMConfig, trl_ext.SegmentRewardConfig)
    new = {field.name for config in configs for field in dataclasses.fields(config)}
    new -= {field.name for field in dataclasses.fields(trl.RewardConfig)}
    fields = text.split("### Their fields\n")[1].split("###")[0]
    named = {
        name for line in re.findall(r"^\| (`[^|]*)\|", fields, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)
    }
    assert named == new
    assert all(f"| `{name}` |" in text for name, origin in token_losses.available() if "trl_ext" in origin)

    def names(evaluator, loss, outputs):
        return set(evaluator(TokenObjective(loss, None, None, "token", 1, outputs)).summary())

    metrics = names(OutcomeEvaluator, "bce", 1) | names(StepEvaluator, "ce", 2)
    metrics |= set(OutcomeEvaluator(TokenObjective("bce", None, None, "token", 1, 1))._within.summary())
    metrics |= names(lambda objective: SegmentEvaluator(objective, [""]), "mse", 1)
    assert len(metrics) > 25
    table = text.split("### Their metrics\n")[1]
    right = {f"right_{name}" for name in ("precision", "recall", "f1")}
    assert not {name for name in metrics - right if f"`{name}`" not in table}


def test_every_reducer_is_documented():
    from trl_ext.scoring.reducers import reducers

    text = section("Ensembles").split("### Score with an ensemble\n")[1]
    names = [name for name, origin in reducers.available() if origin.startswith("trl_ext")]
    assert len(names) >= 7
    assert not [name for name in names if f'`"{name}"`' not in text]
