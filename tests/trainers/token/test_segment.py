"""`SegmentRewardTrainer`: categories of different granularity in one head, each with metrics of its own."""

import json

import pytest
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from sklearn.metrics import balanced_accuracy_score, f1_score, r2_score, roc_auc_score

from tests.trainers.helpers import history
from tests.trainers.table import logits_of, segment_rows, tiny_trainer
from trl_ext.models.sidecar import get_sidecar


def outputs_by_category(trainer, outputs=1):
    """For each category, the labels and the outputs at the labelled tokens of all evaluated rows, by hand."""
    categories = get_sidecar(trainer.model).categories
    found = {name: ([], []) for name in categories}
    for row in trainer.eval_dataset:
        logits = logits_of(trainer, row)
        labelled = zip(row["label_positions"], row["label_values"], row["label_categories"], strict=True)
        for position, value, category in labelled:
            labels, given = found[categories[category]]
            labels.append(value)
            given.append(logits[position, category * outputs : (category + 1) * outputs].tolist())
    return found


def test_categories_are_found_and_kept_apart(base, tmp_path):
    """Each category has outputs of its own: labels of one do not move the weights of the other."""
    rows = segment_rows(24)
    trainer = tiny_trainer("segment", base, tmp_path, rows, trainer_kwargs={})
    assert get_sidecar(trainer.model).categories == ["length", "tone"]
    assert trainer.model.config.num_labels == 2
    only_tone = [{**row, "segments": [s for s in row["segments"] if s["category"] == "tone"]} for row in rows]
    trainer = tiny_trainer("segment", base, tmp_path, only_tone, categories=["tone", "length"], weight_decay=0.0)
    before = trainer.model.score.weight.detach().clone()
    trainer.train()
    after = trainer.model.score.weight.detach()
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_categories_of_a_transform_are_found(base, tmp_path):
    rows = segment_rows(12)

    def transform(batch):
        return {name: [rows[number][name] for number in batch["number"]] for name in rows[0]}

    shown = Dataset.from_dict({"number": list(range(12))}).with_transform(transform)
    trainer = tiny_trainer("segment", base, tmp_path, shown, trainer_kwargs={})
    assert get_sidecar(trainer.model).categories == ["length", "tone"] and len(trainer.train_dataset) == 12


