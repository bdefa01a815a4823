"""The key of a function: whatever changes its results, and can be read, changes the key."""

import functools
import importlib
import json
import linecache
import logging
import os
import random
import re
import subprocess
import sys
import threading
from collections import Counter, OrderedDict, deque
from datetime import date
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trl_ext.pipelines.stages.values import callable_key, plain


MODULE = """
import functools
import json

BAR = 3

def long(text):
    return len(text) > BAR

def rate(completions, **columns):
    return [float(len(text) > BAR) for text in completions]

def helped(completions, **columns):
    return list(map(long, completions))

def defaulted(completions, bar=BAR, *, other=BAR, **columns):
    return [float(len(text) > bar) for text in completions]

def twice(function):
    @functools.wraps(function)
    def doubled(*args, **kwargs):
        return [2 * score for score in function(*args, **kwargs)]
    return doubled

@twice
def decorated(completions, **columns):
    return [1.0 for text in completions]

class Rating:
    def __call__(self, completions, **columns):
        return [float(len(text) > BAR) for text in completions]

rating = Rating()
method = Rating().__call__
partial = functools.partial(rate, bar=BAR)
unnamed = lambda completions, **columns: [float(text in {"a", "b", "c"}) for text in completions]
held = functools.partial(rate, check=long)
"""
NAMES = ["rate", "helped", "defaulted", "decorated", "rating", "method", "partial", "unnamed", "held"]
CHANGES = {
    "BAR = 3": ["rate", "helped", "defaulted", "rating", "method", "partial", "held"],
    "len(text) > BAR\n": ["helped", "held"],
    "2 * score": ["decorated"],
    "[1.0 for": ["decorated"],
    '"b"': ["unnamed"],
    "import json": [],
}

