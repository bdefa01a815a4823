"""Metrics: by hand, against scipy, scikit-learn and numpy, what must not change them, and aggregation by batches."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import ndcg_score

from trl_ext.metrics.ranking import (
    StreamedMetrics,
    centered_products,
    kendall_tau,
    length_accuracy,
    margin,
    ndcg,
    pair_accuracy,
    pearson,
    ranking_columns,
    ranking_summary,
    spearman,
    top1_agreement,
)


METRICS = {
    "pair_accuracy": pair_accuracy,
    "top1_agreement": top1_agreement,
    "kendall_tau": kendall_tau,
    "ndcg": ndcg,
    "margin": margin,
    "length_accuracy": length_accuracy,
}

each_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)


def everyone(scores):
    return torch.ones_like(scores, dtype=torch.bool)


def one(metric, scores, ratings):
    """The metric of one group, from lists."""
    scores, ratings = torch.tensor([scores]), torch.tensor([ratings])
    return metric(scores, ratings, everyone(scores)).item()


def ragged(groups=40, width=7, seed=0, lowest=0):
    """Scores and ratings with ties, and a mask with holes anywhere; some groups are undecided or of one candidate."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (groups, width), generator=generator).float() / 4 - 0.5
    ratings = torch.randint(lowest, lowest + 4, (groups, width), generator=generator).float()
    mask = torch.rand(groups, width, generator=generator) < 0.6
    mask[torch.arange(groups), torch.randint(0, width, (groups,), generator=generator)] = True
    return scores, ratings, mask


def real_parts(*tensors, mask):
    """The real candidates of each group, as numpy arrays."""
    return [[tensor[group, mask[group]].double().numpy() for tensor in tensors] for group in range(len(mask))]


def assert_equal_or_both_nan(found, wanted, **tolerance):
    torch.testing.assert_close(found.double(), torch.tensor(wanted).double(), equal_nan=True, **tolerance)


# By hand


def test_pair_accuracy_by_hand():
    assert one(pair_accuracy, [3.0, 1.0, 2.0], [3.0, 2.0, 1.0]) == pytest.approx(2 / 3)
    assert one(pair_accuracy, [3.0, 1.0, 2.0], [3.0, 1.0, 1.0]) == 1.0  # two pairs are decided
    assert one(pair_accuracy, [1.0, 1.0], [1.0, 0.0]) == 0.0  # equal scores are wrong
    assert math.isnan(one(pair_accuracy, [1.0, 2.0], [1.0, 1.0]))
    assert one(pair_accuracy, [1e-3, 0.0], [1.0, 0.0]) == 1.0


def test_top1_agreement_by_hand():
    assert one(top1_agreement, [3.0, 1.0, 2.0], [3.0, 1.0, 2.0]) == 1.0
    assert one(top1_agreement, [3.0, 4.0, 2.0], [3.0, 1.0, 2.0]) == 0.0
    assert one(top1_agreement, [1.0, 4.0, 2.0], [3.0, 3.0, 2.0]) == 1.0  # one of two best
    assert one(top1_agreement, [4.0, 4.0, 2.0], [3.0, 3.0, 2.0]) == 1.0
    assert one(top1_agreement, [4.0, 1.0, 4.0], [3.0, 3.0, 2.0]) == 0.0  # a tie with a worse one
    assert math.isnan(one(top1_agreement, [4.0, 1.0], [3.0, 3.0]))


def test_kendall_tau_by_hand():
    assert one(kendall_tau, [3.0, 1.0, 2.0], [3.0, 2.0, 1.0]) == pytest.approx(1 / 3)
    assert one(kendall_tau, [1.0, 2.0], [2.0, 1.0]) == -1.0
    assert math.isnan(one(kendall_tau, [1.0, 1.0], [2.0, 1.0]))
    assert math.isnan(one(kendall_tau, [1.0, 2.0], [1.0, 1.0]))


def test_ndcg_by_hand():
    best = 3 + 2 / math.log2(3) + 1 / 2
    assert one(ndcg, [3.0, 1.0, 2.0], [3.0, 2.0, 1.0]) == pytest.approx((3 + 1 / math.log2(3) + 2 / 2) / best)
    assert one(ndcg, [3.0, 1.0, 2.0], [3.0, 1.0, 2.0]) == pytest.approx(1.0)
    # ranks 1, 2, 3 come as ratings -1, -2, -3: gains 2, 1, 0
    best = 2 + 1 / math.log2(3)
    assert one(ndcg, [1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]) == pytest.approx((1 / math.log2(3) + 2 / 2) / best)
    assert math.isnan(one(ndcg, [1.0, 2.0], [3.0, 3.0]))


