"""Checks of a command's names before torch and trl are imported, which takes many seconds: is there such a thing?

It knows flags, YAML files, paths and the names of reward functions and data set formats. It knows no command and no
dataclass; whatever it cannot judge passes, and the command itself says what is wrong.
"""

import ast
from pathlib import Path
from typing import Any

import trl_ext
from trl_ext.cli.common.options import options_of, places_of
from trl_ext.pipelines.answers import check_math_verify
from trl_ext.pipelines.names import check_name
from trl_ext.pipelines.user_functions import did_you_mean


REWARDS = ("reward_funcs", "dense_reward_funcs")
MODELS = ("model", "model_name_or_path", "value_model", "base_model", "policy", "compare")
OURS = ("score", "evaluate", "label-preferences", "rejection-sample", "best-of-n")


class UsageError(ValueError):
    """A mistake in the arguments themselves: exit status 2, as argparse has it."""


def check_names(command: str, argv: list[str]) -> None:
    """
    Raise an error for a name on the command line, or in its config file, that is certainly wrong.

    Raises:
        ValueError: there is no reward function of that name.
        [`UsageError`]: there is no such config file or data set format.
        FileNotFoundError: the folder of a model does not exist.
        ImportError: a reward function or a vote needs a package that is not installed.
    """
    given = flags(argv)
    if len(given.get("config", ())) == 1:
        if not Path(given["config"][0]).exists():
            raise UsageError(f"--config: {given['config'][0]} is no file (seen from {Path.cwd()}).")
        if command == "bench":  # its config is that of another command, whose models need not be there yet
            return
        values = _values_of(given["config"][0])
        _check_keys(command, given["config"][0], values)
        given = values | given
    # a server may know the policy or the judge by a path of another machine
    models = [*MODELS, "judge"]
    if given.get("backend", ["transformers"]) != ["transformers"]:
        models = [name for name in MODELS if name not in ("model_name_or_path", "policy")]
    for value in (value for name in models for value in given.get(name, ())):
        if _is_no_hub_id(value) and not Path(value).exists():
            near = did_you_mean(value, [str(one) for one in Path(value).parent.glob("*")])
            raise FileNotFoundError(f"{value} is not a folder (seen from {Path.cwd()}).{near}")
    for value in given.get("dataset_format", ()):
        check_format(value)
    for value in (value for name in REWARDS for value in given.get(name, ())):
        check_name(value)
    if command == "best-of-n" and "vote" in given and given.get("answers", ["math"]) == ["math"]:
        check_math_verify("The vote", "read answers by --answers number or --answers line")


def flags(argv: list[str]) -> dict[str, list[str]]:
    """The values behind each flag: `["--n", "4", "--a=b"]` gives `{"n": ["4"], "a": ["b"]}`."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = found[name.replace("-", "_")] = [value] if equals else []
        else:
            values.append(word)
    return found


def _check_keys(command: str, file: str, values: dict[str, list[str]]) -> None:
    """Raise [`UsageError`] for an unknown key in the config file of a command whose options are all ours."""
    if command in OURS:
        known = {"env", *(name for place in places_of(command) for name in options_of(place))}
        for name in values.keys() - known:
            raise UsageError(f"{file}: unknown argument {name!r}.{did_you_mean(name, known)}")


def _values_of(path: str) -> dict[str, list[str]]:
    """The texts of a config file by name; nothing where it cannot be read, which its parser says better."""
    import yaml

    try:
        values: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(values, dict):
        return {}
    lists = {str(name): value if isinstance(value, list) else [value] for name, value in values.items()}
    return {name: [one for one in value if isinstance(one, str)] for name, value in lists.items()}


def _is_no_hub_id(name: str) -> bool:
    """Whether a name can only be that of a folder: `/models/a`, `./a`, `a/b/c`."""
    if name.startswith(("http://", "https://")):
        return False
    return name.startswith(("/", "./", "../")) or len(Path(name).parts) > 2


def check_format(name: str) -> None:
    """Raise [`UsageError`] for an unknown data set format. The names are read from the source of `data/recipes.py`."""
    tree = ast.parse(Path(trl_ext.__file__).parent.joinpath("data", "recipes.py").read_text(encoding="utf-8"))
    [table] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "RECIPES"
    ]
    known = [ast.literal_eval(key) for key in table.keys]
    if name not in known:
        raise UsageError(
            f"No data set format {name!r} is known.{did_you_mean(name, known)} Known: {', '.join(known)}."
        )
