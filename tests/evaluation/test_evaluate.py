"""`evaluate_reward_model` from rows to files, with functions and with real tiny models."""

import logging
import math

import pytest
from datasets import Dataset

from tests.evaluation.rows import by_length, by_text, pairs
from trl_ext.data.validation import DataError
from trl_ext.evaluation import evaluate_reward_model
from trl_ext.evaluation.items import family_of, read_item, text_of


def test_the_same_seed_gives_the_same_report():
    first, second = (evaluate_reward_model(by_length, pairs(), resamples=50).to_dict() for _ in range(2))
    for report in (first, second):
        report["settings"].pop("seconds"), report["settings"].pop("seconds_scoring")
    assert first == second


def test_columns_reach_a_reward_function_and_rows_may_be_streamed():
    seen = []

    def function(prompts, completions, difficulty, **columns):
        seen.extend(difficulty)
        return [float(d) + (c == "right") for d, c in zip(difficulty, completions, strict=True)]

    rows = [{"prompt": f"p{n}", "chosen": "right", "rejected": "wrong", "difficulty": n % 3} for n in range(1_100)]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    report = evaluate_reward_model(function, stream, probes=False, resamples=20)
    assert report.metrics["accuracy"] == 1.0
    assert report.settings["rows"] == 1_100
    assert seen[:4] == [0, 0, 1, 1]
    assert evaluate_reward_model(function, rows, probes=False, resamples=20, max_rows=7).settings["rows"] == 7


def test_columns_with_the_names_of_arguments_are_not_passed_on():
    rows = [row | {"completions": ["x"], "trainer_state": 1} for row in pairs(12)]
    found, wanted = (evaluate_reward_model(by_length, data, resamples=20) for data in (rows, pairs(12)))
    assert found.metrics == wanted.metrics


def test_pairs_count_as_their_probability_says_and_ratings_are_metadata():
    def accuracy(*columns):
        rows = [{"prompt": "q", "chosen": "1", "rejected": "2", **more} for more in columns]
        found = evaluate_reward_model(
            lambda prompts, completions, **given: [*map(float, completions)], rows, probes=False
        )
        return found.metrics.get("accuracy", math.nan)

    assert accuracy({}) == accuracy({"preference_probability": 0.9}) == 0.0
    assert accuracy({"preference_probability": 0.1}) == 1.0
    assert accuracy({"preference_probability": 0.1}, {"preference_probability": 0.5}) == 1.0
    # as in training, where one null or two equal ratings must not change what a pair means
    assert accuracy({"chosen_rating": None, "rejected_rating": 2}, {"chosen_rating": 2, "rejected_rating": 2}) == 0.0
    with pytest.raises(DataError, match="preference_probability"):
        accuracy({"preference_probability": 1.5})


def test_rows_are_read_as_a_transform_shows_them():
    rows = Dataset.from_list(list(pairs(12)))
    raw = rows.rename_columns({"chosen": "better", "rejected": "worse"})
    shown = raw.with_transform(lambda b: {"prompt": b["prompt"], "chosen": b["better"], "rejected": b["worse"]})
    found, expected = (evaluate_reward_model(by_length, data, resamples=20).metrics for data in (shown, rows))
    assert found == expected


def test_rows_without_a_score_are_counted_and_left_out():
    def function(prompts, completions, **columns):
        values = {"p0": None, "p1": math.nan, "p2": math.inf}
        return [values.get(p, float(c.split()[0])) for p, c in zip(prompts, completions, strict=True)]

    report = evaluate_reward_model(function, pairs(), probes=False, resamples=50)
    assert report.omitted == {"without a score": 1, "with a score that is not finite": 2}
    assert report.sizes["accuracy"] == 37
    assert "omitted_rows" in report.flags
    with pytest.raises(DataError, match="40 rows of which none has a score"):
        evaluate_reward_model(lambda prompts, completions, **columns: [None] * len(completions), pairs())


def test_two_models_are_compared_on_the_same_rows():
    def better(prompts, completions, **columns):
        return [float(c.endswith("so.")) for c in completions]

    report = evaluate_reward_model(better, pairs(100), compare=by_text, probes=False, resamples=200)
    found = report.compared["differences"]["accuracy"]
    assert report.metrics["accuracy"] == 1.0
    assert found["difference"] == pytest.approx(0.6)
    assert found["p_value"] < 0.001
    assert found["interval"][0] > 0.4
    assert report.compared["model"] == "by_text"


