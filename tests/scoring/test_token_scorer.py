"""Token-level models behind `RewardScorer`: the ids and outputs of training, read per token, step and segment."""

import json
import logging
import math
import shutil
from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from tests.scoring.test_scorer import seen_ids
from tests.tiny import save_tiny_model
from tests.trainers.table import logits_of, outcome_rows, segment_rows, step_rows, tiny_trainer
from trl_ext import RewardScorer, merge_reward_model
from trl_ext.cli import main as cli
from trl_ext.data.spans import prepare_spans
from trl_ext.data.tokenization import TokenizationSettings
from trl_ext.models import load_reward_model
from trl_ext.models.sidecar import read_sidecar
from trl_ext.scoring.aggregation import weighted_categories


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {family: save_tiny_model(tmp_path_factory.mktemp(family), family) for family in ("llama", "bert")}


@pytest.fixture(scope="module")
def trained(bases, tmp_path_factory):
    """`trained("prm", "llama", num_labels=3)` -> a folder and the trainer that saved it, made once."""
    made = {}

    def get(kind, family="llama", **arguments):
        key = (kind, family, json.dumps(arguments, sort_keys=True))
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            rows = {"orm": outcome_rows, "segment": segment_rows}.get(kind)
            rows = step_rows(12, classes=3 if arguments.get("num_labels") == 3 else 2) if rows is None else rows(12)
            trainer = tiny_trainer(kind, bases[family], folder, rows, max_steps=2, learning_rate=2e-2, **arguments)
            trainer.train()
            trainer.save_model()
            made[key] = folder, trainer
        return made[key]

    return get


def prepared(trainer, rows, kind, **options):
    """Training's rows: ids and labelled positions."""
    tokenization = (
        TokenizationSettings.for_training(trainer.processing_class)
        if kind == "outcome"
        else TokenizationSettings(append_eos=False)
    )
    data, _ = prepare_spans(
        Dataset.from_list(rows),
        trainer.processing_class,
        kind=kind,
        tokenization=tokenization,
        max_length=None,
        min_survival=0.0,
        **options,
    )
    return list(data)


@contextmanager
def forwards(scorer):
    """Rows that go through the model, forward by forward."""
    sizes = []
    handle = scorer.model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: sizes.append(len(args[0]))
    )
    yield sizes
    handle.remove()


# Tokens


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_tokens_are_those_of_training_with_its_outputs(trained, family, chat):
    folder, trainer = trained("orm", family)
    rows = outcome_rows(7, chat=chat, seed=5)
    want = prepared(trainer, rows, "outcome")
    scorer = RewardScorer(folder, batch_size=3)
    prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    with seen_ids(scorer) as seen:
        found = scorer.score_tokens(prompts, completions)
    assert sorted(seen) == sorted(row["span_input_ids"] for row in want)
    for scores, row in zip(found, want, strict=True):
        assert scores == pytest.approx(logits_of(trainer, row)[row["completion_start"] :, 0].tolist(), abs=1e-5)
        assert len(scores) == len(row["label_positions"])  # on all tokens of the completion, and what closes it
    # the scalar call is the output at the last token, by the way of scalar models
    assert scorer(prompts, completions) == pytest.approx([scores[-1] for scores in found], abs=1e-5)


