"""Metrics of token-level rewards: by hand, against scikit-learn and scipy, batch sizes, memory, real labels."""

import itertools
import json
import math
import pickle
import random

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk

from trl_ext.metrics.question import QuestionStream
from trl_ext.metrics.streams import Calibration, ClassCounts, ExactSum, PairCounts
from trl_ext.metrics.token import (
    BinaryStream,
    RegressionStream,
    SegmentStream,
    StepStream,
    harmonic_mean,
    log_odds,
)


def approx(value, **kwargs):
    return pytest.approx(value, nan_ok=True, **kwargs)


def outcomes(size, seed=0, levels=None):
    """Log-odds and labels that go with them; of few levels: with ties, and exactly 0 among them."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(size, generator=generator)
    if levels is not None:
        scores = torch.randint(-levels, levels + 1, (size,), generator=generator) / 2
    labels = (torch.rand(size, generator=generator) < (0.7 * scores - 0.5).sigmoid()).float()
    return scores, labels


def solutions(rows=60, steps=7, seed=0):
    """Scores, labels and masks of solutions; after the first error some steps lack a label, in some rows any does."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(rows, steps, generator=generator) + 1
    labels = (torch.rand(rows, steps, generator=generator) < (scores + 1).sigmoid()).float()
    real = torch.arange(steps) < torch.randint(1, steps + 1, (rows, 1), generator=generator)
    after = (labels * real + 1.0 * ~real).cumprod(1) == 0
    after = torch.cat([torch.zeros(rows, 1, dtype=torch.bool), after[:, :-1]], dim=1)
    annotated = real & ~(after & (torch.rand(rows, steps, generator=generator) < 0.5))
    annotated &= ~((torch.arange(rows) % 5 == 0)[:, None] & (torch.rand(rows, steps, generator=generator) < 0.3))
    return scores, labels, annotated, real


def answers(questions=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(questions).repeat_interleave(torch.randint(1, 6, (questions,), generator=generator))
    scores = torch.randint(0, 8, (len(ids),), generator=generator) / 2
    labels = (torch.rand(len(ids), generator=generator) < (scores - 2).sigmoid()).float()
    order = torch.randperm(len(ids), generator=generator)
    return scores[order], labels[order], 1000 * ids[order] - 3


def filled(stream, *tensors, size=None):
    for start in range(0, len(tensors[0]), size or len(tensors[0])):
        stream.add(*(tensor[start : start + (size or len(tensor))] for tensor in tensors))
    return stream


# Pieces


def test_exact_sum():
    values = [1e16, 1.0, -1e16, 1e-9, 3.5, -1e-30, 1e-30]
    for order in itertools.islice(itertools.permutations(values), 0, 5040, 37):
        stream = ExactSum()
        stream.add(order[:3])
        stream.add(order[3:])
        assert float(stream.value()) == 4.5 + 1e-9
    generator = random.Random(0)
    values = [generator.gauss(0, 1) * 10 ** generator.randint(-10, 10) for _ in range(5000)]
    stream = ExactSum()
    stream.add(values)
    assert float(stream.value()) == math.fsum(values) and len(stream._parts) < 40
    assert ExactSum().value() == 0


def test_pairs_by_hand():
    pairs = PairCounts()
    pairs.add(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1]))
    assert (pairs.auc(), pairs.auc_error()) == (0.75, 0.0)
    pairs.add(torch.tensor([-0.0, 0.0]), torch.tensor([0, 1]))  # equal scores
    assert pairs.auc() == (2 + 3 + 0.5) / 9  # won by 0.35, 0.8 and 0.0
    pairs = PairCounts()
    pairs.add(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.1, 0.3, 0.2]))
    assert pairs.spearman() == 0.5
    assert math.isnan(PairCounts().auc()) and math.isnan(PairCounts().spearman())
    with pytest.raises(ValueError, match="at least 1024"):
        PairCounts(capacity=10)
    with pytest.raises(ValueError, match="differ in shape"):
        pairs.add(torch.zeros(3), torch.zeros(2))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("levels", [None, 5])