NUMBERS = ("HELP", "STATIC", "CLASS", "SHOWN", "ONCE", "CACHED", "QUIET", "ATTRIBUTE", "DEFAULT")
METHODS = "".join(f"{name} = 0\n" for name in NUMBERS)
METHODS += """
import contextlib
import functools
import re

WORD = "a"

@functools.lru_cache
def cached(text):
    return len(text) + CACHED

@contextlib.contextmanager
def quiet():
    yield QUIET

def word(text, find=re.compile(WORD).search):
    return bool(find(text))

class Grader:
    low = ATTRIBUTE

    def score(self, completions, **columns):
        with quiet():
            return [self._help(text) + word(text) for text in completions]

    __call__ = score

    def _help(self, text, more=DEFAULT):
        return min(text) + HELP + self.static(text) + self.made() + self.shown + self.once + cached(text) + self.low

    @staticmethod
    @functools.cache
    def static(text):
        return STATIC

    @classmethod
    def made(cls):
        return CLASS

    @property
    def shown(self):
        return SHOWN

    @functools.cached_property
    def once(self):
        return ONCE

grader = Grader()
bound = grader.score
given = functools.partial(grader.score, bar=1)
"""
GRADERS = ["grader", "bound", "given"]
EDITS = {"min(text)": "max(text)", "len(text)": "2 * len(text)", "yield QUIET": "yield -QUIET", '"a"': '"b"'}
EDITS |= {f"{name} = 0": f"{name} = 1" for name in NUMBERS}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A function that makes a module of a text and gives the identities of what is in it."""
    monkeypatch.syspath_prepend(tmp_path)

    def identities(text):
        (tmp_path / "own_functions.py").write_text(text)
        os.utime(tmp_path / "own_functions.py", (len(text), identities.count))  # or an old .pyc is taken for it
        identities.count += 1
        sys.modules.pop("own_functions", None)
        linecache.clearcache()
        module = importlib.import_module("own_functions")
        return {name: callable_key(getattr(module, name)) for name in (*NAMES, *GRADERS) if hasattr(module, name)}

    identities.count = 1
    yield identities
    sys.modules.pop("own_functions", None)


@pytest.mark.parametrize(("part", "changed"), CHANGES.items())
def test_what_it_reads_and_calls_belongs_to_it(own, part, changed):
    before = own(MODULE)
    assert own("# moved down a line\n" + MODULE) == before
    other = {"BAR = 3": "BAR = 4", "import json": "import sys", '"b"': '"x"', "2 * score": "3 * score"}.get(part)
    after = own(MODULE.replace(part, other or part.replace("len", "max").replace("1.0", "2.0")))
    assert [name for name in NAMES if before[name] != after[name]] == changed


@pytest.mark.parametrize("part", EDITS)
def test_a_method_depends_on_its_class_and_on_what_that_reads(own, part):
    before = own(METHODS)
    assert own("# moved down a line\n" + METHODS) == before and not any("unseen" in key for key in before.values())
    after = own(METHODS.replace(part, EDITS[part], 1))
    assert [name for name in GRADERS if before[name] != after[name]] == GRADERS


def test_lambdas_of_one_line_and_functions_without_source_differ():
    one, two = (lambda completions: [1.0] * 3), (lambda completions: [2.0] * 3)
    assert callable_key(one) != callable_key(two)
    typed = []
    for number in (1, 2, 1):
        names = {"__name__": "typed"}
        exec(
            f"def rate(completions): return [{number}] * 3\nclass Rate:\n  def __call__(self): return {number}", names
        )
        typed.append((callable_key(names["rate"]), callable_key(names["Rate"]())))
    assert typed[0] == typed[2]
    assert typed[0][0] != typed[1][0] and typed[0][1] != typed[1][1]


def test_functions_of_libraries_are_known_by_name():
    identity = callable_key(functools.partial(sorted, reverse=True))
    assert identity == {"function": "builtins.sorted", "source": None, "holds": {"(reverse)": "True"}}
    assert callable_key(functools.partial(map, os.path.join))["holds"] == {"(0)": "posixpath.join"}


def test_it_is_the_same_in_every_process(own):
    here = own(MODULE + METHODS)
    assert list(here) == [*NAMES, *GRADERS]
    code = "import own_functions as o; from trl_ext.pipelines.stages.values import callable_key as i; "
    code += f"print({{name: i(getattr(o, name)) for name in {list(here)}}})"
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        assert eval(found.stdout) == here


def test_names_that_are_in_no_module():
    def outer():
        text = "x"

        def inner(completions):
            return [text] + [missing]  # noqa: F821 - another cell or a name of nowhere

        return inner

    assert callable_key(outer())["holds"] == {"text": "'x'"}


# Values that a function reads


class Words:
    def __init__(self, words):
        self.words = words


class Characters:
    def rate(self, text):
        return len(text)


class Sentences:
    def rate(self, text):
        return text.count(".")


def around(value):
    def rate(completions, **columns):
        return [float(value is text) for text in completions]

    return rate


PAIRS = {
    "list": (["a", "b"], ["a", "c"]),
    "nested": ({"a": [1, {"b": {2}}]}, {"a": [1, {"b": {3}}]}),
    "dictionary": ({"a": 1}, {"a": 2}),
    "set": ({"a", "b"}, {"a", "c"}),
    "pattern": (re.compile("a+"), re.compile("a*")),
    "flags": (re.compile("a"), re.compile("a", re.IGNORECASE)),
    "array": (np.arange(3), np.arange(3.0)),
    "number of numpy": (np.float32(1), np.float32(2)),
    "array of objects": (np.array(["a", None]), np.array(["a", 1])),
    "tensor": (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)),
    "module": (torch.nn.Linear(1, 1).requires_grad_(False), torch.nn.Linear(1, 1, bias=False)),
    "counter": (Counter("aab"), Counter("abb")),
    "order": (OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)),
    "deque": (deque([1]), deque([2])),
    "date": (date(2020, 1, 1), date(2020, 1, 2)),
    "decimal": (Decimal("0.1"), Decimal("0.2")),
    "bytes": (b"a", b"b"),
    "object": (Words(["a"]), Words(["b"])),
    "namespace": (SimpleNamespace(bar=[1]), SimpleNamespace(bar=[2])),
    "partial": (functools.partial(max, 1), functools.partial(max, 2)),
    "tuple of lists": (([1],), ([2],)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_content_of_what_a_function_reads_counts(name):
    one, other = PAIRS[name]
    keys = [callable_key(around(value)) for value in (one, other, one)]
    assert keys[0] != keys[1] and keys[0] == keys[2] and not any("unseen" in key for key in keys)
    json.dumps(keys)


def test_a_value_that_changes_where_it_stands_counts():
    words = ["good"]
    rate = around(words)
    before = callable_key(rate)
    words.append("bad")
    assert callable_key(rate) != before
    rates = functools.partial(around, value={"a": words})
    before = callable_key(rates)
    words.clear()
    assert callable_key(rates) != before


def test_what_a_function_writes_into_does_not_count():
    calls, cache, kept = [], {}, ["x"]

    def rate(completions, **columns):
        calls.append(len(completions))
        for text in completions:
            cache[text] = float(text in kept)
        return [cache[text] for text in completions]

    before = callable_key(rate)
    assert rate(["x", "y"]) == [1.0, 0.0]
    assert callable_key(rate) == before
    kept.append("y")
    assert callable_key(rate) != before


def test_what_cannot_be_read_is_named():
    lock, logger = threading.Lock(), logging.getLogger("a")
    assert callable_key(around(lock))["unseen"] == {"value": "_thread.lock"}
    assert callable_key(around({"client": lock}))["unseen"] == {"value": "_thread.lock"}
    assert "unseen" not in callable_key(around(logger))
    held = functools.partial(around, Words([lock]))
    assert list(callable_key(held)["unseen"].values()) == ["_thread.lock"]


def test_variables_of_two_modules_with_one_name_count_both():
    modules = [{"__name__": "typed", "BAR": 1}, {"__name__": "typed", "BAR": 2}]
    exec("class Base:\n  def rate(self): return BAR", modules[0])
    modules[1]["Base"] = modules[0]["Base"]
    exec("class Rating(Base):\n  def __call__(self): return self.rate() + BAR", modules[1])
    rating = modules[1]["Rating"]()
    keys = [callable_key(rating)]
    for module in modules:
        module["BAR"] += 10
        keys.append(callable_key(rating))
    assert keys[0] != keys[1] != keys[2] and keys[0] != keys[2]


def test_slots_count_and_what_a_cached_property_keeps_does_not():
    class Slotted:
        __slots__ = ("bar", "empty")

        def __call__(self, completions, **columns):
            return [self.bar] * len(completions)

    class Cached:
        @functools.cached_property
        def words(self):
            return ["a"]

        def rate(self, completions, **columns):
            return [float(text in self.words) for text in completions]

    slotted, cached = Slotted(), Cached()
    slotted.bar = 1
    before = callable_key(slotted), callable_key(slotted.__call__), callable_key(cached.rate)
    slotted.bar = 2
    assert callable_key(slotted) != before[0] and callable_key(slotted.__call__) != before[1]
    assert cached.rate(["a"]) == [1.0] and callable_key(cached.rate) == before[2]


def test_a_method_of_a_generator_of_random_numbers_does_not_depend_on_its_state():
    rate = around(random.random)
    before = callable_key(rate)
    random.random()
    assert callable_key(rate) == before and "unseen" not in before


def test_a_base_class_outside_of_libraries_counts():
    def derived(base):
        class Derived(base):
            def __call__(self, completions, **columns):
                return [self.rate(text) for text in completions]

        return Derived()

    keys = [callable_key(derived(base)) for base in (Characters, Sentences, Characters)]
    assert keys[0]["function"] == keys[1]["function"] and keys[0] != keys[1] and keys[0] == keys[2]


def test_a_module_of_yours_counts_by_its_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for number in (1, 2):
        (tmp_path / "own_helpers.py").write_text(f"def bar():\n    return {number}{'0' * number}\n")
        linecache.clearcache()
        sys.modules.pop("own_helpers", None)
        keys.append(callable_key(around(importlib.import_module("own_helpers"))))
    sys.modules.pop("own_helpers", None)
    assert keys[0] != keys[1]


def test_plain_values_are_json_that_a_person_can_read():
    value = {"dtype": torch.bfloat16, 1: ("a", {"c", "b"}), "where": torch.device("cpu"), "f": len}
    found = plain(value)
    assert json.loads(json.dumps(found)) == found
    assert found["dtype"] == "bfloat16" and found["1"] == ["a", ["b", "c"]] and found["where"] == "cpu"
    assert found["f"]["function"] == "builtins.len"
    assert plain(re.compile("a")) == plain(re.compile("a")) != plain(re.compile("b"))