def test_mistakes_are_the_worst_first():
    report = evaluate_reward_model(by_text, pairs(100), probes=False, resamples=20)
    margins = [mistake.margin for mistake in report.mistakes]
    assert margins == sorted(margins)
    assert len(margins) == 20
    assert margins[0] == -2.0


def test_a_subset_of_one_row_has_no_interval_and_says_why():
    rows = [{**row, "subset": "alone" if n == 0 else "many"} for n, row in enumerate(pairs())]
    report = evaluate_reward_model(by_text, rows, probes=False, resamples=50)
    assert "accuracy/alone" not in report.intervals
    assert "at least two" in report.reasons["accuracy/alone"]
    # every other number has an interval, or says why it has none
    assert set(report.metrics) == set(report.intervals) | {name for name, why in report.reasons.items() if why}


def test_a_model_that_ties_all_candidates_is_told():
    report = evaluate_reward_model(lambda prompts, completions, **columns: [1.0] * len(completions), pairs(10))
    assert report.metrics["accuracy"] == report.metrics["margin"] == 0.0
    assert report.metrics["tied_scores"] == 1.0
    assert {"chance", "tied_scores"} <= set(report.flags)
    assert report.reasons["margin"] == "all 10 values are 0"
    assert all(probe.reason for probe in report.probes)
    assert "not shown to differ from chance" in next(v.reason for v in report.verdicts if v.flag == "chance")


def test_a_model_with_the_wrong_sign_is_worse_than_chance():
    rows = [{"prompt": f"p{n}", "chosen": "0 x", "rejected": f"{n % 9 - 1} y"} for n in range(60)]
    report = evaluate_reward_model(by_text, rows, probes=False, resamples=50)
    (verdict,) = (verdict for verdict in report.verdicts if verdict.flag == "chance")
    assert "worse than chance" in verdict.reason and "swapped" in verdict.advice


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "a", "chosen": "x", "rejected": None}, "rejected"),
        ({"prompt": "a", "completions": ["x", "y"], "ratings": [1]}, "ratings"),
        ({"prompt": "a", "completions": "x", "ratings": [1]}, "completions"),
        ({"prompt": "a", "completion": "x", "label": 3}, "label"),
        ({"prompt": "a", "completions": ["x"], "gold": [math.nan]}, "gold"),
        ({"problem": "a", "steps": ["x"], "label": 2}, "label"),
        ({"modified_process": ["x"], "error_steps": [2]}, "error_steps"),
        ({"prompt": "a", "completions": []}, "completions"),
        ({"prompt": "a", "chosen": ["x"], "rejected": []}, "rejected"),
        ({"prompt": "a", "completions": ["x", "y"], "labels": [0, -1]}, "labels"),
    ],
)
def test_bad_rows_name_row_and_column(row, column):
    with pytest.raises(DataError, match=f"row 7, column '{column}'"):
        read_item(row, 7, family_of(row))


def test_unknown_columns_name_the_families():
    with pytest.raises(DataError, match=r"preference: chosen\+rejected"):
        evaluate_reward_model(by_text, [{"text": "a"}])
    with pytest.raises(DataError, match="no rows"):
        evaluate_reward_model(by_text, [])
    with pytest.raises(DataError, match="cluster_column|column 'who'"):
        evaluate_reward_model(by_text, pairs(), cluster_column="who", probes=False)


def test_a_data_set_without_the_cluster_column_is_grouped_by_the_default(caplog):
    rows = [row | {"who": n % 4} for n, row in enumerate(pairs())]
    samples = [{"prompt": f"s{n}", "completions": ["1 a", "2 b"]} for n in range(6)]
    given = {"data": rows, "samples": samples}
    report = evaluate_reward_model(by_text, given, cluster_column="who", probes=False, resamples=50)
    alone = evaluate_reward_model(by_text, rows, cluster_column="who", probes=False, resamples=50)
    assert report.intervals["data/accuracy"] == alone.intervals["accuracy"]
    assert report.metrics["samples/within_prompt_variance_share"] == 1.0
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    evaluate_reward_model(by_text, {"a": rows, "b": pairs()}, cluster_column="who", probes=False, resamples=50)
    assert "The data set b has no column 'who'" in caplog.text