def test_auc_and_spearman_are_exact_below_the_capacity(scale, levels):
    scores, labels = outcomes(3000, levels=levels)
    pairs = filled(PairCounts(), scores * scale, labels, size=100)
    assert pairs.auc() == pytest.approx(sk.roc_auc_score(labels, scores * scale), abs=1e-12)
    assert pairs.auc_error() == 0.0
    numbers = scores + torch.randn(3000, generator=torch.Generator().manual_seed(1))
    pairs = filled(PairCounts(), scores * scale, numbers, size=100)
    assert pairs.spearman() == pytest.approx(stats.spearmanr(scores, numbers).statistic, abs=1e-9)


@pytest.mark.parametrize("shift", [0.0, -50.0])
def test_auc_above_the_capacity_is_within_its_bound(shift):
    scores, labels = outcomes(200_000)
    pairs = filled(PairCounts(capacity=1024), scores + shift, labels, size=7001)
    error = abs(pairs.auc() - sk.roc_auc_score(labels, scores + shift))
    assert 0 < error <= pairs.auc_error() < (0.002 if shift == 0 else 0.02)
    pairs = filled(PairCounts(), scores, labels, size=7001)
    error = abs(pairs.auc() - sk.roc_auc_score(labels, scores))
    assert error <= pairs.auc_error() < 5e-5 and error < 1e-6
    numbers = scores + 2 * torch.randn(len(scores), generator=torch.Generator().manual_seed(1))
    pairs = filled(PairCounts(), scores, numbers, size=7001)
    assert pairs.spearman() == pytest.approx(stats.spearmanr(scores, numbers).statistic, abs=0.005)


def test_the_bins_do_not_depend_on_order_or_batches():
    scores, labels = outcomes(6000)
    whole = filled(PairCounts(capacity=1024), scores, labels)
    order = torch.randperm(6000, generator=torch.Generator().manual_seed(5))
    for size, at in ((1, slice(None)), (8, order), (5000, order.flip(0))):
        found = filled(PairCounts(capacity=1024), scores[at], labels[at], size=size)
        assert found.auc() == whole.auc() and found.auc_error() == whole.auc_error() > 0
        assert found._dropped_bits == whole._dropped_bits and torch.equal(found._counts, whole._counts)


def test_pairs_stay_bounded():
    pairs = PairCounts(capacity=2048)
    for seed in range(50):
        pairs.add(*outcomes(1000, seed=seed))
        assert len(pairs._pairs) + sum(map(len, pairs._pending)) <= 2 * 2048
    assert int(pairs._read()[2].sum()) == 50_000


def test_classes_equal_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    labels, predictions = (torch.randint(0, 3, (500,), generator=generator) for _ in range(2))
    names = ["negative", "neutral", "positive"]
    counts = ClassCounts(names)
    counts.add(predictions[:200].view(20, 10), labels[:200].view(20, 10))
    counts.add(predictions[200:], labels[200:])
    found = counts.summary()
    precision, recall, f1, support = sk.precision_recall_fscore_support(labels, predictions)
    for index, name in enumerate(names):
        wanted = precision[index], recall[index], f1[index], support[index] / 500
        assert [found[f"{name}_{key}"] for key in ("precision", "recall", "f1", "rate")] == approx(list(wanted))
    assert found["balanced_accuracy"] == approx(sk.balanced_accuracy_score(labels, predictions))
    assert found["accuracy"] == approx(sk.accuracy_score(labels, predictions))


def test_classes_that_do_not_occur():
    counts = ClassCounts(["wrong", "right", "other"])
    assert all(math.isnan(value) for value in counts.summary().values())
    counts.add(torch.tensor([1, 1]), torch.tensor([1, 0]))
    found = counts.summary()
    assert (found["right_precision"], found["right_recall"], found["balanced_accuracy"]) == (0.5, 1.0, 0.5)
    assert math.isnan(found["wrong_precision"]) and found["wrong_recall"] == 0.0 and found["wrong_f1"] == 0.0
    assert math.isnan(found["other_f1"]) and found["other_rate"] == 0.0
    with pytest.raises(ValueError, match="predictions must be class numbers from 0 to 2, found 3"):
        counts.add(torch.tensor([3]), torch.tensor([0]))
    with pytest.raises(ValueError, match="labels must be class numbers from 0 to 2, found -1"):
        counts.add(torch.tensor([0]), torch.tensor([-1]))


