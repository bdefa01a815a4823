"""Real rows through a cheap function: what length alone gets on sets whose length baseline is known."""

import json

import pytest

from trl_ext.evaluation import evaluate_reward_model


def by_length(prompts, completions, **columns):
    texts = [text if isinstance(text, str) else "".join(turn["content"] for turn in text) for text in completions]
    return [float(len(text)) for text in texts]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("file", "metric", "known"),
    [  # known: what another implementation gets from length, given with a standard error of 0.01 to 0.02
        ("rankings_oasst_en100/rankings.jsonl", "pair_accuracy", 0.691),
        ("rankings_topical_chat/rankings.jsonl", "pair_accuracy", 0.675),
        ("pairs_hh_harmless/split_test.jsonl", "accuracy", 0.562),
    ],
)
def test_length_gets_what_is_known(data_dir, file, metric, known):
    rows = [row for row in read(data_dir / file) if row.get("clean", True)]
    report = evaluate_reward_model(by_length, rows, probes=False, resamples=100)
    value = report.metrics[metric]
    assert max(value, 1 - value) == pytest.approx(known, abs=0.04)
    assert report.metrics["length_correlation"] > 0.6
    assert "length_bias" in report.flags
    low, high = report.intervals[metric]
    assert low < value < high


def test_a_model_of_difficulty_is_told_from_one_of_correctness(data_dir):
    """GSM8K's solutions: short questions are easier, which a score of the question's length alone shows."""
    metrics_of = pytest.importorskip("sklearn.metrics")
    rows = read(data_dir / "orm_gsm8k" / "model_solutions.jsonl")
    report = evaluate_reward_model(
        lambda prompts, completions, **columns: [-float(len(prompt)) for prompt in prompts],
        rows,
        probes=False,
        resamples=100,
    )
    labels, shorter = ([row[name] for row in rows] for name in ("label", "prompt"))
    wanted = metrics_of.roc_auc_score(labels, [-len(prompt) for prompt in shorter])
    assert report.metrics["auc"] == pytest.approx(wanted) == pytest.approx(0.638, abs=0.001)
    assert report.metrics["within_prompt_auc"] == 0.5
    assert "difficulty_only" in report.flags
    # the length of a solution: 0.635 if shorter is better, 0.46 within a question, as scikit-learn finds
    longer = metrics_of.roc_auc_score(labels, [len(row["completion"]) for row in rows])
    assert report.metrics["length_auc"] == pytest.approx(longer) == pytest.approx(1 - 0.635, abs=0.001)


class StepNumber:
    """A process model that only knows how late a step is."""

    def __call__(self, prompts, completions, **columns):
        return [0.0] * len(completions)

    def score_steps(self, prompts, steps):
        return [[1 / (1 + number) for number, _ in enumerate(own)] for own in steps]


@pytest.mark.parametrize(("task", "known"), [("word_sorting", 0.64), ("tracking_shuffled_objects", 0.84)])
def test_the_place_of_a_step_gets_what_is_known(data_dir, task, known):
    rows = [row for row in read(data_dir / "steps_bigbench_mistake" / f"{task}.jsonl") if all(row["completions"])]
    metrics = evaluate_reward_model(StepNumber(), rows, resamples=20).metrics
    assert metrics["step_auc"] == pytest.approx(known, abs=0.03)
