"""The identity of a function: whatever changes its results, and can be seen, changes it."""

import functools
import importlib
import linecache
import os
import subprocess
import sys

import pytest

from trl_ext.pipelines.stages.callables import callable_identity


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
        return {name: callable_identity(getattr(module, name)) for name in NAMES}

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


def test_lambdas_of_one_line_and_functions_without_source_differ():
    one, two = (lambda completions: [1.0] * 3), (lambda completions: [2.0] * 3)
    assert callable_identity(one) != callable_identity(two)
    typed = []
    for number in (1, 2, 1):
        names = {"__name__": "typed"}
        exec(
            f"def rate(completions): return [{number}] * 3\nclass Rate:\n  def __call__(self): return {number}", names
        )
        typed.append((callable_identity(names["rate"]), callable_identity(names["Rate"]())))
    assert typed[0] == typed[2]
    assert typed[0][0] != typed[1][0] and typed[0][1] != typed[1][1]


def test_functions_of_libraries_are_known_by_name():
    identity = callable_identity(functools.partial(sorted, reverse=True))
    assert identity == {"function": "builtins.sorted", "source": None, "holds": {"(reverse)": "True"}}
    assert callable_identity(functools.partial(map, os.path.join))["holds"] == {"(0)": "posixpath.join"}


def test_it_is_the_same_in_every_process(own):
    here = own(MODULE)
    code = "import own_functions as o; from trl_ext.pipelines.stages.callables import callable_identity as i; "
    code += f"print({{name: i(getattr(o, name)) for name in {NAMES}}})"
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

    assert callable_identity(outer())["holds"] == {"text": "'x'"}