def test_calibration_by_hand_and_against_scikit_learn():
    calibration = Calibration(bins=2)
    calibration.add(torch.tensor([0.1, 0.3, 0.5, 1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0]))
    found = calibration.summary()
    assert found["brier"] == approx((0.01 + 0.49 + 0.25 + 0.0) / 4, abs=1e-7)
    assert found["ece"] == approx(abs(0.4 - 1.0) / 4 + abs(1.5 - 2.0) / 4, abs=1e-7)

    scores, labels = outcomes(4000)
    probabilities = scores.double().sigmoid()
    calibration = filled(Calibration(), probabilities, labels, size=64)
    assert calibration.summary()["brier"] == approx(sk.brier_score_loss(labels, probabilities), abs=1e-9)
    place = np.minimum((probabilities.numpy() * 15).astype(int), 14)
    gaps = [(probabilities - labels).numpy()[place == b] for b in range(15)]
    assert calibration.summary()["ece"] == approx(sum(abs(gap.sum()) for gap in gaps) / 4000, abs=1e-9)
    assert math.isnan(Calibration().summary()["ece"])
    for probability, label in ((1.5, 0.0), (0.5, -1.0), (math.nan, 0.0)):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\], found"):
            calibration.add(torch.tensor([probability]), torch.tensor([label]))


# Log-odds


def test_log_odds():
    logits = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(log_odds(logits).sigmoid(), probabilities[..., 2])
    torch.testing.assert_close(log_odds(logits, (1, 2)).sigmoid(), probabilities[..., 1:].sum(-1))
    torch.testing.assert_close(log_odds(logits[..., :2]), logits[..., 1] - logits[..., 0])
    assert torch.equal(log_odds(logits[..., :1]), logits[..., 0])
    assert log_odds(torch.tensor([-1e4, 0.0, 1e4])).item() == 1e4
    assert log_odds(torch.zeros(3).bfloat16()).dtype == torch.float32
    assert log_odds(torch.tensor([0.0, 0.0, 2.0])).item() == pytest.approx(2 - math.log(2))
    for positive in ((), (0, 1, 2)):
        with pytest.raises(ValueError, match="Some of the 3 classes must be positive and some not"):
            log_odds(logits, positive)


# Outcomes


@pytest.mark.parametrize("levels", [None, 4])
def test_outcomes_equal_scikit_learn(levels):
    scores, labels = outcomes(2000, levels=levels)
    mask = torch.rand(2000, generator=torch.Generator().manual_seed(2)) < 0.7
    hidden = scores.masked_fill(~mask, torch.nan), labels.masked_fill(~mask, torch.nan)
    found = filled(BinaryStream(), *(tensor.view(100, 20) for tensor in (*hidden, mask)), size=3).summary()
    scores, labels = scores[mask], labels[mask]
    predicted = scores > 0
    precision, recall, f1, support = sk.precision_recall_fscore_support(labels, predicted)
    wanted = {
        "auc": sk.roc_auc_score(labels, scores),
        "auc_error": 0.0,
        "accuracy": sk.accuracy_score(labels, predicted),
    }
    wanted["balanced_accuracy"] = sk.balanced_accuracy_score(labels, predicted)
    wanted["brier"] = sk.brier_score_loss(labels, scores.double().sigmoid())
    for index, name in enumerate(("wrong", "right")):
        values = precision[index], recall[index], f1[index], support[index] / len(labels)
        wanted |= {
            f"{name}_{key}": value for key, value in zip(("precision", "recall", "f1", "rate"), values, strict=True)
        }
    found.pop("ece")
    assert found == approx(wanted, abs=1e-9)


