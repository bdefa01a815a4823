"""`tests/` mirrors the package: whoever reads a folder of one finds its tests, or what they test, at the same path."""

from pathlib import Path

import pytest

from tests.conftest import slow_tests


ROOT = Path(__file__).resolve().parents[2]
WITHOUT_COUNTERPART = {
    "contracts": "rules about the package as a whole: imports, names, files, documentation",
    "gpu": "what runs only on a GPU, of every layer",
}


def folders(root: Path) -> set[str]:
    """The folders below `root` that hold Python files, as paths from there."""
    found = {path.parent.relative_to(root).as_posix() for path in root.rglob("*.py")}
    return found - {"."}


def test_every_folder_of_tests_is_a_folder_of_the_package():
    tests = folders(ROOT / "tests")
    assert len(tests) > 15
    assert WITHOUT_COUNTERPART.keys() <= tests, "an exception that is not needed"
    assert sorted(tests - folders(ROOT / "trl_ext") - WITHOUT_COUNTERPART.keys()) == []


def test_every_folder_of_the_package_has_tests():
    package = folders(ROOT / "trl_ext")
    assert len(package) > 15
    tested = {name for name in package if list((ROOT / "tests" / name).rglob("test_*.py"))}
    assert sorted(package - tested) == []


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.stem)
def test_test_files_are_found_by_pytest(path):
    """A file with tests whose name does not begin with `test_` would never run."""
    has_tests = any(line.startswith(("def test_", "class Test")) for line in path.read_text().splitlines())
    assert has_tests == path.name.startswith("test_")


def test_every_slow_test_that_is_listed_exists():
    for line in slow_tests():
        file, _, name = line.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / "tests" / file).read_text(), line
