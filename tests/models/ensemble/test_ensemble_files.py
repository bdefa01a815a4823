"""`reward_ensemble.json`: what is written is read, and what cannot be right is refused with a cure."""

import json
import logging

import pytest

from trl_ext.models.ensemble.ensemble_files import (
    EnsembleFile,
    EnsembleFileError,
    member_folders,
    read_ensemble,
    write_ensemble,
)


@pytest.fixture
def folder(tmp_path):
    for member in range(2):
        (tmp_path / f"member-{member}").mkdir()
    return tmp_path


def change(folder, **fields):
    path = folder / "reward_ensemble.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_round_trip(folder):
    file = EnsembleFile(
        members=["member-0", "member-1"],
        reduce="mean_minus_var",
        reduce_kwargs={"coefficient": 0.1},
        normalizers=[{"mean": 1.0, "std": 2.0}, None],
        branch_layer=6,
    )
    write_ensemble(folder, file)
    assert read_ensemble(folder) == file
    assert member_folders(folder, file) == [folder / "member-0", folder / "member-1"]


def test_the_least_that_a_file_may_say(folder):
    (folder / "reward_ensemble.json").write_text('{"schema_version": 1, "members": ["member-1"]}')
    assert read_ensemble(folder) == EnsembleFile(members=["member-1"], reduce="mean", normalizers=[None])


def test_no_file_is_none(folder):
    assert read_ensemble(folder) is None


def test_unknown_keys_are_ignored_with_a_warning(folder, caplog):
    file = EnsembleFile(members=["member-0"])
    write_ensemble(folder, file)
    change(folder, colour="green")
    with caplog.at_level(logging.WARNING):
        assert read_ensemble(folder) == file
    assert "colour" in caplog.text


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"schema_version": 2}, "schema version 2.*Upgrade"),
        ({"schema_version": "1"}, "schema version '1'"),
        ({"members": []}, "needed: a list of folder names"),
        ({"members": "member-0"}, "needed: a list of folder names"),
        ({"members": ["member-0", "member-0"]}, "names a folder twice"),
        ({"members": ["../member-0"]}, "not inside"),
        ({"members": ["/member-0"]}, "not inside"),
        ({"members": ["member-0", "member-7"]}, "lacks the folders of 1 of 2 members.*member-7"),
        ({"weights": [1.0]}, "weights=.*with 2 members"),
        ({"weights": [1.0, "2"]}, "finite numbers"),
        ({"weights": [1.0, float("nan")]}, "finite numbers"),
        ({"normalizers": [None]}, "normalizers=.*with 2 members"),
        ({"normalizers": [None, {"mean": 0.0, "std": 0.0}]}, "std above 0"),
        ({"normalizers": [None, {"mean": 0.0}]}, "std above 0"),
        ({"reduce": 3}, "name of a reducer"),
        ({"reduce_kwargs": [1]}, "arguments by name"),
    ],
)
def test_what_is_wrong_is_said(folder, fields, complaint):
    write_ensemble(folder, EnsembleFile(members=["member-0", "member-1"]))
    change(folder, **fields)
    with pytest.raises(EnsembleFileError, match=f"(?s){folder}.*{complaint}"):
        read_ensemble(folder)


@pytest.mark.parametrize("text", ["{", "[1]", '{"schema_version": 1}'])
def test_what_is_no_description(folder, text):
    (folder / "reward_ensemble.json").write_text(text)
    with pytest.raises(EnsembleFileError, match="Restore the file"):
        read_ensemble(folder)


def test_nothing_is_written_without_the_members(tmp_path):
    with pytest.raises(EnsembleFileError, match="member-0"):
        write_ensemble(tmp_path, EnsembleFile(members=["member-0"]))
    assert not (tmp_path / "reward_ensemble.json").exists()