def test_outcomes_of_other_scales():
    scores, labels = outcomes(500)
    log_odds_summary = filled(BinaryStream(calibrated=False), scores, labels).summary()
    assert filled(BinaryStream(calibrated=False), scores, 2 * labels - 1).summary() == log_odds_summary
    as_probability = filled(BinaryStream(threshold=0.5, calibrated=False), scores.double().sigmoid(), labels).summary()
    assert as_probability == log_odds_summary
    assert "brier" not in log_odds_summary and "ece" not in log_odds_summary
    soft = filled(BinaryStream(), torch.tensor([1.0, -1.0]), torch.tensor([0.8, 0.5])).summary()
    assert soft["right_rate"] == 0.5 and soft["auc"] == 1.0


def test_nothing_added():
    for stream in (BinaryStream(), StepStream(), RegressionStream(), SegmentStream(["a"]), QuestionStream()):
        counted = {"first_error_rows", "first_error_skipped", "questions", "rows_left_out"}
        for name, value in stream.summary().items():
            assert value == 0 if name in counted else math.isnan(value), name


# Questions


def test_questions_by_hand():
    rows = [
        (7, 2.0, 1), (7, 1.0, 0), (7, 3.0, 0),  # one of two pairs; the best scored is wrong
        (8, 1.0, 1), (8, 1.0, 0),  # a tie
        (9, 5.0, 1), (9, 4.0, 1),  # no wrong answer
        (10, 1.0, 0), (10, 2.0, 0),  # no right answer
        (11, 9.0, 1),  # a single answer
    ]  # fmt: skip
    random.Random(0).shuffle(rows)
    ids, scores, labels = (torch.tensor(column) for column in zip(*rows, strict=True))
    assert filled(QuestionStream(), scores, labels, ids, size=2).summary() == approx(
        {
            "question_auc": (0.5 + 0.5) / 2,
            "right_wrong_accuracy": 1 / 3,
            "best_of_n": (0.0 + 0.5 + 1.0 + 0.0) / 4,
            "mean_of_n": (1 / 3 + 0.5 + 1.0 + 0.0) / 4,
            "oracle_of_n": 3 / 4,
            "questions": 4.0,
            "rows_left_out": 0.0,
        }
    )


def test_questions_equal_scikit_learn_and_a_loop():
    scores, labels, ids = answers()
    areas, won, pairs = [], 0, 0
    for question in ids.unique():
        own, right = scores[ids == question], labels[ids == question].bool()
        if 0 < right.sum() < len(right):
            areas.append(sk.roc_auc_score(right, own))
            won += int((own[right][:, None] > own[~right][None, :]).sum())
            pairs += int(right.sum() * (~right).sum())
    found = filled(QuestionStream(), scores, labels, ids, size=8).summary()
    assert len(areas) > 10 and found["question_auc"] == approx(np.mean(areas))
    assert found["right_wrong_accuracy"] == won / pairs


def test_question_difficulty_is_not_rewarded():
    """A score that only knows the question has a high pooled AUC, and one half within a question."""
    generator = torch.Generator().manual_seed(0)
    difficulty = 3 * torch.randn(200, generator=generator)
    ids = torch.arange(200).repeat(8)
    labels = (torch.rand(1600, generator=generator) < difficulty[ids].sigmoid()).float()
    assert filled(BinaryStream(), difficulty[ids], labels).summary()["auc"] > 0.85
    assert filled(QuestionStream(), difficulty[ids], labels, ids).summary()["question_auc"] == 0.5


def test_questions_above_the_capacity():
    """Whole questions are left out, the same ones in any order, and what is left estimates the whole."""
    scores, labels, ids = answers(questions=4000)
    whole = filled(QuestionStream(), scores, labels, ids).summary()
    found = filled(QuestionStream(capacity=3000), scores, labels, ids).summary()
    assert len(ids) / 8 < len(ids) - found["rows_left_out"] <= 3000
    assert found["question_auc"] == pytest.approx(whole["question_auc"], abs=0.05)
    assert found["mean_of_n"] == pytest.approx(whole["mean_of_n"], abs=0.05)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(9))
    for size, at in ((1, slice(None)), (8, order)):
        stream = filled(QuestionStream(capacity=3000), scores[at], labels[at], ids[at], size=size)
        assert stream.summary() == found and stream._kept <= 3000
    one = filled(QuestionStream(capacity=10), scores[:50], labels[:50], torch.zeros(50, dtype=torch.int64)).summary()
    assert one["questions"] == 0 and one["rows_left_out"] == 50 and math.isnan(one["question_auc"])


