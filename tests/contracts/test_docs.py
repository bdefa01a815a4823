"""What README.md and the pages in docs/ claim about files, names and commands is true; nothing public is missing."""

import dataclasses
import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
ALL_PAGES = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), **PAGES}


def load_make_pages():
    spec = importlib.util.spec_from_file_location("make_pages", DOCS / "make_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_pages = load_make_pages()


def section(page: str, title: str) -> str:
    """The text below a heading, up to the next heading of its level or above."""
    level, rest = re.search(rf"^(#+) {re.escape(title)}\n(.*)", PAGES[page], re.MULTILINE | re.DOTALL).groups()
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def first_column(text: str) -> set[str]:
    """Every name in code in the first column of the tables of a text."""
    rows = re.findall(r"^\| (`[^|]*)\|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r'`"?([\w:<>]+)"?`', row)}


def command(name: str) -> str:
    return re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)\n```", README, re.DOTALL)[1]


def fields_of(config: type, without: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)} - {field.name for field in dataclasses.fields(without)}


def ours(registry) -> list[str]:
    """The names that trl_ext itself registers."""
    names = [name for name, origin in registry.available() if origin.startswith("trl_ext")]
    assert names
    return names


# --- README and set-up


def test_readme_is_short():
    assert len(README.splitlines()) <= 230


@pytest.mark.parametrize("name", ["demo", "tests"])
def test_set_up_commands_use_the_constraints(name):
    assert command(name).startswith("python3.11 -m venv .venv && .venv/bin/pip install -c constraints.txt ")


def test_every_pip_install_uses_the_constraints():
    installs = [line for text in ALL_PAGES.values() for line in re.findall(r"pip install[^\n]*", text)]
    assert len(installs) >= 3
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


def test_files_that_pages_name_exist():
    pattern = r"`((?:examples|configs|tests|docs)/[\w./-]*)`|\]\((?!https?:|#)([\w./-]+)"
    named = [(page, a, b) for page, text in ALL_PAGES.items() for a, b in re.findall(pattern, text)]
    assert len(named) >= 100
    missing = []
    for page, from_root, link in named:
        folder = ROOT if page in ("README.md", "CONTRIBUTING.md") else (DOCS / page).parent
        target = ROOT / from_root if from_root else (folder / link).resolve()
        generated = target.parent == DOCS / "reference" / "api" or target.name == "contributing.md"
        if not target.exists() and not generated and "NAME" not in target.name:
            missing.append(f"{page}: {from_root or link}")
    assert not missing


# --- what is generated


def test_every_result_is_dated_and_has_a_place():
    files = sorted((DOCS / "results").glob("*.json"))
    assert len(files) >= 20
    placed = dict(found for text in ALL_PAGES.values() for found in make_pages.TABLE.findall(text))
    for path in files:
        result = json.loads(path.read_text(encoding="utf-8"))
        shown = set(result) - {"figures"}  # what the rows were made from
        assert shown == {"title", "date", "machine", "command", "note", "columns", "rows"}, path.name
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"]), path.name
        assert result["command"] and result["machine"], path.name
        assert all(len(row) == len(result["columns"]) for row in result["rows"]), path.name
        assert path.stem in placed, f"no page shows {path.name}"
        assert result["rows"][0][0] in make_pages.result_table(path.stem)
    there = {path.stem for path in files}
    assert there <= set(placed)
    assert all(text for name, text in placed.items() if name not in there), "a place without a result or a text"


def test_the_picture_is_that_of_the_results():
    assert make_pages.PICTURE.read_text(encoding="utf-8") == make_pages.demo_picture(), "run docs/make_pages.py"


def test_the_tree_has_every_file_with_a_line_about_it():
    tree = make_pages.tree()
    files = [path for path in (ROOT / "trl_ext").rglob("*.py") if path.name != "__init__.py"]
    assert len(files) > 100
    without = [path for path in files if not re.search(rf"^\| `{path.name}` \| \S", tree, re.MULTILINE)]
    assert not without, "files without a module docstring"


def test_every_public_name_is_in_the_api_reference():
    import trl_ext

    listed = [name for _, names in make_pages.API.values() for name in names.split()]
    assert sorted(listed) == sorted(set(trl_ext.__all__) - {"__version__"})


# --- coverage: what has a name has a sentence


def test_every_command_and_recipe_is_documented():
    from trl_ext.cli.main import COMMANDS

    text = PAGES["guides/command_line.md"]
    assert not [name for name in COMMANDS if f"| `trl-ext {name}` |" not in text]
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert len(recipes) > 10
    assert not recipes - set(re.findall(r"`(configs/[\w./-]*yaml)`", text + PAGES["guides/several_gpus.md"]))


def test_every_loss_is_documented():
    from trl_ext.losses import ranking_losses, token_losses

    assert not set(ours(ranking_losses)) - first_column(section("losses.md", "Ranking losses"))
    assert not set(ours(token_losses)) - first_column(section("losses.md", "Token losses"))
    choice = section("losses.md", "From your data to a loss")
    assert not [name for name in ours(ranking_losses) + ours(token_losses) if f"`{name}`" not in choice]


def test_every_field_of_a_config_is_documented():
    import trl

    import trl_ext

    token = section("trainers/orm_trainer.md", "Fields of ORMConfig")
    pages = {
        "RewardConfig": (trl.RewardConfig, section("trainers/reward_trainer.md", "Fields of RewardConfig")),
        "ORMConfig": (trl.RewardConfig, token),
        "PRMConfig": (trl.RewardConfig, token + section("trainers/prm_trainer.md", "Fields of PRMConfig")),
        "SegmentRewardConfig": (
            trl.RewardConfig,
            token + section("trainers/segment_reward_trainer.md", "Fields of SegmentRewardConfig"),
        ),
        "RewardEnsembleConfig": (trl_ext.RewardConfig, section("trainers/ensemble_trainers.md", "Fields")),
        "WeakToStrongConfig": (trl.SFTConfig, section("trainers/weak_to_strong.md", "WeakToStrongTrainer")),
        "WeakToStrongArguments": (object, section("trainers/weak_to_strong.md", "Fields of WeakToStrongArguments")),
        "DenseGRPOConfig": (
            trl.GRPOConfig,
            section("trainers/dense_grpo_trainer.md", "Fields of DenseGRPOConfig"),
        ),
        "PPOConfig": (trl_ext.DenseGRPOConfig, section("trainers/ppo_trainer.md", "Fields of PPOConfig")),
        "RankedDPOConfig": (
            trl.DPOConfig,
            section("trainers/ranked_dpo_trainer.md", "Fields of RankedDPOConfig"),
        ),
        "RejectionSamplingConfig": (
            trl.SFTConfig,
            section("trainers/rejection_sampling_trainer.md", "Fields of RejectionSamplingConfig"),
        ),
    }
    configs = {name for name in trl_ext.__all__ if name.endswith(("Config", "Arguments"))}
    assert configs - set(pages) == {"ORMEnsembleConfig", "PRMEnsembleConfig", "SegmentEnsembleConfig"}
    for name, (base, text) in pages.items():
        config = getattr(trl_ext, name)
        new = {field.name for field in dataclasses.fields(config)} if base is object else fields_of(config, base)
        assert new and not new - first_column(text), name


def test_every_strategy_reducer_selector_and_segmenter_is_documented():
    from trl_ext.data.segmentation import segmenters
    from trl_ext.pipelines.rejection_sampling.selection import selectors
    from trl_ext.scoring.aggregation import aggregators
    from trl_ext.scoring.reducers import reducers
    from trl_ext.trainers.ensemble.data import STRATEGIES

    strategies = first_column(section("trainers/ensemble_trainers.md", "Fields"))
    assert {*STRATEGIES, "column:<name>"} <= strategies
    assert set(ours(reducers)) <= first_column(section("guides/ensemble_scoring.md", "Reducers"))
    assert set(ours(selectors)) <= first_column(section("guides/rejection_sampling.md", "Selecting"))
    scoring = section("guides/scoring.md", "One number from many")
    assert not [name for name in ours(segmenters) if f"`{name}`" not in scoring]
    assert not [name for name in ours(aggregators) if f'`"{name}"`' not in scoring]


def test_every_metric_of_rankings_and_ensembles_is_documented():
    from trl_ext.metrics.ranking import StreamedMetrics, ranking_summary

    names = set(ranking_summary(StreamedMetrics()))
    assert len(names) > 8
    assert not names - first_column(section("reference/metrics.md", "RewardTrainer"))
    members = first_column(section("reference/metrics.md", "Ensembles"))
    assert {"loss_member_0", "accuracy_member_0", "disagreement"} <= members


def test_every_metric_of_token_level_trainers_is_documented():
    from trl_ext.trainers.token.evaluation import OutcomeEvaluator, SegmentEvaluator, StepEvaluator
    from trl_ext.trainers.token.objective import TokenObjective

    def names(evaluator, loss, outputs):
        return set(evaluator(TokenObjective(loss, None, None, "token", 1, outputs)).summary())

    metrics = names(OutcomeEvaluator, "bce", 1) | names(StepEvaluator, "ce", 2)
    metrics |= set(OutcomeEvaluator(TokenObjective("bce", None, None, "token", 1, 1))._within.summary())
    metrics |= names(lambda objective: SegmentEvaluator(objective, [""]), "mse", 1)
    assert len(metrics) > 25
    assert not metrics - first_column(section("reference/metrics.md", "Token-level trainers"))


def test_every_metric_of_rejection_sampling_is_documented():
    from trl_ext.pipelines.generation.records import Sample
    from trl_ext.pipelines.rejection_sampling.diagnostics import evaluation_metrics, round_metrics
    from trl_ext.pipelines.rejection_sampling.scored import Scored
    from trl_ext.pipelines.rejection_sampling.selection import select

    scored = Scored([0, 0], [0, 1], [0.0, 1.0], [1, 2], [3, 4], [True, True])
    metrics = set()
    for name in ("top_per_prompt", "best_worst_pairs", "budget_by_difficulty"):
        metrics |= set(round_metrics(scored, select(scored, name)))
    sample = Sample("", 0, "", "", [1], "stop", None, 0, scores={"a": 1.0, "v": 1.0})
    metrics |= set(evaluation_metrics([[sample]] * 2, {"a": 1.0}, "v"))
    assert len(metrics) > 20
    text = section("reference/metrics.md", "Rejection sampling")
    assert not {name for name in metrics if f"`{name}`" not in text}


def test_every_plugin_group_is_documented():
    from trl_ext.registry import all_registries

    groups = {registry.group for registry in all_registries()}
    assert len(groups) >= 6
    assert not [group for group in groups if f"| `{group}` |" not in PAGES["guides/plugins.md"]]


def test_every_paper_is_indexed():
    pattern = r"https://(?:huggingface\.co/papers|doi\.org)/[\w./-]*\w"
    cited = {link for path in (ROOT / "trl_ext").rglob("*.py") for link in re.findall(pattern, path.read_text())}
    assert len(cited) > 20
    assert not [link for link in cited if f"({link})" not in PAGES["reference/papers.md"]]
