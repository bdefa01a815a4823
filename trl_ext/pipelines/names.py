"""What a name says before anything heavy is imported: whether a reward function or model of that name can be there.

It knows strings, files and where Python finds modules. It imports neither torch nor trl, and none of the user's code.
"""

import ast
import importlib.util
import os
import sys
from pathlib import Path

from trl_ext.pipelines.answers import check_math_verify
from trl_ext.pipelines.feedback.judge_settings import read_judge_file
from trl_ext.pipelines.user_functions import did_you_mean, function_parts, names_function, names_of_functions


TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
NEED_MATH_VERIFY = ("accuracy_reward", "reasoning_accuracy_reward")
MODEL_FILES = ("config.json", "adapter_config.json", "reward_model.json", "reward_ensemble.json")


def is_function_name(spec: object) -> bool:
    """Whether a reward function is the name of a function, and not that of a model or a judge."""
    return isinstance(spec, str) and not is_judge_file(spec) and (spec in TRL_REWARDS or names_function(spec))


def is_judge_file(spec: object) -> bool:
    """Whether a reward function is the path of a judge's YAML file, see [`read_judge_file`]."""
    return isinstance(spec, (str, Path)) and Path(spec).suffix in (".yaml", ".yml")


def check_name(spec: str) -> None:
    """
    Raise an error for the name of a reward function that is certainly wrong.

    A name that passes may still be wrong: a module may fail when it is imported, and a Hub id may not exist.

    Raises:
        ValueError: there is no such module, file or function; the nearest name is suggested.
        FileNotFoundError: the folder holds no model, or there is no such file.
        ImportError: the function needs a package that is not installed.
    """
    if spec in NEED_MATH_VERIFY:
        check_math_verify(f"The reward function {spec!r}", "give another reward function")
    if spec in TRL_REWARDS or spec.startswith(("http://", "https://")):
        return
    if is_judge_file(spec):
        read_judge_file(spec)
        return
    parts = function_parts(spec)
    if parts is None:
        check_model_name(spec)
    else:
        _check_function(spec, *parts)


def check_model_name(spec: str | Path) -> None:
    """The part of [`check_name`] for models: a `.py` file, a folder without a model, a typo of TRL's functions."""
    path = Path(spec)
    if str(spec).endswith(".py"):
        raise ValueError(
            f"reward_funcs names the file {spec}; needed: one of its functions, as file.py:function."
            f"{names_of_functions(spec)}"
        )
    if path.is_dir():
        if not any((path / name).is_file() for name in MODEL_FILES):
            raise FileNotFoundError(no_model(spec))
        return
    hint = did_you_mean(str(spec), TRL_REWARDS, cutoff=0.8) if isinstance(spec, str) else ""
    if hint and not path.exists():
        raise ValueError(f"There is no reward function or model {str(spec)!r}.{hint}")
    if path.exists() or path.is_absolute() or str(spec).startswith(".") or len(path.parts) > 2:  # no Hub id
        near = did_you_mean(str(spec), [str(one) for one in path.parent.glob("*")]) if not path.exists() else ""
        raise FileNotFoundError(f"{spec} is not a folder.{near} Needed: the folder or Hub id of a saved model.")


def no_model(spec: str | Path) -> str:
    """The message for a folder or repository without a model."""
    return (
        f"{spec} holds no model (none of {', '.join(MODEL_FILES)}). Give the folder of a reward model, or a function "
        "as package.module.function or file.py:function."
    )


def _check_function(spec: str, module: str, name: str) -> None:
    file = Path(module) if module.endswith(".py") else _file_of(module)
    if file is None:
        return
    if not file.is_file():
        if module.endswith(".py"):
            near = did_you_mean(module, [str(path) for path in file.parent.glob("*.py")])
        else:
            near = did_you_mean(module, [path.stem for path in Path.cwd().glob("*.py")])
        raise ValueError(
            f"The reward function {spec!r} cannot be imported: there is no {module}.{near} Give a function as "
            f"package.module.function, importable from {os.getcwd()}, or as file.py:function."
        )
    found = _names_in(file)
    if found is not None and name not in found:
        shown = [known for known in sorted(found) if not known.startswith("_")]
        raise ValueError(
            f"The reward function {spec!r} cannot be imported: {module} has no function {name!r}."
            f"{did_you_mean(name, shown)} It has: {', '.join(shown[:10]) or 'none'}."
        )


def _file_of(module: str) -> Path | None:
    """The file of a module, which may not exist; `None` where only an import can tell."""
    top, *rest = module.split(".")
    here = Path.cwd() / top
    if top in sys.modules:
        found = getattr(sys.modules[top], "__spec__", None)
    elif _file_at(here).is_file():
        return _file_at(here.joinpath(*rest))
    else:
        found = importlib.util.find_spec(top)  # a module without a dot: nothing is imported
        # a folder without __init__.py is a module only if Python finds no other one of its name
        if found is None or (found.origin is None and list(found.submodule_search_locations or ()) == [str(here)]):
            return _file_at(here.joinpath(*rest))
    if found is None or not rest:
        return None if found is None or found.origin is None else Path(found.origin)
    files = (_file_at(Path(place, *rest)) for place in found.submodule_search_locations or ())
    return next((file for file in files if file.is_file()), None)


def _file_at(path: Path) -> Path:
    """The file of the package or module at a path; if there is neither, that of the module."""
    package = path / "__init__.py"
    return package if package.is_file() else path.with_suffix(".py")


def _names_in(file: Path) -> set[str] | None:
    """The names that a module defines at its top level; `None` where only an import can tell."""
    if file.suffix != ".py":
        return None
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None  # importing says what is wrong
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            if "*" in names:
                return None
            found |= names
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("exec", "globals"):
            return None
    return None if "__getattr__" in found else found