def test_questions_of_real_solutions(data_dir):
    """Mean and oracle of four as given with the data; shorter is right across questions, longer within one."""
    path = data_dir / "orm_gsm8k/model_solutions.jsonl"
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    numbers = {}
    ids = torch.tensor([numbers.setdefault(row["prompt"], len(numbers)) for row in rows])
    lengths = torch.tensor([float(len(row["completion"])) for row in rows])
    labels = torch.tensor([row["label"] for row in rows])
    found = filled(QuestionStream(), lengths, labels, ids, size=64).summary()
    assert (found["mean_of_n"], found["oracle_of_n"]) == pytest.approx((0.379, 0.672), abs=0.001)
    assert found["question_auc"] > 0.52
    assert filled(BinaryStream(calibrated=False), lengths, labels, size=64).summary()["auc"] < 0.4


def test_questions_errors():
    with pytest.raises(ValueError, match="questions must be integers, found torch.float32"):
        QuestionStream().add(torch.zeros(2), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"one shape \(B,\)"):
        QuestionStream().add(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64))


# Steps


def test_steps_by_hand():
    nan = torch.nan
    scores = torch.tensor(
        [
            [2.0, 1.0, -1.0, 3.0],  # the first error at step 2, found
            [2.0, -3.0, -1.0, nan],  # at step 2, but step 1 is predicted wrong
            [1.0, 4.0, nan, nan],  # no error, and none predicted
            [0.0, 1.0, 1.0, nan],  # no error, and one predicted: a score of 0 is not above 0
            [1.0, nan, -2.0, nan],  # the label of step 1 is missing: not judged
        ]
    )
    labels = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, nan], [1, 1, nan, nan], [1, 1, 1, nan], [1, nan, 0, nan]])
    real = torch.tensor([[True] * 4, [True] * 3 + [False], [True] * 2 + [False] * 2] + [[True] * 3 + [False]] * 2)
    annotated = real.clone()
    annotated[4, 1] = False
    stream = StepStream()
    stream.add(scores, labels, annotated, real)
    found = stream.summary()
    assert (found["first_error_accuracy"], found["no_error_accuracy"]) == (0.5, 0.5)
    assert found["processbench_f1"] == 0.5
    assert (found["first_error_rows"], found["first_error_skipped"]) == (4.0, 1.0)
    assert found["wrong_rate"] == 4 / 14  # step 3 of the first row counts here, but not for the areas
    right, wrong = [2.0, 1.0, 2.0, -3.0, 1.0, 4.0, 0.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -2.0]
    wanted = sk.roc_auc_score([1] * 10 + [0] * 3, right + wrong)
    assert found["auc_to_first_error"] == approx(wanted)
    index = [0, 1, 0, 1, 0, 1, 0, 1, 2, 0, 2, 2, 2]
    assert found["step_index_auc"] == approx(sk.roc_auc_score([0] * 10 + [1] * 3, index))


