"""Every private upstream name that we rely on exists in the installed version and looks as we think it does."""

import ast
import importlib
import inspect
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from datasets import Dataset
from packaging.specifiers import SpecifierSet

from tests.tiny import pair_rows, save_tiny_model
from trl_ext import upstream
from trl_ext.upstream import PRIVATE_NAMES, SUPPORTED, check_upstream


ROOT = Path(__file__).resolve().parents[2]


def owner_of(entry):
    module, name = entry.owner.split(":")
    return getattr(importlib.import_module(module), name)


def identify(entry):
    return f"{entry.owner.split(':')[1]}.{entry.name}"


@pytest.fixture(scope="module")
def sft_trainer(tmp_path_factory):
    """TRL's SFTTrainer on a tiny model: instance attributes are looked up on it."""
    import trl

    folder = tmp_path_factory.mktemp("upstream_sft")
    model = save_tiny_model(folder / "model", "llama")
    args = trl.SFTConfig(output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none")
    rows = [{"prompt": "2+2=", "completion": "4"}] * 4
    return trl.SFTTrainer(model=str(model), args=args, train_dataset=Dataset.from_list(rows))


@pytest.fixture(scope="module")
def dpo_trainer(tmp_path_factory):
    """TRL's DPOTrainer on a tiny model: instance attributes are looked up on it."""
    import trl

    folder = tmp_path_factory.mktemp("upstream_dpo")
    model = save_tiny_model(folder / "model", "llama")
    args = trl.DPOConfig(output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none")
    return trl.DPOTrainer(model=str(model), args=args, train_dataset=Dataset.from_list(pair_rows(4)))


@pytest.fixture(scope="module")
def grpo_trainer(tmp_path_factory):
    """TRL's GRPOTrainer on a tiny model: instance attributes are looked up on it, and what its scoring returns."""
    import trl

    folder = tmp_path_factory.mktemp("upstream_grpo")
    model = save_tiny_model(folder / "model", "llama")
    args = trl.GRPOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=4,
    )
    lengths = lambda prompts, completions, **columns: [float(len(text)) for text in completions]  # noqa: E731
    rows = Dataset.from_list([{"prompt": "2+2="}] * 4)
    return trl.GRPOTrainer(model=str(model), reward_funcs=lengths, args=args, train_dataset=rows)


def test_grpo_returns_one_advantage_a_completion_and_its_loss_takes_one_a_token(grpo_trainer):
    output = grpo_trainer._generate_and_score_completions([{"prompt": "2+2="}] * 2)
    assert output["advantages"].shape == (2,)
    assert {"completion_ids", "completion_mask"} <= set(output)
    grpo_trainer.current_gradient_accumulation_steps = 1
    whole = grpo_trainer._compute_loss(grpo_trainer.model, output)
    output["advantages"] = output["advantages"][:, None].expand(output["completion_mask"].shape)
    assert grpo_trainer._compute_loss(grpo_trainer.model, output).item() == pytest.approx(whole.item(), abs=1e-7)


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    """TRL's own trainer on a tiny model: the instance attributes are looked up on it."""
    import trl

    folder = tmp_path_factory.mktemp("upstream")
    model = save_tiny_model(folder / "model", "llama")
    args = trl.RewardConfig(output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none")
    return trl.RewardTrainer(model=str(model), args=args, train_dataset=Dataset.from_list(pair_rows(4)))


def test_the_list_is_not_empty():
    assert len(PRIVATE_NAMES) >= 5
    assert len({identify(entry) for entry in PRIVATE_NAMES}) == len(PRIVATE_NAMES)


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=identify)
def test_private_name_is_as_we_rely_on_it(entry, trl_trainer, sft_trainer, grpo_trainer, dpo_trainer):
    owner = owner_of(entry)
    if entry.kind == "method":
        parameters = list(inspect.signature(inspect.getattr_static(owner, entry.name)).parameters)
        assert parameters == ["self", *entry.parameters]
    elif entry.kind == "class":
        inspect.getattr_static(owner, entry.name)
    else:
        assert entry.kind == "instance"
        instances = [
            item
            for item in (trl_trainer, sft_trainer, grpo_trainer, dpo_trainer, trl_trainer.model.config)
            if isinstance(item, owner)
        ]
        assert instances and all(entry.name in vars(instance) for instance in instances)


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=identify)
def test_private_name_is_used_where_the_list_says(entry):
    path = ROOT / (entry.used_in.replace(".", "/") + ".py")
    assert entry.name in path.read_text(encoding="utf-8")


