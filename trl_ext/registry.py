"""Registries: a string in a config selects a pure callable, built in or from an installed plugin.

A registry knows names, callables, entry points, and the properties that a callable declares (for example, that a loss
compares two candidates). It does not know what the callables compute. The module imports only the standard library. A
plugin is imported when you ask for its name, never before.
"""

import difflib
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar


F = TypeVar("F", bound=Callable)

PROPERTIES = "trl_ext_properties"
"""Attribute of a callable that holds its declared properties, as a dictionary."""

_REGISTRIES: list["Registry"] = []


def _distribution(plugin: EntryPoint) -> str:
    return f"{plugin.dist.name} {plugin.dist.version}"


class Registry:
    """
    Names of one kind of callable.

    Built-ins register with a decorator. A third-party package adds names through an entry-point group in its
    `pyproject.toml`. The package is imported when one of its names is used.

    Args:
        kind (`str`):
            What is registered, e.g. `"ranking loss"`. Messages use it.
        group (`str`):
            Entry-point group that plugins use, e.g. `"trl_ext.ranking_losses"`.
        properties (`type`, *optional*):
            A dataclass with the properties that a callable of this kind can declare. Its defaults are the strictest
            values. They hold for every property that a callable does not declare.

    Example:

    ```python
    >>> losses = Registry(kind="ranking loss", group="trl_ext.ranking_losses")

    >>> @losses.register("zero")
    ... def zero(scores, ratings, mask):
    ...     return scores.sum(-1) * 0

    >>> losses.get("zero") is zero
    True
    >>> losses.get("zeor")
    Traceback (most recent call last):
    ValueError: Unknown ranking loss 'zeor'. Did you mean 'zero'? Known: zero. ...
    ```
    """

    def __init__(self, kind: str, group: str, properties: type | None = None):
        self.kind = kind
        self.group = group
        self._properties = properties
        self._callables: dict[str, Callable] = {}
        self._loaded: dict[str, Callable] = {}  # by `get`, which would read all entry points each time
        self._searched: list[str] = []  # the `sys.path` that they were found on
        _REGISTRIES.append(self)

    def __repr__(self) -> str:
        return f"Registry(kind={self.kind!r}, group={self.group!r})"

    def register(self, name: str, **properties: Any) -> Callable[[F], F]:
        """
        Decorator that registers a callable under `name` and declares its properties. It returns the callable.

        Raises:
            ValueError: if the name is taken, or if this kind of callable has no such property.
        """
        if name in self._callables:
            raise ValueError(
                f"The {self.kind} '{name}' is already registered by {self._origin(name)}. Choose another name."
            )

        def decorate(function: F) -> F:
            self._callables[name] = declare(function)
            return function

        declare = self.declare(**properties)
        return decorate

    def declare(self, **properties: Any) -> Callable[[F], F]:
        """
        Decorator that declares the properties of a callable without registering it. It returns the callable.

        Use it for the target of a plugin's entry point, and for a callable that you pass in place of a name.

        Raises:
            ValueError: if this kind of callable has no such property.

        Example:

        ```python
        @ranking_losses.declare(uses_distances=False, max_candidates=None)
        def my_loss(scores, ratings, mask, *, margin=None, target=None): ...
        ```
        """
        self._read(properties, "the decorator")

        def decorate(function: F) -> F:
            if properties:
                setattr(function, PROPERTIES, properties)
            return function

        return decorate

    def properties_of(self, name: str | Callable) -> Any:
        """
        The declared properties of a callable, as an instance of the registry's dataclass.

        A property that the callable does not declare has its strict default. A `functools.partial` has the properties
        of the callable that it wraps.

        Raises:
            As [`Registry.get`], and `ValueError` if it declares a property that this kind of callable does not have.
        """
        function = self.get(name)
        while isinstance(function, partial):
            function = function.func
        # a callable that declares nothing has no such attribute
        return self._read(getattr(function, PROPERTIES, None) or {}, f"{function!r}")

    def _read(self, properties: dict[str, Any], where: str) -> Any:
        known = [] if self._properties is None else [field.name for field in fields(self._properties)]
        unknown = sorted(set(properties) - set(known))
        if unknown:
            raise ValueError(
                f"{where} declares {', '.join(map(repr, unknown))}, which a {self.kind} does not have. Known "
                f"properties: {', '.join(known) or 'none'}."
            )
        return None if self._properties is None else self._properties(**properties)

    def get(self, name: str | Callable) -> Callable:
        """
        The callable with this name. If you pass a callable, it is returned unchanged.

        Args:
            name (`str` or `Callable`):
                A registered name, the name of an entry point in the registry's group, or a callable.

        Raises:
            ValueError: if nothing has this name (the message lists the known names and the nearest one), or if more
                than one distribution claims it.
            ImportError: if the plugin with this name fails to import. The message names its distribution.
            TypeError: if `name` is neither a string nor a callable, or the plugin's object is not callable.
        """
        if callable(name):
            return name
        if not isinstance(name, str):
            raise TypeError(f"A {self.kind} is chosen by its name or is a callable, found {type(name).__name__}.")
        if self._searched != sys.path:  # another path may hold other plugins, and conflicts
            self._searched = list(sys.path)
            self._loaded.clear()
        if name in self._loaded:
            return self._loaded[name]
        plugins = [plugin for plugin in self._plugins() if plugin.name == name]
        claims = [self._origin(name)] if name in self._callables else []
        claims += [_distribution(plugin) for plugin in plugins]
        if not claims:
            raise ValueError(self._unknown(name))
        if len(claims) > 1:
            raise ValueError(
                f"The {self.kind} '{name}' is claimed by {' and by '.join(claims)}. Uninstall all but one, ask the "
                f"plugin's author to rename its entry point in '{self.group}', or pass the callable itself."
            )
        self._loaded[name] = self._callables[name] if name in self._callables else self._load(plugins[0])
        return self._loaded[name]

    def available(self) -> list[tuple[str, str]]:
        """
        Every name with its origin, sorted, without importing any plugin.

        Returns:
            `list[tuple[str, str]]`: `(name, origin)`. The origin of a registered callable is the module that defines
            it. The origin of a plugin is its distribution, version and target. A name that two distributions claim
            appears twice.
        """
        names = [(name, self._origin(name)) for name in self._callables]
        names += [(plugin.name, f"{_distribution(plugin)} ({plugin.value})") for plugin in self._plugins()]
        return sorted(names)

    def _origin(self, name: str) -> str:
        return self._callables[name].__module__

    def _plugins(self) -> list[EntryPoint]:
        return list(entry_points(group=self.group))

    def _load(self, plugin: EntryPoint) -> Callable:
        try:
            loaded = plugin.load()
        except Exception as error:  # whatever a third-party module raises at import
            raise ImportError(
                f"The {self.kind} '{plugin.name}' comes from the plugin {_distribution(plugin)} ({plugin.value}), "
                f"which failed to import: {type(error).__name__}: {error}. Repair, update or "
                f"uninstall {plugin.dist.name}."
            ) from error
        if not callable(loaded):
            raise TypeError(
                f"The {self.kind} '{plugin.name}' of the plugin {_distribution(plugin)} ({plugin.value}) is a "
                f"{type(loaded).__name__}; a callable is needed. Update or uninstall {plugin.dist.name}."
            )
        return loaded

    def _unknown(self, name: str) -> str:
        known = sorted({known for known, _ in self.available()})
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return (
            f"Unknown {self.kind} '{name}'.{hint} Known: {', '.join(known) or 'none'}. A package adds names through "
            f"the entry-point group '{self.group}'; a callable is accepted in place of a name."
        )


def all_registries() -> list[Registry]:
    """Every registry that exists so far, in the order in which their modules were imported."""
    return list(_REGISTRIES)
