"""Cache keys: hash and compare manifests, and raise an error that names the changes.

A *manifest* is a dictionary of JSON values with everything that a result depends on. Its hash is the cache key. This
module does not know where manifests are kept (`store`), or how a Python value becomes JSON (`values`).
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """
    One entry that differs between two manifests.

    Args:
        name (`str`): the entry; entries of nested dictionaries are joined by dots.
        before: the value when the stored result was made.
        now: the current value.
    """

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}={_short(self.before)}, now {_short(self.now)}"


class StaleError(ValueError):
    """
    A stored result was made with other settings than the current ones.

    The message names every entry that changed, with its old and new value, and what to do.

    Args:
        where (`str`): the stored result, as the start of a sentence: `"The rounds in runs/1 were"`.
        changes (`Sequence[Change | str]`): the differences.
        fix (`str`): what the user should do.
    """

    def __init__(self, where: str, changes: Sequence[Change | str], fix: str):
        self.where, self.changes, self.fix = where, list(changes), fix
        super().__init__(f"{where} made with other settings ({'; '.join(map(str, changes))}). {fix}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.where, self.changes, self.fix)


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, for hashing."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()


def key_of(manifest: Mapping[str, Any]) -> str:
    """
    The cache key of a manifest: 16 hexadecimal digits that do not depend on the order of its entries.

    Example:

    ```python
    >>> key_of({"temperature": 1.0, "seed": 0}) == key_of({"seed": 0, "temperature": 1.0})
    True
    ```
    """
    return hashlib.sha256(canonical(manifest)).hexdigest()[:16]


def changes_between(
    before: Mapping[str, Any], now: Mapping[str, Any], ignore: Collection[str] = (), prefix: str = ""
) -> list[Change]:
    """
    The entries that differ, by name.

    Args:
        before (`Mapping`): the manifest of the stored result.
        now (`Mapping`): the manifest of the requested result.
        ignore (`Collection[str]`, *optional*): top-level entries that may differ.
        prefix (`str`, *optional*): put before each name.
    """
    found = []
    for name in sorted({*before, *now} - set(ignore)):
        one, other = before.get(name), now.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += changes_between(one, other, prefix=f"{prefix}{name}.")
        elif one != other:
            found.append(Change(f"{prefix}{name}", one, other))
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