def test_several_outputs_a_token_are_a_list(trained):
    folder, trainer = trained("prm")
    rows = step_rows(3, seed=6)
    found = RewardScorer(folder).score_tokens(
        [row["prompt"] for row in rows], ["\n".join([*row["completions"], ""]) for row in rows]
    )
    for scores, row in zip(found, prepared(trainer, rows, "stepwise"), strict=True):
        assert torch.allclose(
            torch.tensor(scores), logits_of(trainer, row)[row["completion_start"] :], atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_texts_of_tokens_are_the_completion_in_as_many_pieces_as_scores(trained, family, chat):
    folder, _ = trained("orm", family)
    scorer = RewardScorer(folder)
    text = "grün  3 + 4 = 7.\n🙂 ok "
    prompt = [{"role": "user", "content": "Say."}] if chat else "Say. "
    (texts,), (scores,) = scorer.token_texts([prompt], [text]), scorer.score_tokens([prompt], [text])
    assert len(texts) == len(scores) > 5
    assert "".join(texts) == text
    assert max(map(len, texts)) < len(text) / 2  # pieces, and not all in one
    assert scorer.token_texts([prompt], [""]) == [[""] * len(own) for own in scorer.score_tokens([prompt], [""])]
    (cut,) = RewardScorer(folder, max_length=len(scores) - 3).token_texts([None if chat else ""], [text])
    assert text.startswith("".join(cut)) and len("".join(cut)) < len(text)


# Steps


CASES = [("llama", 2, "ce"), ("llama", 3, "ce"), ("bert", 3, "ce"), ("llama", 1, "bce"), ("llama", 1, "mse")]


@pytest.mark.parametrize(("family", "classes", "loss"), CASES)
def test_steps_are_read_where_training_put_their_labels(trained, family, classes, loss):
    folder, trainer = trained("prm", family, num_labels=classes, loss_type=loss)
    rows = step_rows(9, classes=3 if classes == 3 else 2, seed=7)
    scorer = RewardScorer(folder, batch_size=4)
    prompts, steps = [row["prompt"] for row in rows], [row["completions"] for row in rows]
    with forwards(scorer) as sizes, seen_ids(scorer) as seen:
        found = scorer.score_steps(prompts, steps)
    want = prepared(trainer, rows, "stepwise", num_labels=classes)
    assert sum(sizes) == len(rows)  # one forward a completion, never one a step
    assert sorted(seen) == sorted(row["span_input_ids"] for row in want)
    both = scorer.score_steps(prompts, steps, neutral="positive") if classes == 3 else [None] * len(rows)
    for scores, with_neutral, row in zip(found, both, want, strict=True):
        logits = logits_of(trainer, row)[row["label_positions"]]
        assert len(scores) == len(row["completions"]) == len(logits)
        if classes == 1:
            by_hand = logits[:, 0].sigmoid() if loss == "bce" else logits[:, 0].clamp(0, 1)
        else:
            by_hand = logits.softmax(-1)[:, -1]
        assert scores == pytest.approx(by_hand.tolist(), abs=1e-5)
        if classes == 3:
            assert with_neutral == pytest.approx(logits.softmax(-1)[:, 1:].sum(-1).tolist(), abs=1e-5)


def test_margins_of_hinge_are_right_above_zero(trained):
    folder, _ = trained("prm", loss_type="hinge", num_labels=1)
    rows = step_rows(8, seed=3)
    prompts, completions = [row["prompt"] for row in rows], ["\n".join(row["completions"]) for row in rows]
    counted = RewardScorer(folder, aggregation="count_correct")
    margins = counted.score_steps(prompts, [row["completions"] for row in rows])
    values = [value for own in margins for value in own]
    assert any(0 < value < 0.5 for value in values) or any(value < 0 for value in values)
    assert counted(prompts, completions) == [float(sum(value > 0 for value in own)) for own in margins]
    assert not counted.raw.views.gives_probabilities and RewardScorer(trained("prm")[0]).raw.views.gives_probabilities


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_as_many_scores_as_steps(trained, family):
    folder, _ = trained("prm", family)
    scorer = RewardScorer(folder)
    steps = [["", "good", "", "", "bad"], ["  ", ""], [""], ["good\n", "\n\n"], []]
    for prompts in (["Q:\n"] * 5, None):
        found = scorer.score_steps(prompts, steps)
        assert [len(scores) for scores in found] == [5, 2, 1, 2, 0]
        assert all(0 <= score <= 1 for scores in found for score in scores)


def test_steps_without_any_token_have_no_score(tmp_path):
    base = save_tiny_model(tmp_path / "base", "qwen2")  # its tokenizer adds nothing
    trainer = tiny_trainer("prm", base, tmp_path / "prm", step_rows(4), max_steps=1, step_separator="")
    trainer.save_model()
    scorer = RewardScorer(tmp_path / "prm")
    found = scorer.score_steps(None, [["", ""], ["good", ""], []])
    assert [len(scores) for scores in found] == [2, 2, 0] and found[0] == [None, None]
    assert scorer.combine(found) == [None, min(found[1]), None]


def test_steps_in_a_chat_are_one_message(trained):
    folder, trainer = trained("prm")
    row = {"prompt": [{"role": "user", "content": "Why?"}], "completions": ["good", "bad bad"], "labels": [1, 0]}
    (want,) = prepared(trainer, [row], "stepwise")
    scorer = RewardScorer(folder)
    with seen_ids(scorer) as seen:
        (found,) = scorer.score_steps([row["prompt"]], [row["completions"]])
    assert seen == [want["span_input_ids"]]
    by_hand = logits_of(trainer, want)[want["label_positions"]].softmax(-1)[:, 1].tolist()
    assert found == pytest.approx(by_hand, abs=1e-5)
    # as GRPO passes it, without the last separator
    message = [{"role": "assistant", "content": "good\nbad bad"}]
    assert RewardScorer(folder, aggregation="mean")([row["prompt"]], [message]) == pytest.approx(
        [sum(by_hand) / 2], abs=1e-5
    )
    texts = [{"type": "text", "text": text} for text in ("good\n", "bad bad")]
    parts = [{"role": "assistant", "content": texts}]
    scorer = RewardScorer(folder, aggregation="mean")
    for prompt in (row["prompt"], None):
        assert scorer([prompt], [parts]) == pytest.approx(scorer([prompt], [message]), abs=1e-6)


def test_what_max_length_cuts_off_has_no_score(trained, caplog):
    folder, _ = trained("prm")
    steps = ["good clear", "bad", "kind good good", "wrong"]
    whole = RewardScorer(folder)
    length = len(whole.score_tokens(None, ["\n".join([*steps[:2], ""])])[0])
    scorer = RewardScorer(folder, max_length=length + 2, aggregation="min")
    with caplog.at_level(logging.WARNING):
        (found,) = scorer.score_steps(None, [steps])
    assert found[2:] == [None, None]
    assert found[:2] == pytest.approx(whole.score_steps(None, [steps])[0][:2], abs=1e-5)
    assert scorer.num_truncated == 1 and "were cut" in caplog.text
    assert scorer(None, ["\n".join(steps)]) == pytest.approx([min(found[:2])], abs=1e-6)
    assert scorer.combine([found]) == [min(found[:2])]


# One number


AGGREGATES = {
    "min": min,
    "max": max,
    "last": lambda p: p[-1],
    "mean": lambda p: sum(p) / len(p),
    "sum": sum,
    "prod": math.prod,
    "sum_log": lambda p: sum(map(math.log, p)),
    "count_correct": lambda p: float(sum(x > 0.5 for x in p)),
}


@pytest.mark.parametrize("name", AGGREGATES)
def test_aggregated_steps_by_hand(trained, name):
    folder, trainer = trained("prm")
    rows = step_rows(6, seed=8)
    want = []
    for row in prepared(trainer, rows, "stepwise"):
        want.append(AGGREGATES[name](logits_of(trainer, row)[row["label_positions"]].softmax(-1)[:, 1].tolist()))
    scorer = RewardScorer(folder, aggregation=name)
    prompts = [row["prompt"] for row in rows]
    for last in ("", "\n"):  # a policy may or may not end with the separator
        completions = ["\n".join(row["completions"]) + last for row in rows]
        assert scorer(prompts, completions) == pytest.approx(want, abs=1e-5)
    if name == "min":
        assert RewardScorer(folder)(prompts, completions) == pytest.approx(want, abs=1e-5)  # the default
    assert scorer(["Q:\n", None], ["", ""]) == [None, None]


def test_exact_zero_and_one_are_kept(trained):
    folder, _ = trained("prm")
    model = load_reward_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    states = []
    handle = model.score.register_forward_pre_hook(lambda module, args: states.append(args[0][0, -1]))
    steps = [row["completions"] for row in step_rows(20, seed=9)]
    for text in ("good\n", "bad wrong\n"):
        model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    with torch.no_grad():  # states have one norm, so that the first gets a large log-odds and the second its opposite
        model.score.weight[1] = 1e6 * (states[0] - states[1])
        model.score.weight[0] = -model.score.weight[1]
    found = RewardScorer(model, tokenizer).score_steps(None, steps)
    assert {score for scores in found for score in scores} == {0.0, 1.0}
    completions = ["\n".join(own) for own in steps]
    with_zero = [0.0 in scores for scores in found]
    assert any(with_zero) and not all(with_zero)
    prod = RewardScorer(model, tokenizer, aggregation="prod")(None, completions)
    sum_log = RewardScorer(model, tokenizer, aggregation="sum_log")
    assert prod == [0.0 if zero else 1.0 for zero in with_zero]
    assert sum_log(None, completions) == [-math.inf if zero else 0.0 for zero in with_zero]
    with pytest.raises(ValueError, match="minus infinity"):
        sum_log.fit_normalizer(None, completions)


def test_longer_is_worse_for_prod_and_no_different_for_min(trained):
    folder, _ = trained("prm")
    completions = ["\n".join(["good clear"] * n) for n in (1, 4, 8)]
    prod = RewardScorer(folder, aggregation="prod")(["Q:\n"] * 3, completions)
    sum_log = RewardScorer(folder, aggregation="sum_log")(["Q:\n"] * 3, completions)
    assert prod == sorted(prod, reverse=True) and prod[0] > prod[1] > prod[2]
    assert sum_log == pytest.approx([math.log(p) for p in prod], rel=1e-6)


def test_outcome_model_with_an_aggregator(trained):
    folder, _ = trained("orm")
    prompts, completions = ["Question 1:"] * 2, [" good kind.", " bad."]
    tokens = RewardScorer(folder).score_tokens(prompts, completions)
    for name in ("mean", "min", "last"):
        want = [AGGREGATES[name]([1 / (1 + math.exp(-x)) for x in scores]) for scores in tokens]
        assert RewardScorer(folder, aggregation=name)(prompts, completions) == pytest.approx(want, abs=1e-6)


def test_own_segmenter_and_callable(trained):
    folder, _ = trained("prm")
    text = "good. bad. kind"
    scorer = RewardScorer(folder, segmenter=lambda t: [(0, 5), (5, 10), (10, 15)], aggregation=lambda p: float(len(p)))
    assert scorer(None, [text, text]) == [3.0, 3.0]
    assert RewardScorer(folder, segmenter="steps", aggregation=len)(None, [text, "a\nb"]) == [1, 2]


# Segments


@pytest.mark.parametrize(("loss", "labels"), [("mse", 1), ("bce", 1), ("ce", 2), ("ce", 3), ("hinge", 1)])
def test_segments_by_category(trained, bases, tmp_path, loss, labels):
    rows = segment_rows(10, binary=True, seed=2)
    trainer = tiny_trainer(
        "segment", bases["llama"], tmp_path, rows, loss_type=loss, num_labels=labels, max_steps=2, learning_rate=2e-2
    )
    trainer.train()
    trainer.save_model()
    scorer = RewardScorer(tmp_path, batch_size=3)
    prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    spans = [[(segment["start"], segment["end"]) for segment in row["segments"]] for row in rows]
    with forwards(scorer) as sizes:
        found = scorer.score_segments(prompts, completions, spans)
    assert sum(sizes) == len(rows)
    names = ["length", "tone"]
    compared = 0
    for values, row in zip(found, prepared(trainer, rows, "segment", categories=names), strict=True):
        assert len(values) == len(row["segments"]) and all(list(value) == names for value in values)
        logits = logits_of(trainer, row).view(-1, 2, labels)
        for position, category, number in zip(
            row["label_positions"], row["label_categories"], row["label_steps"], strict=True
        ):
            output = logits[position, category]
            if labels == 3:
                want = output.softmax(-1)[2] - output.softmax(-1)[0]
            elif labels == 2:
                want = output.softmax(-1)[1]
            else:
                want = output[0].sigmoid() if loss == "bce" else output[0]
            assert values[number][names[category]] == pytest.approx(want.item(), abs=1e-5)
            compared += 1
    assert compared > 15


def test_one_number_from_categories(trained):
    folder, _ = trained("segment")
    prompts, completions = ["Question 1: "] * 2, ["good clear. bad bad. kind.", "Wrong."]
    spans = [[(0, 12), (12, 21), (21, 26)], [(0, 6)]]
    values = RewardScorer(folder).score_segments(prompts, completions, spans)
    weights = {"tone": 0.25, "length": -2.0}
    want = [weighted_categories(own, weights) for own in values]
    assert len(set(want)) == 2
    cut = {"segmenter": lambda text: spans[completions.index(text)]}
    assert RewardScorer(folder, aggregation=weights, **cut)(prompts, completions) == pytest.approx(want, abs=1e-5)
    assert RewardScorer(folder, aggregation=weights).combine(values) == want
    by_sentence = RewardScorer(folder, aggregation=weights)(prompts, ["Good it is. Bad it was.", "Wrong."])
    halves = RewardScorer(folder).score_segments(prompts[:1], ["Good it is. Bad it was."], [[(0, 12), (12, 23)]])
    assert by_sentence == pytest.approx([weighted_categories(halves[0], weights), want[1]], abs=1e-5)
    means = RewardScorer(folder, aggregation="mean", **cut)(prompts, completions)
    assert means[0] == pytest.approx(sum(sum(value.values()) for value in values[0]) / 3, abs=1e-5)
    with pytest.raises(ValueError, match=r"weights for \['tone'\]; needed: one for each category"):
        RewardScorer(folder, aggregation={"tone": 1.0})


def test_segments_without_categories_are_numbers(bases, tmp_path):
    rows = [
        {"prompt": "Q: ", "completion": "good bad", "segments": [{"start": 0, "end": 4, "score": 1.0}]},
        {"prompt": "Q: ", "completion": "größe 🙂 gut", "segments": [{"start": 6, "end": 7, "score": 0.5}]},
    ]
    trainer = tiny_trainer("segment", bases["llama"], tmp_path, rows, max_steps=1, label_placement="before")
    trainer.train()
    trainer.save_model()
    found = RewardScorer(tmp_path).score_segments(
        ["Q: "] * 2, [row["completion"] for row in rows], [[(0, 4)], [(6, 7)]]
    )
    for values, row in zip(found, prepared(trainer, rows, "segment", label_placement="before"), strict=True):
        assert values == pytest.approx([logits_of(trainer, row)[row["label_positions"][0], 0].item()], abs=1e-5)


# Refusals


def test_each_kind_says_what_it_cannot_do(trained, reward_path):
    scalar = RewardScorer(reward_path())
    for method, third in (("score_tokens", ()), ("score_steps", ()), ("score_segments", ([[]],))):
        with pytest.raises(ValueError, match=f"kind 'scalar', and `{method}` needs one of kind"):
            getattr(scalar, method)(["a"], ["b"], *third)
    with pytest.raises(ValueError, match="kind 'outcome', and `combine` needs one of kind 'process' or 'segment'"):
        RewardScorer(trained("orm")[0]).combine([[0.5]])
    with pytest.raises(ValueError, match="nothing to aggregate"):
        RewardScorer(reward_path(), aggregation="min")
    with pytest.raises(ValueError, match="Leave `segmenter` out"):
        RewardScorer(trained("orm")[0], segmenter="steps")
    process = RewardScorer(trained("prm")[0])
    with pytest.raises(ValueError, match="kind 'process', and `score_segments`"):
        process.score_segments(["a"], ["b"], [[]])
    with pytest.raises(ValueError, match="2 classes and no neutral one"):
        process.score_steps(["a"], [["b"]], neutral="positive")
    with pytest.raises(ValueError, match="needed: a list of strings"):
        process.score_steps(["a"], ["b\nc"])
    with pytest.raises(ValueError, match="did you mean 'mean'|mean"):
        RewardScorer(trained("prm")[0], aggregation="meen")
    segments = RewardScorer(trained("segment")[0])
    with pytest.raises(ValueError, match="Row 1 has the span 0 to 9 in a completion of 3 characters"):
        segments.score_segments(None, ["good", "bad"], [[(0, 4)], [(0, 9)]])
    with pytest.raises(ValueError, match="`spans` is 1 values"):
        segments.score_segments(None, ["good", "bad"], [[(0, 4)]])


# Where scores are used


def test_normalizer_of_a_process_model(trained, tmp_path):
    folder, _ = trained("prm", step_separator="\n\n")
    rows = step_rows(8, seed=3)
    prompts, completions = [row["prompt"] for row in rows], ["\n\n".join(row["completions"]) for row in rows]
    raw = RewardScorer(folder)(prompts, completions)
    scorer = RewardScorer(load_reward_model(folder), AutoTokenizer.from_pretrained(folder))
    fitted = scorer.fit_normalizer(prompts, completions)
    want = [(score - fitted["mean"]) / fitted["std"] for score in raw]
    assert scorer(prompts, completions) == pytest.approx(want, abs=1e-4)
    steps = scorer.score_steps(prompts, [row["completions"] for row in rows])
    assert scorer.combine(steps) == pytest.approx(want, abs=1e-4)


def test_what_is_fitted_for_an_aggregation_of_ones_own_stays_in_memory(trained, tmp_path, caplog):
    folder = shutil.copytree(trained("prm", step_separator="\n\n")[0], tmp_path / "prm")
    rows = step_rows(24, seed=3)
    prompts, completions = [row["prompt"] for row in rows], ["\n\n".join(row["completions"]) for row in rows]
    summed = RewardScorer(folder, aggregation="sum")
    summed.fit_normalizer(prompts, completions)
    assert sum(summed(prompts, completions)) == pytest.approx(0, abs=1e-4)
    assert read_sidecar(folder).normalizer is None
    assert "the normaliser is not saved, because it holds only for scores with this aggregation" in caplog.text
    scorer = RewardScorer(folder)
    stored = scorer.fit_normalizer(prompts, completions)
    pairs = prompts, completions, completions[::-1]
    calibration = scorer.fit_calibration(*pairs, method="isotonic")
    summed.fit_calibration(*pairs, method="isotonic")
    assert (read_sidecar(folder).normalizer, read_sidecar(folder).calibration) == (stored, calibration)
    again = RewardScorer(folder, aggregation="sum")
    assert (again.normalizer, again.calibration) == (None, None)
    assert "the stored normaliser and calibration do not hold" in caplog.text
    with pytest.raises(ValueError, match="none is stored"):
        RewardScorer(folder, aggregation="sum", calibrated=True)


def test_the_same_scores_after_merging(bases, tmp_path):
    made = tmp_path / "lora"
    trainer = tiny_trainer(
        "prm",
        bases["llama"],
        made,
        step_rows(8),
        max_steps=2,
        learning_rate=2e-2,
        trainer_kwargs={"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])},
    )
    trainer.train()
    trainer.save_model()
    merge_reward_model(made, tmp_path / "merged")
    rows = step_rows(5, seed=4)
    prompts, completions = [row["prompt"] for row in rows], ["\n".join(row["completions"]) for row in rows]
    for name in ("min", "prod"):
        before, after = (
            RewardScorer(folder, aggregation=name)(prompts, completions) for folder in (made, tmp_path / "merged")
        )
        assert after == pytest.approx(before, abs=1e-4)


def test_score_command_of_a_process_model(trained, tmp_path):
    folder, _ = trained("prm")
    rows = [{"prompt": row["prompt"], "completion": "\n".join(row["completions"])} for row in step_rows(4, seed=1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["score", "--model", str(folder), "--input", str(tmp_path / "rows.jsonl"), "--output"]
    prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    for flags, name in (([], "min"), (["--aggregation", "prod"], "prod")):
        target = tmp_path / f"{name}.jsonl"
        assert cli.main([*command, str(target), *flags]) == 0
        found = [json.loads(line)["score"] for line in target.read_text().splitlines()]
        assert found == pytest.approx(RewardScorer(folder, aggregation=name)(prompts, completions), abs=1e-6)
    assert cli.main([*command, str(target), "--aggregation", "last"]) == 1  # made with another one


# Spans of what a policy wrote


def test_spans_are_the_steps_and_what_they_score(trained):
    folder, _ = trained("prm")
    scorer = RewardScorer(folder)
    rows = step_rows(4, seed=7)
    prompts = [row["prompt"] for row in rows]
    texts = ["\n".join(row["completions"]) for row in rows]  # the last step has no separator
    found = scorer.score_spans(prompts, texts)
    for spans, text, scores in zip(
        found, texts, scorer.score_steps(prompts, [row["completions"] for row in rows]), strict=True
    ):
        assert "".join(text[start:end] for start, end, _ in spans) == text
        assert [reward for *_, reward in spans] == pytest.approx(scores)
    assert scorer.score_spans(["p"], [""]) == [[]]


def test_spans_of_an_outcome_model_add_up_to_its_last_probability(trained):
    folder, _ = trained("orm")
    scorer = RewardScorer(folder)
    rows = outcome_rows(4, seed=7)
    prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    found = scorer.score_spans(prompts, completions)
    for spans, tokens, text in zip(found, scorer.score_tokens(prompts, completions), completions, strict=True):
        assert sum(reward for *_, reward in spans) == pytest.approx(1 / (1 + math.exp(-tokens[-1])), abs=1e-6)
        assert spans[0][0] == 0 and spans[-1][1] == len(text)
        assert spans[0][2] == pytest.approx(1 / (1 + math.exp(-tokens[0])), abs=1e-6)


def test_spans_of_a_segment_model_add_categories_up(trained):
    folder, _ = trained("segment")
    scorer = RewardScorer(folder)
    text = "One thing is so. Another one is not."
    ((first, second),) = scorer.score_spans(["p"], [text])
    (values,) = scorer.score_segments(["p"], [text], [[first[:2], second[:2]]])
    totals = [sum(v.values()) if isinstance(v, dict) else v for v in values]
    assert [first[2], second[2]] == pytest.approx(totals)
