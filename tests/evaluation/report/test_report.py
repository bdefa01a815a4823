"""The report of an evaluation: its files, its page, and its section of a model card."""

import json

import pytest
import wandb

from tests.evaluation.rows import by_length, by_text, pairs
from trl_ext.evaluation import evaluate_reward_model
from trl_ext.evaluation.report.page import to_html


def test_the_report_is_written_and_read_back(tmp_path):
    report = evaluate_reward_model(by_text, pairs(), output_dir=tmp_path, resamples=100, probes=False)
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert {"metrics", "intervals", "flags"} <= set(saved)
    assert saved["metrics"]["accuracy"] == report.metrics["accuracy"] == 0.4
    assert saved["intervals"]["accuracy"] == list(report.intervals["accuracy"])
    low, high = report.intervals["accuracy"]
    assert low < 0.4 < high
    page = (tmp_path / "evaluation.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<script" not in page
    assert "0.4" in (tmp_path / "evaluation.md").read_text()
    assert (tmp_path / "scores.png").stat().st_size > 1_000


def test_parts_of_several_data_sets_are_kept_apart(tmp_path):
    outcomes = [{"prompt": f"o{n}", "completion": f"{n % 7 / 7} x", "label": n % 2} for n in range(40)]
    report = evaluate_reward_model(
        by_text, {"pairs": pairs(), "a/b": outcomes}, probes=False, resamples=20, output_dir=tmp_path
    )
    assert set(report.histogram) == {"pairs/chosen", "pairs/rejected", "a/b/right", "a/b/wrong"}
    assert {"pairs/reliability", "a/b/reliability"} <= set(report.curves)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert {"scores_pairs.png", "scores_a-b.png", "reliability_pairs.png", "reliability_a-b.png"} <= names
    assert (tmp_path / "evaluation.html").read_text().count("<svg") == len(names)


def test_a_model_card_gets_one_section_whatever_stands_around_it(tmp_path):
    report = evaluate_reward_model(by_text, pairs(), probes=False, resamples=20)
    card = report.update_model_card(tmp_path)
    card.write_text(f"---\ntags: [trl]\n---\n# Mine\n\n{card.read_text()}\nThe end.\n")
    before = card.read_text()
    assert report.update_model_card(tmp_path).read_text() == before
    other = evaluate_reward_model(by_length, pairs(), probes=False, resamples=20)
    after = other.update_model_card(tmp_path).read_text()
    assert after.startswith("---\ntags: [trl]\n---\n# Mine\n") and after.endswith("The end.\n")
    assert after.count("Results of") == after.count("## Evaluation") == 1
    assert "by_length" in after and "by_text" not in after
    with pytest.raises(NotADirectoryError, match="no folder"):
        report.update_model_card(tmp_path / "none")


def test_tokens_of_a_mistake_are_coloured():
    class Verifier:
        raw = type("Raw", (), {"kind": "outcome"})()

        def __call__(self, prompts, completions, **columns):
            return [2.0 if "bad" in text else -2.0 for text in completions]

        def token_texts(self, prompts, completions):
            return [[*text.split(" "), ""] for text in completions]

        def score_tokens(self, prompts, completions):
            return [[float(word == "bad") for word in [*text.split(" "), ""]] for text in completions]

    rows = [{"prompt": f"p{n}", "chosen": "good <b>", "rejected": "bad one"} for n in range(4)]
    report = evaluate_reward_model(Verifier(), rows, probes=False, resamples=20)
    assert report.mistakes[0].tokens == [
        [("good", 0.0), ("<b>", 0.0), ("", 0.0)],
        [("bad", 1.0), ("one", 0.0), ("", 0.0)],
    ]
    page = to_html(report)
    assert 'background: hsl(120 45% 50% / .35)" title="1">bad</span>' in page
    assert 'background: hsl(0 45% 50% / .35)" title="0">&lt;b&gt;</span>' in page


def test_numbers_and_tables_go_to_the_run_that_is_open(monkeypatch):
    logged = {}
    run = type("Run", (), {"log": lambda self, values: logged.update(values)})()
    report = evaluate_reward_model(by_length, pairs(), resamples=20)
    monkeypatch.setattr(wandb, "run", None)
    report.log_to_wandb()
    assert not logged
    monkeypatch.setattr(wandb, "run", run)
    report.log_to_wandb()
    assert logged["evaluation/accuracy"] == report.metrics["accuracy"]
    tables = {name.removeprefix("evaluation/"): logged[name] for name in logged if hasattr(logged[name], "columns")}
    assert [row[0] for row in tables["metrics"].data] == list(report.metrics)
    assert [row[0] for row in tables["probes"].data] == [probe.name for probe in report.probes]
    assert [row[:2] for row in tables["mistakes"].data] == [[m.row, m.margin] for m in report.mistakes]
