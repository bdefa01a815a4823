"""Other uses of a small model: cascades, and selecting data by its likelihood."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import save_tiny_model
from trl_ext.pipelines.cascade import cascade
from trl_ext.pipelines.likelihood_selection import choose_by_value, completion_cross_entropies, select_by_likelihood


# --------------------------------------------------------------------------------------- cascades
def test_cascade_by_hand():
    points = cascade([0.9, 0.6, 0.8], small=[1, 0, 0], large=[1, 1, 0], small_cost=1.0, large_cost=10.0)
    assert [point.deferred for point in points] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [point.performance for point in points] == pytest.approx([1 / 3, 2 / 3, 2 / 3, 2 / 3])
    assert [point.cost for point in points] == pytest.approx([1, 1 + 10 / 3, 1 + 20 / 3, 11])


def test_cascade_ends_are_the_models():
    rng = np.random.default_rng(0)
    sure, small, large = rng.random(50), rng.random(50), rng.random(50)
    points = cascade(sure, small, large)
    assert points[0].performance == pytest.approx(small.mean()) and points[0].deferred == 0
    assert points[-1].performance == pytest.approx(large.mean()) and points[-1].deferred == 1
    assert cascade(sure, small, large, thresholds=[0.5])[0].deferred == pytest.approx((sure < 0.5).mean())


def test_cascade_refuses():
    with pytest.raises(ValueError, match="same number"):
        cascade([0.5], [1, 0], [1])
    with pytest.raises(ValueError, match="row 1"):
        cascade([0.5, math.nan], [1, 0], [1, 1])
    with pytest.raises(ValueError, match="confidence of row 0 is inf"):
        cascade([math.inf, 0.5], [1, 0], [1, 1])
    with pytest.raises(ValueError, match="small of row 1"):
        cascade([0.6, 0.5], [1, math.nan], [1, 1])


# --------------------------------------------------------------------------------------- likelihood
@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "llama", "llama"))


def texts() -> Dataset:
    return Dataset.from_list(
        [{"prompt": "The ", "completion": text, "n": n} for n, text in enumerate(["cat", "a dog ran", "of", "x y z"])]
    )


def test_cross_entropy_is_that_of_the_model_alone(model):
    """Batched and padded equals one row at a time through the model's own loss."""
    values = completion_cross_entropies(model, texts(), batch_size=3)
    tokenizer, alone = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    for row, value in zip(texts(), values, strict=True):
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        start = next(k for k in range(len(ids)) if len(tokenizer.decode(ids[: k + 1], skip_special_tokens=True)) > 4)
        labels = torch.tensor([[-100] * start + ids[start:]])
        with torch.no_grad():
            expected = alone(torch.tensor([ids]), labels=labels).loss.item()
        assert value == pytest.approx(expected, abs=1e-4)


def test_selection_keeps_rows_in_order_and_reports(model):
    kept, report = select_by_likelihood(model, texts(), keep=0.5)
    values = completion_cross_entropies(model, texts())
    expected = sorted(np.argsort(values)[:2].tolist())
    assert kept["n"] == expected and (report.kept, report.cut, report.unscorable) == (2, 2, 0)
    assert report.mean_kept < report.mean_cut and report.kept_range[1] == pytest.approx(max(kept["cross_entropy"]))
    other, _ = select_by_likelihood(model, texts(), keep=0.5, which="unlikely")
    assert sorted([*kept["n"], *other["n"]]) == [0, 1, 2, 3]


def test_rows_of_a_transform_are_selected_from(model):
    raw = texts().rename_columns({"prompt": "question", "completion": "answer"})
    shown = raw.with_transform(lambda b: {"prompt": b["question"], "completion": b["answer"], "n": b["n"]})
    kept, _ = select_by_likelihood(model, shown, keep=0.5)
    expected, _ = select_by_likelihood(model, texts(), keep=0.5)
    assert kept.to_list() == expected.to_list()


def test_choice_by_hand():
    values = [3.0, 1.0, math.nan, 2.0, 4.0]
    assert choose_by_value(values, 0.5, "likely").tolist() == [1, 3]
    assert choose_by_value(values, 0.5, "unlikely").tolist() == [0, 4]
    assert choose_by_value(values, 0.5, "middle").tolist() == [0, 3]
    assert choose_by_value(values, 0.01, "likely").tolist() == [1]
    with pytest.raises(ValueError, match="share"):
        choose_by_value(values, 0.0, "likely")
    with pytest.raises(ValueError, match="no likelihood can be computed"):
        choose_by_value([math.nan], 0.5, "likely")
    with pytest.raises(ValueError, match="which='best'"):
        choose_by_value(values, 0.5, "best")


def test_selecting_twice_and_what_cannot_be_selected_from(model):
    once, _ = select_by_likelihood(model, texts(), keep=0.75)
    twice, report = select_by_likelihood(model, once, keep=0.7)
    assert report.kept == len(twice) == 2 and set(twice["cross_entropy"]) < set(once["cross_entropy"])
    with pytest.raises(ValueError, match="IterableDataset"):
        select_by_likelihood(model, texts().to_iterable_dataset())
    with pytest.raises(ValueError, match=r"no column \['prompt'\]"):
        select_by_likelihood(model, texts().remove_columns("prompt"))
