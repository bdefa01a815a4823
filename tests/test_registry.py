"""The registry: names, plugins found through entry points, and every way in which a lookup fails."""

import functools
import sys
import textwrap
from dataclasses import dataclass

import pytest

from trl_ext import registry as registry_module
from trl_ext.registry import Registry, all_registries


GROUP = "trl_ext_test.things"


@pytest.fixture
def registry(monkeypatch):
    """A registry of its own, with one built-in, that is forgotten afterwards."""
    monkeypatch.setattr(registry_module, "_REGISTRIES", [])
    registry = Registry(kind="thing", group=GROUP)

    @registry.register("built_in")
    def built_in():
        return "built in"

    return registry


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that puts a distribution with one entry point and one module on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def add(distribution, name, code, target="thing"):
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {module}:{target}\n")
        return module

    yield add
    for module in set(sys.modules) - before:
        del sys.modules[module]


def test_register_returns_the_function_unchanged_and_get_finds_it(registry):
    def thing():
        pass

    assert registry.register("thing")(thing) is thing
    assert registry.get("thing") is thing
    assert registry.available() == [("built_in", __name__), ("thing", __name__)]


def test_a_callable_is_returned_as_it_is(registry):
    assert registry.get(max) is max


def test_a_name_is_given_only_once(registry):
    with pytest.raises(ValueError, match="thing 'built_in' is already registered by tests.test_registry"):
        registry.register("built_in")


@pytest.mark.parametrize(("name", "near"), [("bilt_in", "built_in"), ("xyzzy", None)])
def test_an_unknown_name_lists_the_known_and_the_nearest(registry, install, name, near):
    install("far-package", "far", "thing = print")
    with pytest.raises(ValueError) as error:
        registry.get(name)
    message = str(error.value)
    assert f"Unknown thing '{name}'" in message and "Known: built_in, far." in message and GROUP in message
    assert (f"Did you mean '{near}'?" in message) == (near is not None)
    assert "far_package" not in sys.modules


def test_neither_name_nor_callable(registry):
    with pytest.raises(TypeError, match="by its name or is a callable, found int"):
        registry.get(3)


def test_a_plugin_is_imported_when_it_is_named_and_not_before(registry, install):
    module = install("good-plugin", "good", "def thing(): return 'plugged in'")
    assert ("good", "good-plugin 1.2 (good_plugin:thing)") in registry.available()
    assert registry.get("built_in")() == "built in"
    assert module not in sys.modules
    assert registry.get("good")() == "plugged in"
    assert module in sys.modules
    assert registry.get("good") is registry.get("good")


def test_a_name_that_was_found_is_not_looked_up_again(registry, install, monkeypatch):
    """A lookup reads the metadata of all installed distributions, which takes milliseconds."""
    install("good-plugin", "good", "def thing(): return 'plugged in'")
    found = registry.get("built_in"), registry.get("good")
    monkeypatch.setattr(registry_module, "entry_points", None)
    assert (registry.get("built_in"), registry.get("good")) == found


def test_a_broken_plugin_fails_only_when_it_is_named(registry, install):
    install("broken-plugin", "broken", "import no_such_module_anywhere")
    assert registry.get("built_in")() == "built in"
    assert len(registry.available()) == 2
    with pytest.raises(
        ImportError, match=r"'broken' comes from the plugin broken-plugin 1.2 .*no_such_module_anywhere"
    ):
        registry.get("broken")


def test_a_plugin_whose_target_does_not_exist(registry, install):
    install("empty-plugin", "empty", "")
    with pytest.raises(ImportError, match="empty-plugin 1.2 .*AttributeError"):
        registry.get("empty")


def test_a_plugin_that_is_not_callable(registry, install):
    install("odd-plugin", "odd", "thing = 3")
    with pytest.raises(TypeError, match=r"odd-plugin 1.2 \(odd_plugin:thing\) is a int; a callable is needed"):
        registry.get("odd")


def test_a_plugin_cannot_take_the_name_of_a_built_in(registry, install):
    install("greedy-plugin", "built_in", "thing = print")
    with pytest.raises(ValueError, match="'built_in' is claimed by tests.test_registry and by greedy-plugin 1.2"):
        registry.get("built_in")
    assert [name for name, _ in registry.available()] == ["built_in", "built_in"]
    assert "greedy_plugin" not in sys.modules


def test_two_plugins_cannot_share_a_name(registry, install):
    install("first-plugin", "shared", "thing = print")
    install("second-plugin", "shared", "thing = print")
    with pytest.raises(ValueError, match="first-plugin 1.2.*second-plugin 1.2|second-plugin 1.2.*first-plugin 1.2"):
        registry.get("shared")


def test_all_registries_is_a_copy_in_order_of_creation(registry):
    other = Registry(kind="other", group="trl_ext_test.others")
    assert all_registries() == [registry, other]
    all_registries().clear()
    assert all_registries() == [registry, other]


@dataclass(frozen=True)
class ThingProperties:
    is_round: bool = False
    colour: str | None = None


@pytest.fixture
def with_properties(monkeypatch):
    monkeypatch.setattr(registry_module, "_REGISTRIES", [])
    return Registry(kind="thing", group=GROUP, properties=ThingProperties)


def test_properties_are_those_declared_and_strict_defaults_for_the_rest(with_properties, install):
    @with_properties.register("ball", is_round=True)
    def ball():
        pass

    @with_properties.declare(colour="red")
    def box():
        pass

    assert with_properties.properties_of("ball") == ThingProperties(is_round=True)
    assert with_properties.properties_of(box) == ThingProperties(colour="red")
    assert with_properties.properties_of(functools.partial(functools.partial(ball))).is_round
    assert with_properties.properties_of(max) == ThingProperties()
    install("old-plugin", "old", "def thing(): pass")
    assert with_properties.properties_of("old") == ThingProperties()
    install("new-plugin", "new", "def thing(): pass\nthing.trl_ext_properties = {'is_round': True}")
    assert with_properties.properties_of("new") == ThingProperties(is_round=True)


def test_a_property_that_does_not_exist_is_refused_where_it_is_declared(with_properties, registry, install):
    with pytest.raises(ValueError, match="'weight', which a thing does not have. Known properties: is_round, colour"):
        with_properties.register("heavy", weight=3)
    with pytest.raises(ValueError, match="'weight'"):
        with_properties.declare(weight=3)
    with pytest.raises(ValueError, match="Known properties: none"):
        registry.register("heavy", weight=3)
    assert registry.properties_of("built_in") is None
    install("wrong-plugin", "wrong", "def thing(): pass\nthing.trl_ext_properties = {'weight': 3}")
    with pytest.raises(ValueError, match="function thing.*'weight'"):
        with_properties.properties_of("wrong")


def test_a_conflict_on_a_new_path_is_found_although_the_name_was_used_before(registry, tmp_path, monkeypatch):
    assert registry.get("built_in")() == "built in"
    info = tmp_path / "greedy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: greedy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nbuilt_in = greedy:thing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="claimed by"):
        registry.get("built_in")