def test_what_is_no_reward_model_is_refused():
    with pytest.raises(TypeError, match="is a int"):
        evaluate_reward_model(3, pairs())
    for compare in (None, by_length):
        with pytest.raises(TypeError, match="max_length"):
            evaluate_reward_model(by_text, pairs(), compare=compare, max_length=3)
    with pytest.raises(ValueError, match="returned 1 scores for"):
        evaluate_reward_model(lambda prompts, completions, **columns: [1.0], pairs())
    for returned in (None, 1.0, "1.0"):
        with pytest.raises(ValueError, match="needed: a list with one score"):
            evaluate_reward_model(lambda prompts, completions, returned=returned, **columns: returned, pairs())
    steps = [{"prompt": "a", "completions": ["x", "y"], "labels": [True, False]}]
    with pytest.raises(ValueError, match="no `score_steps`"):
        evaluate_reward_model(by_text, steps)


@pytest.mark.parametrize("wrong", [{"level": 1.0}, {"probe_rows": 0}, {"resamples": 0}, {"max_rows": 0}])
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*needed"):
        evaluate_reward_model(by_text, pairs(), **wrong)


def test_a_model_compared_with_itself_has_no_interval_of_a_share():
    report = evaluate_reward_model(by_text, pairs(), compare=by_text, probes=False, resamples=50)
    found = report.compared["differences"]
    assert found["accuracy"]["difference"] == 0.0
    assert found["accuracy"]["interval"] is None
    assert found["accuracy"]["reason"] == "all 40 values are 0"
    assert found["ece"]["difference"] == 0.0  # a number that is no mean is compared too


def test_numbers_that_are_no_means_are_compared_draw_by_draw():
    rows = [{"prompt": f"p{n}", "completion": f"{n % 3} {n % 2}", "label": n % 2} for n in range(90)]
    right = lambda prompts, completions, **columns: [float(c.split()[1]) for c in completions]  # noqa: E731
    report = evaluate_reward_model(right, rows, compare=by_text, probes=False, resamples=400)
    found = report.compared["differences"]["auc"]
    assert report.metrics["auc"] == 1.0
    assert found["difference"] == pytest.approx(0.5)
    assert found["interval"][0] > 0.35
    assert math.isnan(found["p_value"])


class Steps:
    def __call__(self, prompts, completions, **columns):
        return [0.0] * len(completions)

    def score_steps(self, prompts, steps):
        return [[float(step) for step in own] for own in steps]


def test_a_neutral_step_is_not_wrong_in_any_row():
    # labels are -1, 0, 1: the second row alone looks like labels 0 and 1, and its first step is neutral
    rows = [
        {"prompt": "a", "completions": ["0.9", "0.1"], "labels": [1, -1]},
        {"prompt": "b", "completions": ["0.8", "0.9"], "labels": [0, 1]},
    ]
    report = evaluate_reward_model(Steps(), rows * 10, resamples=20)
    assert report.metrics["step_auc"] == 1.0
    assert not report.mistakes


def test_chats_without_a_prompt_column_share_their_first_turns():
    user, good, bad = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "1"), ("assistant", "0")))
    item = read_item({"chosen": [user, good], "rejected": [user, bad]}, 0, "preference")
    assert item.prompt == [user]
    assert item.completions == [[good], [bad]]


def test_a_text_prompt_in_front_of_whole_conversations_is_not_scored_twice():
    user, good, bad = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "1"), ("assistant", "0")))
    item = read_item({"prompt": "q", "chosen": [user, good], "rejected": [user, bad]}, 0, "preference")
    assert (item.prompt, item.completions) == ([user], [[good], [bad]])
    # answers alone share nothing, and the prompt stays
    assert read_item({"prompt": "q", "chosen": [good], "rejected": [bad]}, 0, "preference").prompt == "q"


def test_the_text_of_parts_is_what_they_say():
    parts = [{"type": "text", "text": "2 + 2 "}, {"type": "text", "text": "= 4"}]
    assert text_of([{"role": "user", "content": "Add."}, {"role": "assistant", "content": parts}]) == "Add.\n2 + 2 = 4"


def test_texts_become_chats_where_that_is_asked_for(caplog):
    seen = []

    class Scorer:
        processing_class = type("Tokenizer", (), {"chat_template": "{{ messages }}", "eos_token": None})()

        def __call__(self, prompts, completions, **columns):
            seen[:] = [prompts[0], completions[0]]
            return [1.0] * len(completions)

    rows = [row | {"subset": "donotanswer"} for row in pairs(4)]
    evaluate_reward_model(Scorer(), rows, probes=False, resamples=20, as_chat=True)
    assert seen == [
        [{"role": "user", "content": "p0"}],
        [{"role": "assistant", "content": "0 it is so. Quite so."}],
    ]
    assert not caplog.records
    evaluate_reward_model(Scorer(), rows, probes=False, resamples=20)
    assert seen == ["p0", "0 it is so. Quite so."]
    assert "--as_chat true" in caplog.text
