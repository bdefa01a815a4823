"""What makes two functions the same: where they are defined, how they read, and the values that they hold.

Knows Python functions, partial ones, and objects that are called. Knows nothing of what they do.
"""

import functools
import hashlib
import inspect
import sysconfig
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from trl_ext.pipelines.generation.records import canonical


# Functions from here are those of a library: not looked into.
_INSTALLED = ("<frozen", *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))


def callable_identity(function: Callable[..., Any]) -> dict[str, Any]:
    """
    What the results of a callable depend on, as far as can be known.

    - Its definition: module and name, and a hash of the source. A lambda shares its lines with others, and what is
      typed in an interpreter has none: of these it is the compiled code.
    - Texts, numbers and functions that it holds: a partial's arguments, an object's attributes (those that begin with
      an underscore are its own business), default values, and what it reads from around it. Of a function
      its identity, of a library's its name.

    Lists, dictionaries and other objects that it reads are not seen, nor files, nor the base classes of an object.

    Returns:
        `dict`: JSON-ready, with `function`, `source` and, where there is something, `holds`.

    Example:

    ```python
    >>> identity = callable_identity(functools.partial(sorted, reverse=True))
    >>> identity["function"], identity["holds"]
    ('builtins.sorted', {'(reverse)': 'True'})
    ```
    """
    return _identity(function, set())


def _identity(function: Callable[..., Any], seen: set[int]) -> dict[str, Any]:
    code = function
    while isinstance(code, functools.partial):
        code = code.func
    code = code if inspect.isroutine(code) or inspect.isclass(code) else type(code)
    seen.add(id(code))
    held = {}
    for name, value in sorted(_held(function, code).items()):
        if _is_constant(value):
            held[name] = repr(value)
        elif isinstance(value, FunctionType) and value.__code__.co_filename.startswith(_INSTALLED):
            held[name] = f"{value.__module__}.{value.__qualname__}"
        elif isinstance(value, FunctionType) and id(value) not in seen:
            held[name] = hashlib.sha256(canonical(_identity(value, seen))).hexdigest()
    identity = {"function": f"{code.__module__}.{code.__qualname__}", "source": _source(code)}
    return identity | ({"holds": held} if held else {})


def _source(code: Callable[..., Any]) -> str | None:
    """A hash of the source, else of the compiled code, else nothing (what is written in C)."""
    functions = _functions(code)
    try:
        if code.__name__ != "<lambda>":
            # of a decorated function its own code, and not that of the one behind it, which it holds
            text = inspect.getsource(functions[0].__code__ if inspect.isroutine(code) and functions else code)
            return hashlib.sha256(text.encode()).hexdigest()
    except (OSError, TypeError):
        pass
    compiled = repr([_compiled(one.__code__) for one in functions])
    return hashlib.sha256(compiled.encode()).hexdigest() if functions else None


def _functions(code: Callable[..., Any]) -> list[FunctionType]:
    """The Python functions that a routine or a class consists of."""
    if inspect.isclass(code):
        return [value for _, value in sorted(vars(code).items()) if isinstance(value, FunctionType)]
    code = code.__func__ if inspect.ismethod(code) else code
    return [code] if isinstance(code, FunctionType) else []


def _compiled(code: CodeType) -> list[Any]:
    """What of compiled code does not depend on where it stands, the same in every process."""
    constants: list[Any] = []
    for value in code.co_consts:
        if isinstance(value, CodeType):
            constants.append(_compiled(value))
        else:  # a set has no order that another process shares
            constants.append(sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value))
    return [code.co_code.hex(), constants, code.co_names, code.co_varnames, code.co_freevars]


def _held(function: Callable[..., Any], code: Callable[..., Any]) -> dict[str, Any]:
    """Names and values that a callable carries with it or reads from around it."""
    given: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        own = {str(place): value for place, value in enumerate(function.args)} | function.keywords
        given = {f"({name})": value for name, value in own.items()} | given
        function = function.func
    for one in _functions(code):
        defaults = {str(place): value for place, value in enumerate(one.__defaults__ or ())}
        defaults |= one.__kwdefaults__ or {}
        given |= {f"{one.__name__}({name})": value for name, value in defaults.items()} | _around(one)
    owner = function.__self__ if inspect.ismethod(function) else function
    if not inspect.isfunction(owner) and not inspect.isclass(owner):
        attributes = getattr(owner, "__dict__", {})  # an object may have none
        given |= {f".{name}": value for name, value in attributes.items() if not name.startswith("_")}
    return given


def _around(function: FunctionType) -> dict[str, Any]:
    """What a function reads from its module and from the functions around it, also in comprehensions."""
    found = {name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not set yet
            continue
    return found


def _names(code: CodeType) -> set[str]:
    inner = [value for value in code.co_consts if isinstance(value, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return isinstance(value, (str, int, float, bool, type(None)))