def test_steps_against_a_loop():
    scores, labels, annotated, real = solutions()
    kept, hits = [], {True: [], False: []}
    skipped = 0
    for row in range(len(scores)):
        steps = [i for i in range(scores.shape[1]) if real[row, i]]
        errors = [i for i in steps if annotated[row, i] and labels[row, i] == 0]
        last = errors[0] if errors else steps[-1]
        kept += [(scores[row, i].item(), labels[row, i].item(), i) for i in steps if annotated[row, i] and i <= last]
        if all(annotated[row, i] for i in steps if i <= last):
            predicted = next((i for i in steps if scores[row, i] <= 0), -1)
            hits[bool(errors)].append(predicted == (errors[0] if errors else -1))
        else:
            skipped += 1
    found = filled(StepStream(), scores, labels, annotated, real, size=7).summary()
    score, right, index = (np.array(column) for column in zip(*kept, strict=True))
    assert found["auc_to_first_error"] == approx(sk.roc_auc_score(right, score))
    assert found["step_index_auc"] == approx(sk.roc_auc_score(1 - right, index))
    with_error, without = np.mean(hits[True]), np.mean(hits[False])
    assert min(len(hits[True]), len(hits[False]), skipped) >= 5 and 0 < with_error < 1 and 0 < without < 1
    assert (found["first_error_accuracy"], found["no_error_accuracy"]) == approx((with_error, without))
    assert found["processbench_f1"] == approx(2 * with_error * without / (with_error + without))
    assert found["first_error_skipped"] == skipped
    wanted = sk.precision_recall_fscore_support(labels[annotated], scores[annotated] > 0, labels=[0])
    assert found["wrong_f1"] == approx(wanted[2][0])


def test_what_follows_the_first_error_does_not_matter_for_it():
    """Labels after the first mistake: all wrong, or masked. Only the class counts differ."""
    scores, labels, _, real = solutions(seed=1)
    labels = labels.cumprod(1)
    first = torch.cat([torch.ones(len(labels), 1), labels[:, :-1]], dim=1) == 1
    wrong_after = filled(StepStream(), scores, labels, real, real).summary()
    masked_after = filled(StepStream(), scores, labels, real & first, real).summary()
    only_annotated = filled(StepStream(), scores, labels, real & first).summary()
    assert masked_after == only_annotated
    same = {"auc_to_first_error", "step_index_auc", "first_error_accuracy", "no_error_accuracy", "processbench_f1"}
    assert {key: wrong_after[key] for key in same} == {key: masked_after[key] for key in same}
    assert wrong_after["wrong_rate"] > masked_after["wrong_rate"]


def test_harmonic_mean():
    assert harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)
    assert harmonic_mean(0.0, 0.0) == harmonic_mean(0.0, 1.0) == 0.0
    assert math.isnan(harmonic_mean(math.nan, 1.0)) and math.isnan(harmonic_mean(0.0, math.nan))


def test_steps_errors():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"one shape \(B, S\)"):
        StepStream().add(torch.zeros(2, 3), torch.zeros(2, 3), mask[:, :2])
    with pytest.raises(ValueError, match="annotated but not real"):
        StepStream().add(torch.zeros(2, 3), torch.zeros(2, 3), mask, ~mask)


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        ("word_sorting", 0.64),
        ("tracking_shuffled_objects", 0.84),
        ("logical_deduction", 0.77),
        ("multistep_arithmetic", 0.71),
        ("dyck_languages", 0.78),
    ],
)
def test_step_index_baseline_of_annotated_mistakes(data_dir, task, wanted):
    """The figures given with the data; and the inflated ones of labels that stay wrong after the first mistake."""
    rows = [json.loads(line) for line in (data_dir / f"steps_bigbench_mistake/{task}.jsonl").open(encoding="utf-8")]
    labels = [row["labels"] for row in rows if row["completions"]]
    width = max(map(len, labels))
    table = torch.tensor([[float(label) for label in row] + [torch.nan] * (width - len(row)) for row in labels])
    real = ~table.isnan()
    found = filled(StepStream(), torch.zeros_like(table), table, real, size=8).summary()
    assert found["step_index_auc"] == pytest.approx(wanted, abs=0.01)
    kept = [(i, right) for row in labels for i, right in enumerate(row[: (row + [0]).index(0) + 1])]
    index, right = zip(*kept, strict=True)
    assert found["step_index_auc"] == pytest.approx(sk.roc_auc_score([not value for value in right], index))
    index = real.cumsum(1)
    assert sk.roc_auc_score(1 - table[real], index[real]) > 0.8
    assert found["auc_to_first_error"] == 0.5


# Segments


