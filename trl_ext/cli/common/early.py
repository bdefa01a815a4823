"""Checks of a command's names before torch and trl are imported, which takes many seconds: is there such a thing?

It knows flags, YAML files, paths and the names of reward functions and data set formats. It knows no command and no
dataclass; whatever it cannot judge passes, and the command itself says what is wrong.
"""

import ast
import difflib
from pathlib import Path
from typing import Any

import trl_ext
from trl_ext.pipelines.answers import check_math_verify
from trl_ext.pipelines.names import check_name
from trl_ext.pipelines.user_functions import did_you_mean


REWARDS = ("reward_funcs", "dense_reward_funcs")
FILES = ("config", "input", "dataset_name", "few_shot", "samples")
MODELS = ("model", "model_name_or_path", "value_model", "base_model", "policy", "compare")
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".yaml", ".yml")


class UsageError(ValueError):
    """A mistake in the arguments themselves: exit status 2, as argparse has it."""


def check_names(command: str, argv: list[str]) -> None:
    """
    Raise an error for a name on the command line, or in its config file, that is certainly wrong.

    Raises:
        ValueError: there is no reward function of that name.
        [`UsageError`]: there is no such config file or data set format.
        FileNotFoundError: a file or folder does not exist.
        ImportError: a reward function or a vote needs a package that is not installed.
    """
    given = flags(argv)
    for name in FILES:
        for value in given.get(name, ()):
            _check_path(name, value, is_path=value.endswith(SUFFIXES))
    if len(given.get("config", ())) == 1:
        given = _values_of(given["config"][0]) | given
    for name in FILES + MODELS:
        for value in given.get(name, ()):
            _check_path(name, value, is_path=value.endswith(SUFFIXES) if name in FILES else _is_no_hub_id(value))
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
    return name.startswith(("/", "./", "../", "~")) or len(Path(name).parts) > 2


def _check_path(flag: str, value: str, is_path: bool) -> None:
    path = Path(value)
    if not is_path or path.exists() or "://" in value or any(sign in value for sign in "*?[{"):
        return
    near = did_you_mean(value, [str(one) for one in path.parent.glob("*")])
    if flag in MODELS:
        raise FileNotFoundError(f"--{flag}: {value} is not a folder (seen from {Path.cwd()}).{near}")
    message = f"--{flag}: No data file at {value!r} (seen from {Path.cwd()}).{near}"
    if flag == "config":
        raise UsageError(message.replace("data file", "file"))
    raise FileNotFoundError(message)


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
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"No data set format {name!r} is known.{hint} Known: {', '.join(known)}.")