def test_margin_and_length_accuracy_by_hand():
    assert one(margin, [3.0, 1.0, 2.0], [3.0, 2.0, 1.0]) == pytest.approx((2 + 1 - 1) / 3)
    assert math.isnan(one(margin, [3.0, 1.0], [3.0, 3.0]))
    lengths = torch.tensor([[100, 7, 7]])
    assert length_accuracy(lengths, torch.tensor([[2.0, 1.0, 0.0]]), everyone(lengths)).tolist() == [
        pytest.approx(2 / 3)
    ]


def test_a_pair_is_measured_as_in_trl():
    scores = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    ratings, mask = torch.tensor([[1.0, 0.0]]).expand(32, 2), everyone(scores)
    wanted = (scores[:, 0] > scores[:, 1]).float()
    assert torch.equal(pair_accuracy(scores, ratings, mask), wanted)
    assert torch.equal(top1_agreement(scores, ratings, mask), wanted)
    torch.testing.assert_close(margin(scores, ratings, mask), scores[:, 0] - scores[:, 1])


# Against scipy and scikit-learn


def test_kendall_tau_against_scipy():
    scores, ratings, mask = ragged()
    wanted = [
        stats.kendalltau(s, r).statistic if len(s) > 1 else math.nan for s, r in real_parts(scores, ratings, mask=mask)
    ]
    assert 5 < np.isfinite(wanted).sum() < len(wanted)
    assert_equal_or_both_nan(kendall_tau(scores, ratings, mask), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lowest", [0, 2, -3])
def test_ndcg_against_scikit_learn(lowest):
    scores, ratings, mask = ragged(lowest=lowest)
    wanted = []
    for group_scores, group_ratings in real_parts(scores, ratings, mask=mask):
        gains = group_ratings - min(0.0, group_ratings.min())
        decided = np.ptp(group_ratings) > 0
        wanted.append(ndcg_score([gains], [group_scores]) if decided else math.nan)
    assert 5 < np.isfinite(wanted).sum() < len(wanted)
    assert_equal_or_both_nan(ndcg(scores, ratings, mask), wanted, rtol=0, atol=1e-6)


def test_length_correlation_against_numpy():
    scores, ratings, mask = ragged()
    lengths = torch.randint(1, 900, scores.shape, generator=torch.Generator().manual_seed(1))
    parts = [[x - x.mean() for x in part] for part in real_parts(scores, lengths, mask=mask)]
    wanted = stats.pearsonr(*(np.concatenate(column) for column in zip(*parts, strict=True))).statistic
    sums = [column.double().sum().item() for column in centered_products(scores, lengths, mask)]
    assert pearson(*sums) == pytest.approx(wanted, abs=1e-6)


def test_pearson_of_what_does_not_vary():
    assert math.isnan(pearson(0.0, 3.0, 0.0)) and math.isnan(pearson(3.0, 0.0, 0.0))
    assert pearson(2.0, 8.0, 4.0) == 1.0 and pearson(2.0, 8.0, -4.0) == -1.0


def test_spearman_against_scipy():
    x, y, _ = ragged(groups=30, width=1, seed=5)  # few levels: many ties
    assert spearman(x[:, 0], y[:, 0]) == pytest.approx(stats.spearmanr(x[:, 0], y[:, 0]).statistic, abs=1e-6)
    assert spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.1, 0.3, 0.2])) == pytest.approx(0.5)
    assert math.isnan(spearman(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0])))
    many = torch.arange(200_000.0)  # not a table of all pairs
    assert spearman(many, many.square()) == pytest.approx(1.0) and spearman(many, -many) == pytest.approx(-1.0)


# What must not change them


@pytest.mark.parametrize("filling", [0.0, 1e6, -torch.inf, torch.nan])
@each_metric
def test_padding(metric, filling):
    scores, ratings, mask = ragged()
    wanted = metric(scores, ratings, mask)
    found = metric(scores.masked_fill(~mask, filling), ratings.masked_fill(~mask, filling), mask)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    alone = [
        metric(scores[i, mask[i]][None], ratings[i, mask[i]][None], mask[i, mask[i]][None]) for i in range(len(mask))
    ]
    torch.testing.assert_close(torch.cat(alone), wanted, rtol=1e-6, atol=1e-6, equal_nan=True)


@each_metric
def test_order_of_candidates(metric):
    scores, ratings, mask = ragged()
    order = [3, 0, 6, 1, 5, 2, 4]
    found = metric(scores[:, order], ratings[:, order], mask[:, order])
    torch.testing.assert_close(found, metric(scores, ratings, mask), rtol=1e-6, atol=1e-6, equal_nan=True)


