"""Python values in a cache key: `plain` gives readable JSON, `callable_key` lists what a function depends on.

A function depends on its source, on the values that it holds or reads, and on those of the user's functions that it
calls. This module knows Python objects. It does not know what the functions do, or where results are kept.
"""

import dataclasses
import dis
import enum
import functools
import hashlib
import inspect
import re
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

from trl_ext.pipelines.stages.cache_key import canonical


# Code from these folders belongs to a library. It is represented by its name; its source is not read.
_INSTALLED = ("<frozen", *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))

# Methods that write into a container. A container that a function writes into is a log or a cache, and its results do
# not depend on it.
_WRITERS = {"append", "appendleft", "extend", "extendleft", "insert", "add", "update", "setdefault", "pop", "popleft"}
_WRITERS |= {"popitem", "remove", "discard", "clear"}

# Types whose methods in C depend on nothing but the value. Those of other objects (a generator of random numbers, a
# file) depend on a state that changes with each call.
_PLAIN_VALUES = (re.Pattern, str, bytes, list, tuple, dict, set, frozenset, deque)


def plain(value: Any) -> Any:
    """
    Convert a value to JSON: configs to dictionaries, dtypes to names, sets to sorted lists, functions to their
    [`callable_key`]. Any other value is represented by a hash of its content.

    Example:

    ```python
    >>> plain({"dtype": torch.bfloat16, "targets": {"v_proj", "q_proj"}})
    {'dtype': 'bfloat16', 'targets': ['q_proj', 'v_proj']}
    ```
    """
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=canonical)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (Path, torch.device)):
        return str(value)
    to_dict = getattr(value, "to_dict", None)  # configs of transformers, PEFT and Accelerate
    if to_dict is not None and not isinstance(value, type):
        return plain(to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if callable(value):
        return callable_key(value)
    return _hashed(_Reader().value(type(value).__name__, value))


def callable_key(function: Callable[..., Any]) -> dict[str, Any]:
    """
    Everything that the results of a callable depend on, as far as Python can find out.

    - **Its definition**: module, name, and a hash of the source (for an object, and for a method of one: of its class
      and of base classes outside of libraries). A lambda shares its lines with others and a function typed in an
      interpreter has no source; their compiled code is hashed instead.
    - **The values that it holds and reads**: a partial's arguments, the public attributes of an object and of its
      class (those that begin with an underscore are working state), default values, and the variables around it, also
      around static methods, properties and functions in a cache. Texts, numbers, lists, dictionaries, sets, regular
      expressions, arrays, tensors and objects made of them are represented by their content, the user's functions and
      classes by their key, the user's modules by their file, and everything in a library by its name.
    - **Not** files, and not a container that the function writes into, such as a cache or a list of calls.

    Returns:
        `dict`: JSON-ready, with `function` and `source`; `holds`, the values, if there are any; and `unseen`, the
        names and types of values whose content cannot be read (a connection, a lock), if there are any. A caller that
        reuses a result should warn that a change in the unseen values goes unnoticed.

    Example:

    ```python
    >>> key = callable_key(functools.partial(sorted, reverse=True))
    >>> key["function"], key["holds"]
    ('builtins.sorted', {'(reverse)': 'True'})
    ```
    """
    reader = _Reader()
    key = reader.callable(function)
    return key | ({"unseen": dict(sorted(reader.unseen.items()))} if reader.unseen else {})


class _Reader:
    """Reads one callable and all objects that it refers to, each object once."""

    def __init__(self) -> None:
        self.unseen: dict[str, str] = {}
        self._seen: set[int] = set()
        self._kept: list[Any] = []  # so that Python does not reuse their ids meanwhile

    def callable(self, function: Callable[..., Any]) -> dict[str, Any]:
        code = function
        while isinstance(code, functools.partial):
            code = code.func
        code = code if inspect.isroutine(code) or inspect.isclass(code) else type(code)
        self._first_time(code)
        written = _written(code)
        held = {}
        for name, value in sorted(_held(function, code).items()):
            if name.strip(".'") in written and not _is_constant(value):
                continue
            found = self._one(name, value)
            if found is not None:
                held[name] = found
        key = {"function": f"{code.__module__}.{code.__qualname__}", "source": _source(code)}
        return key | ({"holds": held} if held else {})

    def _one(self, name: str, value: Any) -> str | None:
        """A text for one held value; `None` for a value that is not represented."""
        if _is_constant(value):
            return repr(value)
        if isinstance(value, ModuleType) and _is_library(value.__name__):
            return None
        found = self.value(name, value)
        return found if found is None or isinstance(found, str) else _hashed(found)

    def value(self, name: str, value: Any) -> Any:
        """The content of a value, as JSON; `None` for an object that was read before."""
        if isinstance(value, bytes):
            return ["bytes", hashlib.sha256(value).hexdigest()]
        if _is_constant(value):
            return repr(value)
        if isinstance(value, np.ndarray) and value.dtype != object:
            return [str(value.dtype), list(value.shape), hashlib.sha256(np.ascontiguousarray(value)).hexdigest()]
        if isinstance(value, np.generic):
            return [str(value.dtype), repr(value.item())]
        if not self._first_time(value):
            return None
        try:
            return self._content(name, value)
        except Exception:  # an object that cannot be taken apart may raise anything
            self.unseen[name] = f"{type(value).__module__}.{type(value).__qualname__}"
            return None

    def _content(self, name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            return [str(value.dtype), list(value.shape), hashlib.sha256(content).hexdigest()]
        if isinstance(value, re.Pattern):
            return ["re", repr(value.pattern), value.flags]
        if isinstance(value, (Path, enum.Enum)):
            return [type(value).__qualname__, str(value)]
        if isinstance(value, (list, tuple, deque, np.ndarray)):
            return [type(value).__name__, [self.value(name, item) for item in value]]
        if isinstance(value, (set, frozenset)):
            return ["set", sorted((self.value(name, item) for item in value), key=canonical)]
        if isinstance(value, Mapping):
            return [type(value).__name__, [[self.value(name, key), self.value(name, value[key])] for key in value]]
        if isinstance(value, ModuleType):
            return _source_of_module(value)
        functions = [] if inspect.ismethod(value) else _routine(value)
        of_library = bool(functions) and _is_installed(functions[-1])
        of_library |= isinstance(value, (FunctionType, type)) and _is_library(value.__module__)
        if of_library or (inspect.isbuiltin(value) and _value_of(value) is None):
            return f"{value.__module__}.{value.__qualname__}"
        if inspect.isroutine(value) or inspect.isclass(value) or isinstance(value, functools.partial):
            return self.callable(value)
        if not _is_library(type(value).__module__):
            return self.callable(value)  # an object of the user: its class and its public attributes
        reduced = value.__reduce_ex__(4)  # how pickle and copy take it apart
        if isinstance(reduced, str):
            return f"{type(value).__module__}.{reduced}"
        make, *parts = reduced
        parts = [list(part) if hasattr(part, "__next__") else part for part in parts]
        return [f"{type(value).__module__}.{type(value).__qualname__}", *(self.value(name, part) for part in parts)]

    def _first_time(self, value: Any) -> bool:
        if id(value) in self._seen:
            return False
        self._seen.add(id(value))
        self._kept.append(value)
        return True


def _hashed(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def _is_library(module: str | None) -> bool:
    """Whether a module is built in, installed, or part of this package."""
    if module is None or module in sys.builtin_module_names or f"{module}.".startswith("trl_ext."):
        return True
    file = getattr(sys.modules.get(module), "__file__", None)  # a built-in or typed module has no file
    if file is None:
        spec = getattr(sys.modules.get(module), "__spec__", None)
        return spec is not None and spec.origin in ("built-in", "frozen")
    return file.startswith(_INSTALLED)


def _source_of_module(module: ModuleType) -> str:
    return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()


def _source(code: Callable[..., Any]) -> str | None:
    """A hash of the source, or else of the compiled code; `None` for code in C."""
    functions = _functions(code)
    try:
        if code.__name__ != "<lambda>":
            # a decorated function is represented by the wrapper's code; the wrapper holds the original function
            parts = [one.__code__ for one in _routine(code)] + _classes(code)
            text = "".join(map(inspect.getsource, parts or [code]))
            return hashlib.sha256(text.encode()).hexdigest()
    except (OSError, TypeError):
        pass
    compiled = repr([_compiled(one.__code__) for one in functions])
    return hashlib.sha256(compiled.encode()).hexdigest() if functions else None


def _classes(code: Callable[..., Any]) -> list[type]:
    """A class with those of its base classes that are not from a library; of a method, the user's class it is of."""
    if inspect.isclass(code):
        return [code, *(base for base in code.__mro__[1:] if not _is_library(base.__module__))]
    if not inspect.ismethod(code):
        return []
    owner = code.__self__ if inspect.isclass(code.__self__) else type(code.__self__)
    return [] if _is_library(owner.__module__) else _classes(owner)


def _functions(code: Callable[..., Any]) -> list[FunctionType]:
    """The Python functions that a routine or a class consists of; for a method, also those of its class."""
    found: dict[str, list[FunctionType]] = {}
    for owner in reversed(_classes(code)):  # a method of a subclass overrides that of its base
        found |= {name: _routine(value) for name, value in vars(owner).items()}
    functions = [*_routine(code), *(one for name in sorted(found) for one in found[name])]
    return list({id(one): one for one in functions}.values())


def _routine(value: Any) -> list[FunctionType]:
    """
    The Python functions in a function or a member of a class; none for other values and for code in C.

    A wrapper that a library made (`functools.cache`, `torch.no_grad`) is followed by the function in it.
    """
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, functools.cached_property):
        value = value.func
    elif inspect.ismethod(value):
        value = value.__func__
    found: list[FunctionType] = []
    while inspect.isroutine(value):
        if isinstance(value, FunctionType):
            found.append(value)
            if not _is_installed(value):
                break
        value = getattr(value, "__wrapped__", None)  # of a static method or a wrapper
    return found


def _is_installed(function: FunctionType) -> bool:
    return function.__code__.co_filename.startswith(_INSTALLED)


def _value_of(function: Callable[..., Any]) -> Any:
    """The value that a method in C belongs to, as that of `re.compile("a").match`; `None` for other callables."""
    if not inspect.isbuiltin(function) or function.__name__ in _WRITERS:  # `calls.append`: the list is a log
        return None
    return function.__self__ if isinstance(function.__self__, _PLAIN_VALUES) else None


def _compiled(code: CodeType) -> list[Any]:
    """The parts of compiled code that do not depend on its place in a file, equal in every process."""
    constants: list[Any] = []
    for value in code.co_consts:
        if isinstance(value, CodeType):
            constants.append(_compiled(value))
        else:  # the order of a set differs between processes
            constants.append(sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value))
    return [code.co_code.hex(), constants, code.co_names, code.co_varnames, code.co_freevars]


def _held(function: Callable[..., Any], code: Callable[..., Any]) -> dict[str, Any]:
    """Names and values that a callable holds, or reads from its surroundings."""
    given: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        arguments = {str(place): value for place, value in enumerate(function.args)} | function.keywords
        given = {f"({name})": value for name, value in arguments.items()} | given
        function = function.func
    for one in _functions(code):
        defaults = {str(place): value for place, value in enumerate(one.__defaults__ or ())}
        defaults |= one.__kwdefaults__ or {}
        found = {f"{one.__name__}({name})": value for name, value in defaults.items()} | _around(one)
        for name, value in found.items():
            while name in given and given[name] is not value:  # a variable of another module with the same name
                name += "'"
            given[name] = value
    if (value := _value_of(function)) is not None:
        given["(self)"] = value
    owner = function.__self__ if inspect.ismethod(function) else function
    return given | _attributes(owner, [one for one in _classes(code) if not _is_library(one.__module__)])


def _attributes(owner: Any, classes: list[type]) -> dict[str, Any]:
    """The public attributes of an object and of the user's classes that it is made of."""
    members = {name: value for one in reversed(classes) for name, value in vars(one).items()}
    found = {name: value for name, value in members.items() if not hasattr(type(value), "__get__")}
    if not inspect.isfunction(owner) and not inspect.isclass(owner):
        slots = [name for name, value in members.items() if inspect.ismemberdescriptor(value) and hasattr(owner, name)]
        found |= {name: getattr(owner, name) for name in slots}
        found |= getattr(owner, "__dict__", {})  # an object with slots, or written in C, has none
    cached = {name for name, value in members.items() if isinstance(value, functools.cached_property)}
    return {f".{name}": found[name] for name in found.keys() - cached if not name.startswith("_")}


def _around(function: FunctionType) -> dict[str, Any]:
    """The variables that a function, or a comprehension in it, reads from its module and from enclosing functions."""
    names = set().union(*(code.co_names for code in _codes(function.__code__)))
    if _is_installed(function) and hasattr(function, "__wrapped__"):
        names = set()  # of a library's wrapper only what it was made with
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # the variable is not set yet
            continue
    return found


def _codes(code: CodeType) -> list[CodeType]:
    """Compiled code, and the code of the functions and comprehensions in it."""
    return [code, *(inner for value in code.co_consts if isinstance(value, CodeType) for inner in _codes(value))]


def _written(code: Callable[..., Any]) -> set[str]:
    """Names of variables and attributes that a callable writes into: `name.append(...)`, `name[...] = ...`."""
    found = set()
    for one in (inner for function in _functions(code) for inner in _codes(function.__code__)):
        instructions = list(dis.get_instructions(one))
        stores = {
            (item.positions.lineno, item.positions.col_offset)
            for item in instructions
            if item.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") and item.positions
        }
        for item, following in zip(instructions, [*instructions[1:], None], strict=True):
            if not item.opname.startswith("LOAD_") or not isinstance(item.argval, str):
                continue
            called = following is not None and following.opname in ("LOAD_METHOD", "LOAD_ATTR")
            start = item.positions and (item.positions.lineno, item.positions.col_offset)
            if (called and following.argval in _WRITERS) or start in stores:
                found.add(item.argval)
    return found


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return type(value) in (str, bytes, int, float, complex, bool, type(None), type(...))
