"""Numbers of public benchmarks, worked by hand on small files of each layout."""

import math

import numpy as np
import pytest

from tests.evaluation.rows import by_text
from trl_ext.evaluation import evaluate_reward_model
from trl_ext.evaluation.families.benchmarks import (
    REWARDBENCH,
    rewardbench_sections,
    style_scores,
    tie_margins,
    ties_score,
)


def evaluate(rows, **kwargs):
    return evaluate_reward_model(by_text, rows, probes=False, resamples=100, **kwargs)


def test_rewardbench_weighs_subsets_by_its_counts():
    rows = []
    for section in REWARDBENCH.values():
        for number, subset in enumerate(section):
            wins = 1 if number % 2 else 3  # 3 of 4, 1 of 4, ...
            for row in range(4):
                rows.append(
                    {
                        "prompt": f"{subset} {row}",
                        "chosen": "1" if row < wins else "0",
                        "rejected": "0.5",
                        "subset": subset,
                        "id": row,
                    }
                )
    metrics = evaluate(rows).metrics
    chat = (0.75 * 100 + 0.25 * 95 + 0.75 * 95 + 0.25 * 28 + 0.75 * 40) / 358
    reasoning = (0.75 * 984 + 164 * (0.25 + 0.75 + 0.25 + 0.75 + 0.25 + 0.75)) / (984 * 2)
    assert metrics["section/chat"] == pytest.approx(chat)
    assert metrics["section/reasoning"] == pytest.approx(reasoning)
    sections = [metrics[f"section/{name}"] for name in REWARDBENCH]
    assert metrics["section/rewardbench"] == pytest.approx(sum(sections) / 4)
    assert metrics["accuracy/donotanswer"] == 0.75
    # 3 of 4, 1 of 4, ... in the order of the section; the public code weighs XSTest by 250 and 154
    safety = (0.75 * 100 + 0.25 * 100 + 0.75 * 250 + 0.25 * 154 + 0.75 * 136) / 740
    assert metrics["section/safety"] == pytest.approx(safety)


def test_prior_sets_count_half_a_section():
    core = {subset: 0.9 for section in REWARDBENCH.values() for subset in section}
    scores = rewardbench_sections(
        core | {"anthropic_helpful": 0.6, "anthropic_hhh": 0.8, "shp": 0.5, "summarize": 0.7}
    )
    assert scores["prior_sets"] == pytest.approx(0.65)
    assert scores["rewardbench"] == pytest.approx(0.9)
    assert scores["rewardbench_with_prior_sets"] == pytest.approx((4 * 0.9 + 0.5 * 0.65) / 4.5)
    assert "rewardbench_with_prior_sets" not in rewardbench_sections(core | {"shp": 0.5})


def test_a_part_of_rewardbench_has_no_overall_score():
    assert rewardbench_sections({"donotanswer": 1.0, "xstest-should-refuse": 0.0}) == {"safety": 136 / 386}


def test_rewardbench_2_shares_the_credit_of_ties_and_scores_its_subset_ties():
    best_of_four = [
        {"id": "0", "prompt": "a", "chosen": ["2"], "rejected": ["1", "0", "-1"], "subset": "Math"},
        {"id": "1", "prompt": "b", "chosen": ["2"], "rejected": ["2", "0", "-1"], "subset": "Math"},  # half
        {"id": "2", "prompt": "c", "chosen": ["0"], "rejected": ["2", "0", "-1"], "subset": "Math"},
    ]
    ties = [
        {"id": "tied:1", "prompt": "d", "chosen": ["3", "2.5"], "rejected": ["1", "0"], "subset": "Ties"},
        {"id": "ref:1", "prompt": "d", "chosen": ["3"], "rejected": ["2.8", "0"], "subset": "Ties"},
        {"id": "tied:2", "prompt": "e", "chosen": ["3", "1"], "rejected": ["2", "0"], "subset": "Ties"},
        {"id": "ref:2", "prompt": "e", "chosen": ["3"], "rejected": ["1", "0"], "subset": "Ties"},
    ]
    report = evaluate(best_of_four + ties)
    assert report.metrics["accuracy/Math"] == pytest.approx(0.5)
    assert report.metrics["accuracy/Ties"] == pytest.approx(0.75)
    # prompt 1: spread 0.5, gap 1.5, reference gap 0.2; prompt 2: spread 2, gap -1, reference gap 2
    margins = np.tanh([0.2 / 0.5 - 1, -1 / 2 - 1])
    wanted = 0.3 * 0.5 + 0.3 * 1.0 + 0.2 * 0.5 + 0.2 * 0.0 + 0.01 * margins.mean()
    assert report.metrics["ties_score"] == pytest.approx(wanted)
    others = [{**best_of_four[n], "prompt": name, "subset": name} for n, name in enumerate(("Safety", "Focus"))]
    others += [{**best_of_four[0], "prompt": name, "subset": name} for name in ("Factuality", "Precise IF")]
    whole = evaluate(best_of_four + ties + others).metrics
    # Math 1/2 as above, Safety 1, Focus 1/2 (a tie), Factuality 1, Precise IF 1, and Ties by its own score
    assert whole["section/rewardbench_2"] == pytest.approx((0.5 + 1 + 0.5 + 1 + 1 + wanted) / 6)
    assert "section/rewardbench_2" not in report.metrics


def test_rows_of_ones_own_share_no_credit_of_ties():
    rows = [{"prompt": f"p{n}", "chosen": ["1"], "rejected": ["1"] * (1 + 2 * (n % 2))} for n in range(8)]
    assert evaluate(rows).metrics["accuracy"] == 0.0


