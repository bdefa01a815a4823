"""The reload matrix and the head matrix, printed as tables and held to their limits."""

import math

import pytest

from tests.models.helpers import table
from tests.models.matrices import BASES, FAMILIES, RELOAD_LIMIT, TARGETS, TASK_TYPES, head_matrix, reload_matrix


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory, show):
    rows = reload_matrix(tmp_path_factory.mktemp("reload"))
    show(table("change of scores after a reload in a fresh process with another seed", rows))
    return rows


@pytest.mark.parametrize("base", RELOAD_LIMIT)
def test_scores_survive_a_reload_whatever_the_lora_config_says(reloaded, base):
    rows = [row for row in reloaded if row["base"] == base]
    assert len(rows) == len(TASK_TYPES) * len(TARGETS)
    assert [row for row in rows if not row["max_change"] <= RELOAD_LIMIT[base]] == []
    assert [row for row in rows if row["same_ranking"] is not True] == []
    assert all(row["score_std"] > 0.05 for row in rows), "scores too equal for a ranking to mean anything"


@pytest.fixture(scope="module")
def heads(tmp_path_factory, show):
    rows = head_matrix(tmp_path_factory.mktemp("heads"))
    show(table("heads on quantized bases", rows))
    return rows


@pytest.mark.parametrize("base", BASES)
def test_head_on_a_quantized_base_is_a_float_linear_that_learns(heads, base):
    rows = [row for row in heads if row["base"] == base]
    assert len(rows) == len(FAMILIES) * 4
    for row in rows:
        assert row["is_linear"], row
        assert row["dtype"] == "float32", row
        assert math.isfinite(row["gradient"]) and row["gradient"] > 0, row
        assert row["quantized_weights"] == 14, row  # 2 layers of 4 attention and 3 feed-forward weights