@each_metric
def test_undecided_groups_are_undefined(metric):
    scores, ratings = torch.tensor([[2.0, 1.0]] * 4), torch.tensor([[1.0, 1.0]] + [[1.0, 0.0]] * 3)
    mask = torch.tensor([[True, True], [True, False], [False, False], [True, True]])
    assert metric(scores, ratings, mask).isnan().tolist() == [True, True, True, False]


@each_metric
def test_low_precision(metric):
    scores, ratings, mask = ragged()
    found = metric(scores.bfloat16(), ratings, mask)  # quarters: exact in bf16
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, metric(scores, ratings, mask), equal_nan=True)


# Aggregation


def test_streamed_metrics_by_hand():
    stream = StreamedMetrics()
    assert stream.count("x") == 0 and stream.sum("x") == 0.0
    assert all(math.isnan(value) for value in (stream.mean("x"), stream.minimum("x"), stream.maximum("x")))
    stream.add({"x": torch.tensor([torch.nan, 4.0]), "y": torch.tensor([torch.nan, torch.nan])})
    stream.add({"x": torch.tensor([]), "y": torch.tensor([torch.nan])})
    stream.add({"x": torch.tensor([-1.0, torch.nan, 3.0])})
    assert stream.count("x") == 3 and stream.sum("x") == 6.0 and stream.mean("x") == 2.0
    assert stream.minimum("x") == -1.0 and stream.maximum("x") == 4.0
    assert stream.count("y") == 0 and math.isnan(stream.mean("y")) and math.isnan(stream.maximum("y"))
    with pytest.raises(ValueError, match=r"'x' must have the shape \(B,\), found \(1, 2\)"):
        stream.add({"x": torch.ones(1, 2)})


def summary(scores, ratings, mask, lengths, batch_size):
    """As a data loader does it: batches are cut to their own widest group."""
    stream = StreamedMetrics()
    for start in range(0, len(scores), batch_size):
        batch = [tensor[start : start + batch_size] for tensor in (scores, ratings, mask, lengths)]
        width = int(batch[2].any(0).nonzero().max()) + 1
        stream.add(ranking_columns(*(tensor[:, :width] for tensor in batch)))
    return ranking_summary(stream)


def test_nine_rows_give_the_same_at_every_batch_size():
    scores, ratings, mask = ragged(groups=9, seed=4)
    scores = torch.randn(scores.shape, generator=torch.Generator().manual_seed(2))
    lengths = torch.randint(1, 900, scores.shape, generator=torch.Generator().manual_seed(1))
    wanted = summary(scores, ratings, mask, lengths, batch_size=1)
    assert all(math.isfinite(value) for value in wanted.values())
    for batch_size in (2, 8, 9):
        assert summary(scores, ratings, mask, lengths, batch_size) == pytest.approx(wanted, rel=1e-6, abs=1e-7)
    real = scores[mask]
    assert wanted["mean_reward"] == pytest.approx(real.mean().item(), abs=1e-6)
    assert wanted["min_reward"] == real.min().item() and wanted["max_reward"] == real.max().item()
    assert wanted["accuracy"] == pytest.approx(pair_accuracy(scores, ratings, mask).nanmean().item())
    assert wanted["length_accuracy"] == pytest.approx(pair_accuracy(lengths, ratings, mask).nanmean().item())


def test_columns_survive_a_matrix_as_processes_gather_it():
    scores, ratings, mask = ragged(groups=9)
    columns = ranking_columns(scores, ratings, mask, lengths=scores.abs() * 8)
    matrix = torch.stack(list(columns.values()), dim=1)  # (B, n)
    assert matrix.dtype == torch.float32
    direct, gathered = StreamedMetrics(), StreamedMetrics()
    direct.add(columns)
    gathered.add(dict(zip(columns, matrix.unbind(1), strict=True)))
    assert str(ranking_summary(direct)) == str(ranking_summary(gathered))  # as text, in which NaN equals NaN


def test_a_set_without_a_decided_pair():
    scores, mask = torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)
    stream = StreamedMetrics()
    stream.add(ranking_columns(scores, torch.zeros(1, 2), mask, lengths=torch.tensor([[5, 6]])))
    found = ranking_summary(stream)
    assert math.isnan(found["accuracy"]) and math.isnan(found["margin"])
    assert (found["mean_reward"], found["min_reward"], found["max_reward"]) == (2.0, 1.0, 3.0)
    assert all(math.isnan(value) for value in ranking_summary(StreamedMetrics()).values())
