"""A log of records survives a kill at any byte, and records of another manifest stay apart."""

import pytest

from trl_ext.pipelines.stages.record_log import RecordLog


def test_a_log_cut_at_any_byte_keeps_what_was_whole(tmp_path):
    with RecordLog(tmp_path / "whole", {"model": "a"}) as log:
        for number in range(3):
            log.add(str(number), {"value": number})
        content, path = log.path.read_bytes(), log.path
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    for size in range(0, len(content) + 1, 7):
        path.write_bytes(content[:size])
        with RecordLog(tmp_path / "whole", {"model": "a"}) as log:
            kept = sum(end <= size for end in ends)
            assert len(log) == kept and "2" not in log or kept == 3
            log.add("new", {"value": -1})
        with RecordLog(tmp_path / "whole", {"model": "a"}) as log:
            assert len(log) == kept + 1 and log["new"] == {"value": -1}


def test_a_changed_record_is_made_again_and_the_others_stay(tmp_path, caplog):
    with RecordLog(tmp_path, {"model": "a"}) as log:
        for number in range(3):
            log.add(str(number), {"value": number})
    log.path.write_bytes(log.path.read_bytes().replace(b'"value": 1', b'"value": 7'))
    with RecordLog(tmp_path, {"model": "a"}) as log:
        assert "0" in log and "1" not in log and log["2"] == {"value": 2}
    assert "1 damaged records" in caplog.text
    with pytest.raises(KeyError):
        log["1"]


def test_another_manifest_has_another_log_and_the_change_is_named(tmp_path, caplog):
    with RecordLog(tmp_path, {"model": "a", "seed": 0}) as log:
        log.add("key", {"value": 1})
    with RecordLog(tmp_path, {"model": "a", "seed": 1}) as other:
        assert "key" not in other
    assert "seed=0, now 1" in caplog.text
    with RecordLog(tmp_path, {"model": "a", "seed": 0}) as log:
        assert log["key"] == {"value": 1}