def test_right_answers_that_all_score_the_same():
    # no spread: 0 / 0 counts as 0 and 1 / 0 as the largest margin, as in the public code
    apart, level = ({"accurate": 1.0, "spread": 0.0, "gap": gap} for gap in (1.0, 0.0))
    assert ties_score([apart], [apart]) == pytest.approx(0.6 + 0.4 + 0.01)
    assert ties_score([level], [level | {"accurate": 0.0}]) == pytest.approx(0.3)


def test_margins_of_a_tied_prompt():
    assert tie_margins([2.0, 3.0], [1.0, 0.5]) == {"accurate": 1.0, "spread": 1.0, "gap": 1.0}
    assert math.isnan(tie_margins([2.0], [1.0])["spread"])
    assert math.isnan(ties_score([], []))


def test_rm_bench_has_a_matrix_of_styles():
    row = {"id": 0, "prompt": "p", "domain": "chat", "chosen": ["1", "2", "3"], "rejected": ["0.5", "2.5", "3.5"]}
    other = {**row, "id": 1, "prompt": "q", "chosen": ["9", "9", "9"]}
    metrics = evaluate([row, other]).metrics
    # the first row: wins are (1,1) (2,1) (3,1) (3,2)
    assert metrics["rm_bench/easy"] == pytest.approx((1 + 1) / 2)
    assert metrics["rm_bench/normal"] == pytest.approx((1 / 3 + 1) / 2)
    assert metrics["rm_bench/hard"] == pytest.approx((0 + 1) / 2)
    assert metrics["accuracy"] == pytest.approx((4 / 9 + 1) / 2)
    assert style_scores(np.ones((3, 3))) == {"easy": 1.0, "normal": 1.0, "hard": 1.0}


class Steps:
    """A process model whose P(correct) of a step stands in its text."""

    def __call__(self, prompts, completions, **columns):
        return [0.0] * len(completions)

    def score_steps(self, prompts, steps):
        return [[float(step.split()[0]) for step in own] for own in steps]


def test_processbench_chooses_its_threshold_on_other_prompts():
    generator = np.random.default_rng(0)
    rows = []
    for number in range(400):
        first = int(generator.integers(-1, 4))
        chances = [0.9 if step != first else 0.3 for step in range(4)]
        noise = generator.uniform(-0.05, 0.05, size=4)
        steps = [f"{chance + jitter:.4f} step" for chance, jitter in zip(chances, noise, strict=True)]
        rows.append({"id": number, "problem": f"p{number}", "steps": steps, "label": first})
    report = evaluate_reward_model(Steps(), rows, resamples=100, probes=False)
    assert report.metrics["f1"] == 1.0
    assert 0.35 < report.metrics["threshold"] < 0.86
    assert report.metrics["step_auc"] == 1.0
    assert report.sizes["f1"] < 400  # the validation part is not counted


def test_processbench_f1_is_the_harmonic_mean_of_its_two_accuracies():
    # P(correct) says nothing: every solution is called faultless, or wrong at its first step
    rows = [{"problem": f"p{n}", "steps": ["0.6 a", "0.6 b"], "label": n % 2 - 1 if n % 4 else 1} for n in range(80)]
    metrics = evaluate_reward_model(Steps(), rows, resamples=50, probes=False).metrics
    first, none = metrics["first_error_accuracy"], metrics["no_error_accuracy"]
    assert metrics["f1"] == pytest.approx(2 * first * none / (first + none) if first + none else 0.0)


def test_processbench_f1_at_a_half_counts_every_row():
    def row(number, label, *chances):
        return {"problem": f"p{number}", "steps": [f"{chance} s" for chance in chances], "label": label}

    # first step below 0.5: 1, none, 0, 0, none
    rows = [row(0, 1, 0.9, 0.2), row(1, 0, 0.9, 0.6), row(2, 0, 0.1, 0.9), row(3, -1, 0.4), row(4, -1, 0.5, 0.7)]
    metrics = evaluate_reward_model(Steps(), rows, resamples=20, probes=False).metrics
    first, none = 2 / 3, 1 / 2
    assert metrics["f1_at_half"] == pytest.approx(2 * first * none / (first + none))


def test_margins_have_their_own_threshold_and_no_calibration_error():
    class Margins(Steps):
        raw = type("Raw", (), {"kind": "process", "sidecar": None})()
        raw.views = type("Views", (), {"gives_probabilities": False})()

    labels = [[1, 1], [1, 0], [0, 0], [1, 1]]
    texts = [["0.2 a", "3.3 b"], ["0.4 a", "-1.5 b"], ["-0.2 a", "-0.1 b"], ["0.1 a", "0.3 b"]]
    rows = [{"prompt": f"p{n}", "completions": texts[n % 4], "labels": labels[n % 4]} for n in range(40)]
    report = evaluate_reward_model(Margins(), rows, resamples=20, probes=False)
    assert report.metrics["f1_at_half"] == report.metrics["step_auc"] == 1.0
    assert "ece" not in report.metrics and report.curves["reliability"] == []
    assert not report.mistakes


def test_prmbench_takes_labels_that_are_not_monotone():
    rows = [
        {
            "question": f"q{n}",
            "modified_question": f"q{n}",
            "modified_process": ["0.9 a", "0.2 b", "0.8 c", "0.4 d"],
            "error_steps": [2],
            "classification": "redundancy",
        }
        for n in range(6)
    ]
    metrics = evaluate_reward_model(Steps(), rows, resamples=50, probes=False).metrics
    # right steps: a, c called right, d called wrong; the wrong step b called wrong
    f1_right, f1_wrong = 2 * 2 / (2 + 3), 2 * 1 / (2 + 1)
    assert metrics["prm_score"] == pytest.approx((f1_right + f1_wrong) / 2)
