"""Imports the user's functions by name: `package.module.function` or `file.py:function`.

Errors suggest the nearest known name. This module does not know what the functions compute.
"""

import ast
import difflib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any


_IN_FILE = re.compile(r"(?P<module>.+\.py):(?P<name>\w*)")
_DOTTED = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*)[.:](?P<name>[^\W\d]\w*)")


def names_function(spec: str) -> bool:
    """Whether a string names a function. The path of an existing file or folder does not, and neither does a `.py`."""
    return function_parts(spec) is not None


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """
    Import the function that a string names. Modules may also be in the current folder.

    Args:
        spec (`str`): `package.module.function` or `file.py:function`.
        what (`str`): what the function is used for, in messages, e.g. `"reward function"`.

    Raises:
        ValueError: the module or file cannot be imported, or has no such function; it names the nearest.
    """
    module, name = function_parts(spec)
    try:
        loaded = _from_file(Path(module)) if module.endswith(".py") else _from_path(module)
    except Exception as error:  # importing runs the user's code
        near = did_you_mean(module, [path.name for path in Path(module).parent.glob("*.py")])
        if not module.endswith(".py"):
            near = did_you_mean(module, [path.stem for path in Path.cwd().glob("*.py")])
        raise ValueError(
            f"The {what} {spec!r} cannot be imported ({type(error).__name__}: {error}).{near} Give a function as "
            f"package.module.function, importable from {os.getcwd()}, or as file.py:function."
        ) from error
    function = getattr(loaded, name, None)  # any module may lack it
    if not callable(function):
        found = [key for key, value in vars(loaded).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"The {what} {spec!r} cannot be imported: {module} has no function {name!r}.{did_you_mean(name, found)} "
            f"It has: {', '.join(found[:10]) or 'none'}."
        )
    return function


def callable_name(function: Callable[..., Any]) -> str:
    """The name of a callable; of an object with `__call__`, or a partial, that of its class."""
    name = getattr(function, "__name__", None)  # TRL reads it too; such objects may lack it
    return name if isinstance(name, str) else type(function).__name__


def names_of_functions(path: str | Path) -> str:
    """A hint that lists the functions of a Python file; `""` if the file cannot be read."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ""
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return f" It has: {', '.join(f'{path}:{name}' for name in names[:10])}." if names else " It has no function."


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A hint with the nearest known name; `""` if none has at least the similarity `cutoff` (1 is equal)."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""


def function_parts(spec: str) -> tuple[str, str] | None:
    """(module or file, name of the function), or `None` if a string does not name a function."""
    if (found := _IN_FILE.fullmatch(spec)) is not None:
        return found["module"], found["name"]
    if spec.endswith(".py") or Path(spec).exists() or (found := _DOTTED.fullmatch(spec)) is None:
        return None
    return found["module"], found["name"]


def _from_path(module: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(module)


def _from_file(path: Path) -> ModuleType:
    """Import a file as a module, which can import files of its folder. Functions of one file share the module."""
    path = path.resolve()
    name = f"_file_{path.stem}"  # without the folder, because cache keys contain the name and folders move
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):  # the entry may be of another file
        return known
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
