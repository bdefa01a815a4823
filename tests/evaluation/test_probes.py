"""Bias probes find the bias that was planted, and no other."""

from dataclasses import replace

import numpy as np
import pytest

from trl_ext.evaluation.items import Item
from trl_ext.evaluation.probes import ALPHA, PROBES, SMALLEST_EFFECT, changed, eos_probe, judge, run_probes
from trl_ext.evaluation.report.findings import Findings
from trl_ext.evaluation.report.verdicts import judge_report


def items(number=60):
    text = "The first thing is known. The second thing follows from it, as one can see. The third one ends it {}."
    return [Item(n, f"q{n}", [text.format(n)], [1.0], None, f"q{n}") for n in range(number)]


# What each probe's change looks like to a scorer that has this one bias.
FEATURES = {
    "padding": lambda text: "let me know" in text,
    "repetition": lambda text: text.count("The third one ends it") == 3,
    "bold": lambda text: "**" in text,
    "bullets": lambda text: text.startswith("- "),
    "heading": lambda text: text.startswith("## "),
    "code_fence": lambda text: "```" in text,
    "trailing_space": lambda text: text.endswith("   "),
    "trailing_newlines": lambda text: text.endswith("\n\n"),
    "emoji": lambda text: "\U0001f60a" in text,
    "praise": lambda text: "great question" in text,
    "agreement": lambda text: "You are right" in text,
    "refusal": lambda text: "can't help" in text,
}


def scorer(seed, bias=None, effect=0.8):
    """Scores of standard deviation 1 with some noise for every change, less for a cut text, more for one feature."""
    generator = np.random.default_rng(seed)
    base = {}

    def score(prompts, completions, columns):
        found = []
        for prompt, text in zip(prompts, completions, strict=True):
            base.setdefault(prompt, generator.normal())
            cut = -1.0 if "third" not in text else 0.0
            extra = effect if bias is not None and FEATURES[bias](text) else 0.0
            found.append(base[prompt] + cut + extra + 0.3 * generator.normal())
        return found

    return score


def test_every_planted_bias_is_found_in_all_of_fifty_seeds():
    given = items()
    names = [probe.name for probe in PROBES if probe.name != "truncation"]
    assert set(names) == set(FEATURES)
    missed = []
    for seed in range(50):
        bias = names[seed % len(names)]
        results = {r.name: r for r in run_probes(scorer(seed, bias, effect=0.4), given, resamples=50, seed=seed)}
        if not results[bias].found:
            missed.append((seed, bias, results[bias]))
    assert not missed


def test_false_alarms_stay_below_five_per_cent_of_the_runs():
    given = items()
    alarms = [any(r.found for r in run_probes(scorer(seed), given, resamples=50, seed=seed)) for seed in range(40)]
    assert np.mean(alarms) <= 0.05


def test_a_model_that_does_not_miss_half_an_answer_is_found():
    results = run_probes(lambda prompts, texts, columns: [float(hash(p) % 97) for p in prompts], items(), resamples=50)
    assert {r.name for r in results if r.found} == {"truncation"}


def test_the_effect_is_in_standard_deviations_of_the_score():
    probe = PROBES[0]
    (result,) = judge([(probe, np.full(40, 3.0) + np.linspace(-0.1, 0.1, 40), list(range(40)))], spread=6.0)
    assert result.effect == pytest.approx(0.5)
    assert result.found
    assert result.p_value < ALPHA
    assert result.effect >= SMALLEST_EFFECT


def test_scores_that_do_not_differ_have_no_effect_and_say_so():
    results = run_probes(lambda prompts, texts, columns: [1.0] * len(texts), items(5), resamples=20)
    assert not any(result.found for result in results if result.name != "truncation")
    assert all(result.reason for result in results)


def test_changes_leave_the_rest_of_a_conversation_alone():
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "One. Two."}]
    assert changed(chat, lambda text: text + "!") == [chat[0], {"role": "assistant", "content": "One. Two.!"}]
    assert changed(chat[1], lambda text: text + "!") == {"role": "assistant", "content": "One. Two.!"}
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "One. "}, {"type": "text", "text": "Two."}]}]
    whole = [{"role": "assistant", "content": [{"type": "text", "text": "One. Two.!"}]}]
    assert changed(parts, lambda text: text + "!") == whole
    assert changed("", lambda text: text + "!") is None
    assert changed([{"role": "assistant", "content": None}], lambda text: text) is None
    assert chat[1]["content"] == "One. Two."


def test_a_feature_that_is_there_already_is_not_added():
    texts = {"bold": "**One.** Two.", "bullets": "- One.\n- Two.", "code_fence": "```x```", "truncation": "too short"}
    for probe in PROBES:
        if probe.name in texts:
            assert probe.change(texts[probe.name]) is None
    assert eos_probe("</s>").change("text") == "text</s>"


def test_a_few_rows_accuse_no_model_of_ignoring_half_an_answer():
    # the model loses one standard deviation with half an answer, but its noise hides that in six rows
    generator = np.random.default_rng(0)

    def noisy(prompts, texts, columns):
        return [4 * generator.normal() - ("third" not in text) for text in texts]

    results = {r.name: r for r in run_probes(noisy, items(6), resamples=200)}
    assert results["truncation"].interval[1] > -SMALLEST_EFFECT
    assert not results["truncation"].found


def test_probes_of_one_flag_make_one_verdict():
    score = scorer(0)

    def formatted(prompts, texts, columns):
        extra = [FEATURES["bold"](text) + FEATURES["heading"](text) for text in texts]
        return [value + more for value, more in zip(score(prompts, texts, columns), extra, strict=True)]

    report = Findings("model", probes=run_probes(formatted, items(), resamples=50))
    found = [verdict for verdict in judge_report(report) if verdict.flag == "format_bias"]
    assert len(found) == 1
    assert "set in bold" in found[0].reason and "a heading is put in front" in found[0].reason


@pytest.mark.parametrize(("detectable", "flag"), [(0.7, "few_probe_rows"), (0.3, "probes")])
def test_probes_that_could_not_have_found_a_bias_are_no_good_news(detectable, flag):
    results = [replace(result, detectable=detectable) for result in run_probes(scorer(0), items(), resamples=50)]
    (verdict,) = judge_report(Findings("model", probes=results))
    assert (verdict.flag, verdict.level) == (flag, "good" if flag == "probes" else "look")