def test_tag_names_and_dict_fields_are_lists():
    import trl

    assert isinstance(trl.RewardTrainer._tag_names, list)
    assert "model_init_kwargs" in trl.RewardConfig._VALID_DICT_FIELDS


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_names(tree: ast.AST) -> tuple[set[str], set[str]]:
    """(private names that the code may share with upstream, private names that are only ours) of one module.

    Shared may be: what a subclass of a TRL class or of `Trainer` touches or defines, and what is read from any object
    but `self`. Ours are the names that functions and all other classes define.
    """
    shared, ours = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(is_upstream(base) for base in node.bases):
            shared |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            shared |= {
                ast.unparse(name) for item in node.body if isinstance(item, ast.Assign) for name in item.targets
            }
            shared |= {item.attr for item in ast.walk(node) if isinstance(item, ast.Attribute)}
        elif isinstance(node, ast.ClassDef):
            ours |= {item.name for item in ast.walk(node) if isinstance(item, ast.FunctionDef)}
            ours |= {item.attr for item in ast.walk(node) if isinstance(item, ast.Attribute) and is_self(item)}
        elif isinstance(node, ast.Attribute) and not is_self(node):
            shared.add(node.attr)
    return set(filter(is_private, shared)), set(filter(is_private, ours))


def is_upstream(base: ast.expr) -> bool:
    name = ast.unparse(base)
    return name.startswith("trl.") or name == "Trainer" or name.endswith("GRPOTrainer")


def is_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def test_no_private_upstream_name_is_used_that_is_not_listed(trl_trainer, grpo_trainer):
    """Whatever private name our code touches or overrides and TRL or Transformers has too must be on the list."""
    paths = sorted((ROOT / "trl_ext").rglob("*.py"))
    assert len(paths) >= 15
    upstream_has = {*dir(trl_trainer), *dir(trl_trainer.args), *dir(trl_trainer.model), *dir(trl_trainer.model.config)}
    upstream_has |= {*dir(trl_trainer.processing_class), *dir(grpo_trainer)}
    listed = {entry.name for entry in PRIVATE_NAMES}
    seen = set()
    for path in paths:
        shared, ours = private_names(ast.parse(path.read_text(encoding="utf-8")))
        seen |= shared & listed
        assert not (shared - ours) & upstream_has - listed, f"{path}: list these in trl_ext/upstream.py"
    assert seen == {name for name in listed if is_private(name)}


def test_the_search_sees_what_is_shared_and_what_is_ours():
    source = """
class Trainer(trl.RewardTrainer):
    _name = "x"
    def _save(self): return self._metrics
class Ours(nn.Module):
    def read(self): self._parameters = model._buffers
"""
    shared, ours = private_names(ast.parse(source))
    assert shared == {"_name", "_save", "_metrics", "_buffers"}
    assert ours == {"_parameters"}


def test_ranges_equal_those_of_the_package():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {f"{name}{supported}" for name, supported in SUPPORTED.items()} <= set(dependencies)


def test_the_tested_set_is_supported_and_installed_here():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) >= 20
    for distribution, supported in SUPPORTED.items():
        assert pins[distribution] in SpecifierSet(supported)
    installed = {name: metadata.version(name).split("+")[0] for name in pins}
    assert installed == pins


def test_check_upstream_accepts_what_is_installed():
    check_upstream()


@pytest.mark.parametrize(
    ("distribution", "version"), [("trl", "1.15.2"), ("transformers", "6.0.0"), ("peft", "0.17.1")]
)
def test_unsupported_version_is_refused_with_the_range(monkeypatch, distribution, version):
    real = metadata.version
    monkeypatch.setattr(upstream.metadata, "version", lambda name: version if name == distribution else real(name))
    with pytest.raises(ImportError) as error:
        check_upstream()
    assert f"{distribution}{SUPPORTED[distribution]}" in str(error.value)
    assert version in str(error.value)


def test_a_newer_minor_and_a_development_version_are_accepted(monkeypatch):
    real = metadata.version
    monkeypatch.setattr(upstream.metadata, "version", lambda name: "1.17.0.dev0" if name == "trl" else real(name))
    check_upstream()


def test_missing_distribution_is_named(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(upstream.metadata, "version", version)
    with pytest.raises(ImportError, match="trl>=1.16,<2, but it is not installed"):
        check_upstream()