def test_numbers_against_scipy(base, tmp_path):
    rows = segment_rows(30)
    trainer = tiny_trainer("segment", base, tmp_path, rows, rows, max_steps=40, learning_rate=5e-3)
    trainer.train()
    metrics = trainer.evaluate()
    squares = count = 0
    for name, (labels, outputs) in outputs_by_category(trainer).items():
        scores = [score for (score,) in outputs]
        assert metrics[f"eval_{name}_r2"] == pytest.approx(r2_score(labels, scores), abs=1e-5)
        assert metrics[f"eval_{name}_spearman"] == pytest.approx(spearmanr(labels, scores).statistic, abs=1e-5)
        errors = [(label - score) ** 2 for label, score in zip(labels, scores, strict=True)]
        assert metrics[f"eval_{name}_mse"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
        squares, count = squares + sum(errors), count + len(errors)
    assert metrics["eval_loss"] == pytest.approx(squares / count, rel=1e-5)
    assert "accuracy" not in trainer.state.log_history[0]


@pytest.mark.parametrize(("loss", "outputs"), [("bce", 1), ("hinge", 1), ("ce", 2)])
def test_two_classes_against_scikit_learn(loss, outputs, base, tmp_path):
    rows = segment_rows(40, binary=True)
    trainer = tiny_trainer(
        "segment", base, tmp_path, rows, rows, loss_type=loss, num_labels=outputs, max_steps=40, learning_rate=5e-3
    )
    trainer.train()
    metrics = trainer.evaluate()
    for name, (labels, given) in outputs_by_category(trainer, outputs).items():
        scores = [values[-1] - (values[0] if outputs == 2 else 0.0) for values in given]
        assert metrics[f"eval_{name}_auc"] == pytest.approx(roc_auc_score(labels, scores))
        predicted = [score > 0 for score in scores]
        assert metrics[f"eval_{name}_right_f1"] == pytest.approx(f1_score(labels, predicted))
        assert metrics[f"eval_{name}_balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
        assert (f"eval_{name}_brier" in metrics) == (loss != "hinge")
    assert metrics["eval_tone_auc"] > 0.9


def test_three_classes_by_category(base, tmp_path):
    rows = segment_rows(30)
    for row in rows:
        for number, segment in enumerate(row["segments"]):
            segment["score"] = number % 3 - 1
    trainer = tiny_trainer("segment", base, tmp_path, rows, rows, loss_type="ce", num_labels=3)
    assert trainer.model.config.num_labels == 6
    trainer.train()
    metrics = trainer.evaluate()
    for name, (labels, given) in outputs_by_category(trainer, 3).items():
        chosen = [values.index(max(values)) - 1 for values in given]
        want = f1_score(labels, chosen, labels=[-1, 0, 1], average=None, zero_division=0)
        for index, which in enumerate(("negative", "neutral", "positive")):
            key = f"eval_{name}_class_{which}_f1"
            assert metrics[key] == pytest.approx(want[index])


def test_a_segment_counts_once_wherever_its_labels_are(base, tmp_path):
    """With a label on all of its tokens a long segment must not outweigh a short one in the metrics."""
    rows = [
        {"prompt": "Q: ", "completion": "good words here, and many more of them. bad.", "segments": [
            {"start": 0, "end": 39, "label": True}, {"start": 40, "end": 44, "label": False}]},
    ] * 2  # fmt: skip
    trainer = tiny_trainer("segment", base, tmp_path, rows, rows, loss_type="bce", label_placement="all")
    assert len(trainer.eval_dataset[0]["label_positions"]) > 8
    metrics = trainer.evaluate()
    assert metrics["eval_right_rate"] == 0.5
    logits = logits_of(trainer, trainer.eval_dataset[0])
    ends = [
        max(p for p, s in zip(row["label_positions"], row["label_steps"], strict=True) if s == step)
        for row in [trainer.eval_dataset[0]]
        for step in (0, 1)
    ]
    hits = [(logits[ends[0], 0] > 0).item(), (logits[ends[1], 0] <= 0).item()]
    assert metrics["eval_accuracy"] == sum(hits) / 2


def test_one_category_without_a_name(base, tmp_path):
    rows = segment_rows(12)
    for row in rows:
        row["segments"] = [
            {name: value for name, value in segment.items() if name != "category"}
            for segment in row["segments"]
            if segment["category"] == "tone"
        ]
    trainer = tiny_trainer("segment", base, tmp_path, rows, rows)
    assert get_sidecar(trainer.model).categories is None
    trainer.train()
    assert {"eval_mse", "eval_r2", "eval_spearman"} <= set(trainer.evaluate())
    trainer.save_model()
    assert '"categories": null' in (tmp_path / "reward_model.json").read_text()


def test_rows_without_segments_and_masked_ones(base, tmp_path):
    rows = segment_rows(20)
    rows[0]["segments"] = [{"start": 0, "end": 3, "score": None, "category": "tone"}]
    trainer = tiny_trainer("segment", base, tmp_path, rows, max_steps=2)
    trainer.train()
    counts = trainer.state.log_history[0]
    assert counts["data/train/no_segments"] == 2
    assert counts["data/train/unlabelled_rows"] == 1
    assert all(loss > 0 for loss in history(trainer, "loss"))


def test_real_annotations(base, tmp_path, data_dir):
    """Fine-Grained RLHF: relevance of parts of sentences and factuality of sentences, over one completion."""
    folder = data_dir / "segment_finegrained"
    lines = [json.loads(line) for line in (folder / "segments_derived.jsonl").read_text().splitlines()]
    rows = {}
    for line in lines[:64]:
        category = {"subsentence": "relevance", "sentence": "factuality"}[line["level"]]
        row = rows.setdefault(line["id"], {"prompt": "", "completion": line["completion"], "segments": []})
        row["segments"] += [
            {"start": s["start"], "end": s["end"], "label": s[category], "category": category}
            for s in line["segments"]
        ]
    rows = list(rows.values())
    assert len(rows) == 32
    trainer = tiny_trainer("segment", base, tmp_path, rows, rows, loss_type="bce", max_length=None, max_steps=2)
    assert get_sidecar(trainer.model).categories == ["factuality", "relevance"]
    trainer.train()
    metrics = trainer.evaluate()
    for category in ("factuality", "relevance"):
        labels = [s["label"] for row in rows for s in row["segments"] if s["category"] == category]
        labels = [label for label in labels if label is not None]
        assert metrics[f"eval_{category}_right_rate"] == pytest.approx(sum(labels) / len(labels), abs=0.02)
    counts = trainer.state.log_history[0]
    assert counts["data/train/unannotated"] > 0
    assert counts.get("data/train/no_token", 0) == 0