def test_regression_equals_scikit_learn_and_scipy():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-5, 6, (400,), generator=generator).float() + 1e4  # far from 0: no digits are lost
    scores = labels + 2 * torch.randn(400, generator=generator)
    found = filled(RegressionStream(), scores, labels, size=7).summary()
    assert found["r2"] == approx(sk.r2_score(labels.double(), scores.double()), abs=1e-12)
    assert found["mse"] == approx(sk.mean_squared_error(labels.double(), scores.double()), rel=1e-12)
    assert found["spearman"] == approx(stats.spearmanr(scores, labels).statistic, abs=1e-12)
    constant = filled(RegressionStream(), scores, torch.ones(400)).summary()
    assert math.isnan(constant["r2"]) and math.isnan(constant["spearman"])
    assert filled(RegressionStream(), labels, labels).summary() == approx({"mse": 0.0, "r2": 1.0, "spearman": 1.0})


def test_segments_by_category():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(30, 9, 2, generator=generator)
    labels = (torch.rand(30, 9, 2, generator=generator) < scores.sigmoid()).float()
    mask = torch.rand(30, 9, 2, generator=generator) < torch.tensor([0.8, 0.1])
    found = filled(SegmentStream(["relevance", "factuality"]), scores, labels, mask, size=4).summary()
    for g, name in enumerate(("relevance", "factuality")):
        kept = mask[..., g]
        y, z = labels[..., g][kept], scores[..., g][kept]
        assert found[f"{name}_auc"] == approx(sk.roc_auc_score(y, z))
        assert found[f"{name}_right_f1"] == approx(sk.f1_score(y, z > 0))
    numbers = filled(SegmentStream(["relevance", "factuality"], kind="number"), scores, labels, mask).summary()
    kept = mask[..., 1]
    assert numbers["factuality_r2"] == approx(sk.r2_score(labels[..., 1][kept], scores[..., 1][kept]), abs=1e-6)
    with pytest.raises(ValueError, match=r"2 categories need scores \(B, T, G\), found \(30, 9, 1\)"):
        SegmentStream(["a", "b"]).add(scores[..., :1], labels[..., :1], mask[..., :1])
    with pytest.raises(ValueError, match="'binary' or 'number', found 'ordinal'"):
        SegmentStream(["a"], kind="ordinal")


# Batches and memory


@pytest.mark.parametrize("size", [1, 2, 8])
def test_batch_size_and_order_change_nothing(size):
    outcome, question, steps = outcomes(203), answers(), solutions(rows=61)
    numbers = outcomes(99)[0], outcomes(99, seed=1)[0]
    segments = [tensor[:180].view(10, 9, 2) for tensor in outcomes(180)]
    segments.append(segments[0] > -1)
    cases = [
        (BinaryStream, outcome),
        (QuestionStream, question),
        (StepStream, steps),
        (RegressionStream, numbers),
        (lambda: SegmentStream(["a", "b"]), segments),
    ]
    for make, tensors in cases:
        wanted = filled(make(), *tensors).summary()
        assert filled(make(), *tensors, size=size).summary() == approx(wanted, rel=0, abs=0)
        order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(4))
        shuffled = [tensor[order] for tensor in tensors]
        assert filled(make(), *shuffled, size=size).summary() == approx(wanted, rel=0, abs=0)


def test_memory_does_not_grow():
    """Bytes held after 20,000 rows are those after 2,000, once the capacity is reached."""

    def held(rows):
        binary, steps, question = BinaryStream(capacity=1024), StepStream(capacity=1024), QuestionStream(capacity=1024)
        numbers = RegressionStream(capacity=1024)
        for start in range(0, rows, 1000):
            scores, labels = outcomes(1000, seed=start)
            binary.add(scores, labels)
            numbers.add(scores, labels + scores.abs())
            steps.add(scores.view(100, 10), labels.view(100, 10), torch.ones(100, 10, dtype=torch.bool))
            question.add(scores, labels, torch.arange(start, start + 1000) // 4)
        return len(pickle.dumps((binary, numbers, steps, question)))

    assert held(2000) > 20_000
    assert max(held(rows) for rows in (5000, 10_000, 20_000)) <= 4 * 2 * 1024 * 16 + 1024 * 13
