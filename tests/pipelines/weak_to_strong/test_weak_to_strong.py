"""The weak-to-strong experiment on tiny models: splits, what the student sees, runs that are kept, reports, errors."""

import json
import os
import random
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
import trl
from bitsandbytes.nn import Linear4bit
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer, BitsAndBytesConfig

from tests.tiny import save_tiny_model
from tests.trainers.helpers import config as trainer_config
from trl_ext import (
    ORMConfig,
    PRMConfig,
    RewardConfig,
    RewardEnsemble,
    RewardTrainer,
    WeakToStrongArguments,
    WeakToStrongConfig,
    WeakToStrongTrainer,
    weak_to_strong,
)
from trl_ext.metrics.streams import Calibration
from trl_ext.pipelines.stages.runner import run_job
from trl_ext.pipelines.weak_to_strong import generation_task
from trl_ext.pipelines.weak_to_strong.config import TASKS
from trl_ext.pipelines.weak_to_strong.experiment import Experiment, Loading, cache_settings
from trl_ext.pipelines.weak_to_strong.generation_task import GenerationTask, exact_match
from trl_ext.pipelines.weak_to_strong.labels import combine, learnt_weights
from trl_ext.pipelines.weak_to_strong.report import WeakToStrongReport, pair_report
from trl_ext.pipelines.weak_to_strong.runs import (
    Run,
    changed_arguments,
    read_judgements,
    train_and_judge,
    train_and_judge_job,
)
from trl_ext.pipelines.weak_to_strong.splits import group_of, make_splits
from trl_ext.pipelines.weak_to_strong.tasks import Judgement, OutcomeTask, PreferenceTask, ProcessTask


CONFIGS = {"preference": RewardConfig, "outcome": ORMConfig, "process": PRMConfig, "generation": WeakToStrongConfig}

LEARNS_TO_END = {"max_steps": 40, "learning_rate": 5e-3}  # a weak model that writes an EOS now and then


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(save_tiny_model(folder / name, "llama")) for name in ("small", "large")]


def make_rows(task: str, number: int = 48) -> Dataset:
    """Which of two digits is larger."""
    rng = random.Random(7)
    rows = []
    for index in range(number):
        a, b = rng.sample(range(10), 2)
        prompt, right = f"{a} {b} {index}", rng.random() < 0.5
        answer = f" {max(a, b) if right else min(a, b)}"
        rows.append(
            {
                "preference": {"prompt": prompt, "chosen": f" {max(a, b)}", "rejected": f" {min(a, b)}"},
                "outcome": {"prompt": prompt, "completion": answer, "label": right},
                "process": {"prompt": prompt, "completions": [f"see {a}", answer], "labels": [True, right]},
                "generation": {"prompt": prompt, "completion": answer},
            }[task]
        )
    return Dataset.from_list(rows)


def arguments(models, task="preference", **kwargs) -> WeakToStrongArguments:
    defaults = {"task": task, "weak_training": {"max_steps": 2}, "max_completion_length": 4, "test_share": 0.3}
    return WeakToStrongArguments(models[:1], models[1:], **(defaults | kwargs))


def run(models, tmp_path, task="preference", rows=None, **kwargs):
    """The report, and the names of the runs that really trained."""
    started = []
    config = arguments(models, task, **kwargs)
    args = trainer_config(tmp_path / "run", CONFIGS[task], max_steps=3)
    rows = make_rows(task) if rows is None else rows
    report = weak_to_strong(config, args, rows, on_start=lambda stage: started.append(stage.name))
    return report, started


# --------------------------------------------------------------------------------------- the experiment
@pytest.mark.parametrize(
    ("task", "loss"),
    [
        ("preference", "logconf"),
        ("outcome", "xent"),
        ("outcome", "logconf"),
        ("process", "logconf"),
        ("generation", "kd"),
    ],
)
def test_it_runs_and_reports(task, loss, models, tmp_path):
    training = LEARNS_TO_END if task == "generation" else {"max_steps": 2}
    report, started = run(models, tmp_path, task, student_loss=loss, weak_training=training)
    assert started == ["weak-0-seed-0", "ceiling-0-seed-0", "student-weak-0-0-seed-0"]
    assert all(0.0 <= value <= 1.0 for value in (report.weak, report.weak_to_strong, report.ceiling))
    assert sum(report.rows.values()) == 48 and min(report.rows.values()) > 5
    saved = json.loads((tmp_path / "run" / "report.json").read_text())
    assert saved["pairs"][0]["weak"] == report.weak and saved["task"] == task
    text = (tmp_path / "run" / "report.md").read_text()
    assert f"{report.weak:.3f}" in text and (report.pgr is not None or "undefined" in text)
    assert (tmp_path / "run" / "report.png").stat().st_size > 1000
    cards = [(tmp_path / "run" / name / "README.md").read_text() for name in started]
    assert all(f"/{name}" in card for name, card in zip(started, cards, strict=True))
    assert not any(".partial" in card for card in cards)


def test_runs_are_kept_while_nothing_changes(models, tmp_path):
    first, started = run(models, tmp_path)
    again, kept = run(models, tmp_path)
    assert len(started) == 3 and kept == []
    assert (again.weak, again.weak_to_strong, again.ceiling) == (first.weak, first.weak_to_strong, first.ceiling)
    _, other = run(models, tmp_path, student_loss="logconf")
    assert other == ["student-weak-0-0-seed-0"]  # weak model and ceiling are the same
    _, more = run(models, tmp_path, student_loss="logconf", seeds=[0, 1])
    assert more == ["weak-0-seed-1", "ceiling-0-seed-1", "student-weak-0-0-seed-1"]


def apart(*job):
    return run_job("run", partial(train_and_judge_job, job), "always")


def test_a_run_in_its_own_process_gives_the_same(models, tmp_path):
    rows = list(make_rows("outcome", 12))
    args = trainer_config(tmp_path, ORMConfig, max_steps=2)
    planned = Run(OutcomeTask(), models[0], args, seed=0)
    found = []
    for name, run_one in (("here", train_and_judge), ("apart", apart)):
        folder = tmp_path / name
        folder.mkdir()
        result = run_one(planned, rows, {"test": rows}, folder, None, "none")
        found.append((result["train_loss"], result["test"], read_judgements(folder, "test")))
        assert not list(folder.glob("job.*")) and not list(folder.glob("result.*"))
    assert found[0] == found[1]


def a_metric(prompts, completions, **columns):
    return [0.0] * len(prompts)


METRICS = [None, a_metric, partial(a_metric, x=1), partial(a_metric, x=2)]
METRICS += [lambda prompts, completions, **columns: [0.0], lambda prompts, completions, **columns: [1.0]]


def test_a_metric_that_another_process_cannot_import_is_refused(models, tmp_path, monkeypatch):
    monkeypatch.setattr(a_metric, "__module__", "__main__")
    args = trainer_config(tmp_path, WeakToStrongConfig)
    for metric in (a_metric, partial(a_metric, x=1), lambda prompts, completions, **columns: [0.0]):
        with pytest.raises(ValueError, match="isolate='never'"):
            apart(Run(GenerationTask(metric), models[0], args, seed=0), [])
    args = trainer_config(tmp_path, RewardConfig, loss_type=lambda scores, ratings, mask, **given: scores[:, 0])
    with pytest.raises(ValueError, match="<lambda>.*isolate='never'"):
        apart(Run(PreferenceTask(), models[0], args, seed=0), [])


def test_a_metric_that_is_not_known_again_is_refused(tmp_path):
    run = Run(GenerationTask(RewardEnsemble([a_metric])), "m", trainer_config(tmp_path, WeakToStrongConfig), seed=0)
    with pytest.raises(ValueError, match="ensemble in memory"):
        cache_settings(run, "model", ["test"])


def test_a_metric_of_a_task_without_texts_is_refused(models, tmp_path):
    args = trainer_config(tmp_path, RewardConfig)
    with pytest.raises(ValueError, match="A metric judges texts"):
        weak_to_strong(arguments(models), args, make_rows("preference"), metric=a_metric)


def test_two_weak_models_alone_and_together(models, tmp_path):
    rows = make_rows("outcome")
    args = trainer_config(tmp_path / "run", ORMConfig, max_steps=2)
    config = WeakToStrongArguments(models, models[1:], task="outcome")
    report = weak_to_strong(config, args, rows)
    assert [pair.weak_models for pair in report.pairs] == [[models[0]], [models[1]]]
    with pytest.raises(ValueError, match="2 pairs"):
        _ = report.pgr
    for how in ("mean", "vote"):
        config = WeakToStrongArguments(models, models[1:], task="outcome", weak_ensemble=how)
        together = weak_to_strong(config, args, rows)
        assert together.pairs[0].weak_models == models and together.ceiling == report.pairs[0].ceiling
        assert together.pairs[0].by_seed[0]["weights"] is None


def test_weights_of_weak_models_are_learnt_from_rows_that_none_saw(models, tmp_path):
    pytest.importorskip("sklearn")
    rows, args = make_rows("outcome"), trainer_config(tmp_path / "run", ORMConfig, max_steps=2)
    config = WeakToStrongArguments(models, models[1:], task="outcome", weak_ensemble="learned", fusion_share=0.4)
    splits = make_splits(config, rows, None)
    report = weak_to_strong(config, args, rows)
    assert report.rows["fusion"] == len(splits["fusion"]) > 1
    held_back = [read_judgements(tmp_path / "run" / f"weak-{i}-seed-0", "fusion") for i in (0, 1)]
    weights = learnt_weights(OutcomeTask(), splits["fusion"], held_back)
    assert report.pairs[0].by_seed[0]["weights"] == pytest.approx(weights) and len(weights) == 2


def test_combined_labels_by_hand():
    rows = [{"label": 1}, {"label": 0}]
    one, two, three = ([Judgement(1.0, p) for p in outputs] for outputs in ((0.9, 0.2), (0.6, 0.4), (0.3, 0.9)))
    assert combine(OutcomeTask(), rows, [one]) == one
    mean = combine(OutcomeTask(), rows, [one, two, three], "mean")
    assert [label.output for label in mean] == pytest.approx([0.6, 0.5]) and [label.right for label in mean] == [1, 1]
    vote = combine(OutcomeTask(), rows, [one, two, three], "vote")
    assert [label.output for label in vote] == pytest.approx([2 / 3, 1 / 3])
    learned = combine(OutcomeTask(), rows, [one, three], "learned", weights=[2.0, -1.0])
    odds = [(0.9 / 0.1) ** 2 * (0.7 / 0.3), (0.2 / 0.8) ** 2 * (0.1 / 0.9)]
    assert [label.output for label in learned] == pytest.approx([x / (1 + x) for x in odds])
    steps = [{"labels": [1, None, 0]}]
    judged = [[Judgement(0.0, [1.0, 0.5, 0.0])], [Judgement(0.0, [0.5, 0.5, 0.8])]]
    both = combine(ProcessTask(), steps, judged, "mean")
    assert both == [Judgement(1.0, pytest.approx([0.75, 0.5, 0.4]))]


def test_a_model_that_knows_nothing_gets_no_weight():
    pytest.importorskip("sklearn")
    rows = [{"label": n % 2} for n in range(400)]
    knows = [Judgement(1.0, 0.9 if row["label"] else 0.1) for row in rows]
    knows[:40] = [Judgement(0.0, 1 - judgement.output) for judgement in knows[:40]]  # is wrong now and then
    guesses = [Judgement(0.0, 0.9 if n % 4 < 2 else 0.1) for n in range(400)]
    certain, random = learnt_weights(OutcomeTask(), rows, [knows, guesses])
    assert certain == pytest.approx(1.0, abs=0.1) and abs(random) < 0.05  # log(9) says 0.9, and it is right 0.9
    steps = learnt_weights(ProcessTask(), [{"labels": [1, None, 0]}] * 20, [[Judgement(1.0, [0.9, 0.1, 0.1])] * 20])
    assert steps[0] > 0


def test_changes_of_the_weak_model_take_effect_and_are_in_the_cache_key(tmp_path):
    """TRL resolves `bf16` and `gradient_checkpointing` when the arguments are made; a later change did nothing."""
    args = trainer_config(tmp_path, RewardConfig, bf16=True, gradient_checkpointing=False)
    assert args.mixed_precision == "bf16"
    changes = {"bf16": False, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    changed = changed_arguments(args, changes)
    assert (changed.bf16, changed.mixed_precision) == (False, "no")
    # what transformers' Trainer reads, under its old and new name
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        assert getattr(changed, name, True) is True
        assert getattr(changed, f"{name}_kwargs", {"use_reentrant": True}) == {"use_reentrant": True}
    assert changed_arguments(args, {"fp16": True}).mixed_precision == "fp16"
    assert args.bf16 and not args.gradient_checkpointing  # the user's arguments stay as they are

    keys = [cache_settings(Run(PreferenceTask(), "m", one, seed=0), "model", []) for one in (args, changed)]
    assert keys[1]["arguments"]["gradient_checkpointing"] is True and keys[0] != keys[1]


def test_a_weak_model_is_trained_with_its_own_precision_and_checkpointing(models, tmp_path, monkeypatch):
    seen = {}

    class Recorded(RewardTrainer):
        def train(self, *args, **kwargs):
            output = super().train(*args, **kwargs)
            checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
            seen[self.args.run_name] = (self.accelerator.mixed_precision, checkpointed)
            return output

    monkeypatch.setattr(PreferenceTask, "trainer", Recorded)
    args = trainer_config(tmp_path / "run", RewardConfig, max_steps=1, bf16=True)
    weak = {"max_steps": 1, "bf16": False, "gradient_checkpointing": True}
    weak_to_strong(arguments(models, weak_training=weak), args, make_rows("preference"))
    assert seen["weak-0-seed-0"] == ("no", True) and seen["ceiling-0-seed-0"] == ("bf16", False)


# --------------------------------------------------------------------------------------- what a student sees
def test_gold_labels_of_split_b_do_not_reach_the_student():
    """Whatever the gold label of a row is, the student's row is the same."""
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2.0}
    swapped = {"prompt": "p", "chosen": "b", "rejected": "a", "margin": 2.0}
    assert PreferenceTask().relabel(pair, 0.7, False) == pytest.approx(PreferenceTask().relabel(swapped, 0.3, False))
    outcome = {"prompt": "p", "completion": "c"}
    rows = [OutcomeTask().relabel({**outcome, "label": gold}, 0.7, False) for gold in (True, False)]
    assert rows[0] == rows[1] == {**outcome, "label": 0.7}
    steps = {"prompt": "p", "completions": ["x", "y", "z"]}
    rows = [ProcessTask().relabel({**steps, "labels": [gold, None, gold]}, [0.2, 0.9, 0.8], False) for gold in (0, 1)]
    assert rows[0] == rows[1] == {**steps, "labels": [0.2, None, 0.8]}
    text = GenerationTask().relabel({"prompt": "p", "completion": "gold"}, "weak", False)
    assert text["completion"] == "weak"


def test_texts_that_were_cut_or_are_empty_are_left_out_and_counted(models, tmp_path, caplog):
    """Behind a text that was cut SFT would put an EOS."""
    report, _ = run(models, tmp_path, "generation", student_loss="sft", weak_training=LEARNS_TO_END)
    folder = tmp_path / "run"
    labels = read_judgements(folder / "weak-0-seed-0", "labelled")
    counted = {"cut": sum(not label.finished for label in labels), "empty": 0}
    counted["empty"] = sum(label.finished and not label.output for label in labels)
    assert report.pairs[0].by_seed[0]["left_out"] == counted
    saved = json.loads((folder / "report.json").read_text())
    assert saved["pairs"][0]["by_seed"][0]["left_out"] == counted
    assert f"learn from {counted['cut']} of {len(labels)} weak texts" in report.markdown()

    rows = [{"prompt": str(n), "completion": "gold"} for n in range(4)]
    judged = [Judgement(0.0, "whole"), Judgement(0.0, "cu", finished=False), Judgement(0.0, ""), Judgement(0.0, "too")]
    task = GenerationTask(max_completion_length=4)
    learnt, told = task.learnable(rows, judged, False)
    assert [(row["prompt"], row["completion"]) for row in learnt] == [("0", "whole"), ("3", "too")]
    assert told == {"left_out": {"cut": 1, "empty": 1}}
    assert "Of 4 weak texts 1 were cut at max_completion_length=4 and 1 are empty" in caplog.text
    with pytest.raises(ValueError, match="no usable text: of 2 texts 1 were cut .* raise max_compl"):
        task.learnable(rows[:2], judged[1:3], False)


def test_a_text_is_finished_if_it_ended_before_the_limit(models, tmp_path):
    rows = list(make_rows("generation", 16))
    args = trainer_config(tmp_path, WeakToStrongConfig, kd_weight=0.0, **LEARNS_TO_END)
    run = Run(GenerationTask(max_completion_length=3), models[0], args, seed=0)
    train_and_judge(run, rows, {"labelled": rows}, tmp_path, None, "none")
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    for label in read_judgements(tmp_path, "labelled"):
        written = len(tokenizer(label.output, add_special_tokens=False)["input_ids"])
        assert label.finished == (written < 3), label


def test_a_quantized_model_is_judged_and_teaches_as_it_was_trained(tmp_path, monkeypatch):
    shape = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}  # what 4 bits on a CPU can divide
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    models = [str(save_tiny_model(tmp_path / name, "llama", **shape)) for name in ("small", "large")]
    judged, teachers = [], []

    class Generator(generation_task.TransformersGenerator):
        def __init__(self, model, *args, **kwargs):
            judged.append(model)
            super().__init__(model, *args, **kwargs)

    load_teacher = WeakToStrongTrainer._load_teacher
    monkeypatch.setattr(generation_task, "TransformersGenerator", Generator)
    monkeypatch.setattr(
        WeakToStrongTrainer, "_load_teacher", lambda self, model: teachers.append(model) or load_teacher(self, model)
    )
    init_kwargs = {"dtype": "bfloat16", "attn_implementation": "eager"}
    args = trainer_config(tmp_path, WeakToStrongConfig, max_steps=1, kd_weight=0.5, model_init_kwargs=init_kwargs)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    config = arguments(models, "generation", student_loss="kd", max_completion_length=2, weak_training={})
    rows = list(make_rows("generation", 8))
    task = GenerationTask(max_completion_length=2)
    plan = Experiment(config, task, args, make_splits(config, make_rows("generation"), None)).plan(
        Loading(lora, four_bit), Loading(lora)
    )
    weak, _, student = (stage.run.args[0] for stage in plan)
    train_and_judge(weak, rows, {"test": rows}, tmp_path / "weak", None, "none")
    train_and_judge(student, rows, {"test": rows}, tmp_path / "student", tmp_path / "weak", "none")
    for model, quantized in ((judged[0], True), (teachers[0], True), (judged[1], False)):
        layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
        assert isinstance(layer, Linear4bit) == quantized
        assert model.get_output_embeddings().weight.dtype == torch.bfloat16
        assert model.config._attn_implementation == "eager"


def test_pairs_are_shown_either_way_round():
    rows = [
        PreferenceTask().relabel({"prompt": str(n), "chosen": "a", "rejected": "b"}, 1.0, False) for n in range(200)
    ]
    assert 70 < sum(row["chosen"] == "a" for row in rows) < 130
    assert all((row["preference_probability"] == 1.0) == (row["chosen"] == "a") for row in rows)


def test_a_probability_below_one_half_says_that_the_other_side_is_better():
    """Gold labels were trained on as they are and judged as if `chosen` were always better."""
    task, pair = PreferenceTask(), {"prompt": "p", "chosen": "a", "rejected": "b"}
    cases = [(0.2, 0.3, 1), (0.2, 0.7, 0), (0.8, 0.7, 1), (0.8, 0.5, 0), (0.2, 0.5, 0), (0.5, 0.9, 0.5)]
    for gold, output, right in cases:
        assert task.judge_output({**pair, "preference_probability": gold}, output).right == right, (gold, output)
    rows = [{**pair, "preference_probability": n % 2} for n in range(40)]
    judged = [task.judge_output(row, 0.9 if row["preference_probability"] else 0.1) for row in rows]
    pytest.importorskip("sklearn")
    assert learnt_weights(task, rows, [judged])[0] > 0


def test_rows_whose_gold_label_is_one_half_are_not_tested_on(models, caplog):
    rows = [{**row, "preference_probability": 0.5 if n % 2 else 0.1} for n, row in enumerate(make_rows("preference"))]
    splits = make_splits(arguments(models), Dataset.from_list(rows), None)
    assert {row["preference_probability"] for row in splits["test"]} == {0.1}
    assert {row["preference_probability"] for row in splits["weak"]} == {0.1, 0.5}
    assert "of the split 'test' are ignored: with the label 0.5" in caplog.text
    held_back = Dataset.from_list([{**rows[0], "prompt": "x", "preference_probability": 1.5}])
    with pytest.raises(ValueError, match=r"'test' has the label 1.5"):
        make_splits(arguments(models), make_rows("preference"), held_back)


def test_rows_of_a_transform_are_split_as_it_shows_them(models):
    rows = make_rows("outcome")
    raw = rows.rename_columns({"completion": "answer"})

    def transform(batch):
        return {"prompt": batch["prompt"], "completion": batch["answer"], "label": batch["label"]}

    config = arguments(models, task="outcome")
    assert make_splits(config, raw.with_transform(transform), None) == make_splits(config, rows, None)
    assert make_splits(config, rows.with_format("torch"), None) == make_splits(config, rows, None)


def test_what_the_template_reads_reaches_training_and_judging(tmp_path):
    """`tools`, `chat_template_kwargs` and, of ground truth, `margin` were dropped without a word."""
    chat = [{"role": "user", "content": "2 + 2?"}]
    sides = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "4"), ("rejected", "5"))}
    pair = {"prompt": chat, **sides}
    extra = {"tools": [{"name": "add"}], "chat_template_kwargs": {"think": True}}
    seen = []

    def scorer(prompts, completions, **columns):
        seen.append(columns)
        return [0.0] * len(prompts)

    task = PreferenceTask()
    task.judge(scorer, [pair | extra])
    assert seen == [{name: [value] * 2 for name, value in extra.items()}]
    gold = task.training_data([pair | extra | {"margin": 1.0, "preference_probability": 0.9, "id": 7}])
    assert set(gold.column_names) == {*pair, *extra, "margin", "preference_probability"}
    student = task.relabel(pair | extra | {"margin": 1.0}, 0.7, False)
    assert set(student) == {*pair, *extra, "preference_probability"}
    assert task.unused_columns([*pair, *extra, "margin", "id", "chosen_rating"]) == ["id", "chosen_rating"]
    for other in (OutcomeTask(), ProcessTask(), GenerationTask()):
        row = dict.fromkeys(other.columns, "x") | extra
        assert set(other.training_data([row]).column_names) == {*other.columns, *extra}


def test_two_losses_that_share_a_name_do_not_share_a_result(models, tmp_path):
    def loss(sign):
        def one(scores, ratings, mask, *, margin=None, target=None):
            return sign * (scores[:, 0] - scores[:, 1])

        return one

    found = []
    for function in (loss(1.0), loss(-1.0)):
        args = trainer_config(tmp_path, RewardConfig, loss_type=function)
        found.append(cache_settings(Run(PreferenceTask(), models[0], args, seed=0), "model", []))
    assert found[0] != found[1]


def test_hard_labels_round():
    assert OutcomeTask().relabel({"label": 0}, 0.7, True) == {"label": 1.0}
    assert ProcessTask().relabel({"labels": [1, 1]}, [0.7, 0.4], True)["labels"] == [1.0, 0.0]


# --------------------------------------------------------------------------------------- splits
@pytest.mark.parametrize("task", TASKS)
def test_splits_are_disjoint_by_prompt_and_do_not_depend_on_order(task, models):
    rows = make_rows(task)
    doubled = Dataset.from_list([*rows, *rows])
    config = arguments(models, task)
    splits, other = make_splits(config, doubled, None), make_splits(config, doubled.shuffle(seed=1), None)
    groups = {name: {group_of(row) for row in part} for name, part in splits.items()}
    assert sum(map(len, groups.values())) == 48
    assert groups == {name: {group_of(row) for row in part} for name, part in other.items()}


def test_a_test_set_that_was_trained_on_is_refused(models):
    rows = make_rows("outcome")
    with pytest.raises(ValueError, match="share [123] prompts"):
        make_splits(arguments(models, "outcome"), rows, rows.select(range(3)))


def test_an_empty_split_and_a_single_class_are_refused(models):
    with pytest.raises(ValueError, match="has no rows"):
        make_splits(arguments(models), make_rows("preference", 1), None)
    rows = make_rows("outcome").map(lambda row: {"label": True})
    with pytest.raises(ValueError, match="are right"):
        make_splits(arguments(models, "outcome"), rows, None)


def test_labels_that_are_no_probabilities_are_refused_wherever_they_stand(models):
    rows = list(make_rows("outcome"))
    for bad in (None, 2.0, "yes"):
        held_back = Dataset.from_list([{**rows[0], "prompt": "new", "label": bad}])
        with pytest.raises(ValueError, match="'test' has (the|no) label"):
            make_splits(arguments(models, "outcome"), Dataset.from_list(rows), held_back)
    steps = make_rows("process")
    with pytest.raises(ValueError, match="are right"):
        make_splits(arguments(models, "process"), steps.map(lambda row: {"labels": [True, True]}), None)


def test_a_stream_that_does_not_know_its_columns(models):
    rows = make_rows("outcome")
    stream = IterableDataset.from_generator(lambda: iter(list(rows)))
    config = arguments(models, "outcome")
    assert make_splits(config, stream, None) == make_splits(config, rows, None)
    with pytest.raises(ValueError, match="no column"):
        make_splits(config, IterableDataset.from_generator(lambda: iter([{"text": "a"}])), None)


def test_pairs_without_a_prompt_column_stay_with_their_prompt():
    def chat(*texts):
        return [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(texts)]

    one = {"chosen": chat("hi", "a"), "rejected": chat("hi", "b"), "score": 1.0}
    two = {"chosen": chat("hi", "c"), "rejected": chat("hi", "d"), "score": 2.0}
    assert group_of(one) == group_of(two) == group_of({"prompt": chat("hi")})
    assert group_of(one) != group_of({"chosen": chat("ho", "a"), "rejected": chat("ho", "b")})
    text = {"chosen": "Q: 1 A: 2", "rejected": "Q: 1 A: 3"}
    assert group_of({**text, "score": 1.0}) == group_of({**text, "score": 2.0}) != group_of({**text, "chosen": "c"})


@pytest.mark.parametrize(
    ("task", "loss", "kwargs", "message"),
    [
        ("process", "xent", {"num_labels": 3}, "three classes"),
        ("process", "logconf", {"num_labels": 1, "loss_type": "bce"}, "num_labels=2"),
        ("outcome", "xent", {"loss_type": "mse"}, "no log-odds"),
        ("preference", "xent", {"loss_type": "plackett_luce"}, "does not accept probabilities"),
    ],
)
def test_outputs_that_are_no_log_odds_are_refused(task, loss, kwargs, message, models, tmp_path):
    args = trainer_config(tmp_path, CONFIGS[task], **kwargs)
    with pytest.raises(ValueError, match=message):
        weak_to_strong(arguments(models, task, student_loss=loss), args, make_rows(task))


def test_kd_between_two_vocabularies_is_refused_before_a_run(models, tmp_path):
    other = str(save_tiny_model(tmp_path / "qwen", "qwen3"))  # a smaller vocabulary: sizes alone would let it pass
    config = WeakToStrongArguments(models[:1], [other], task="generation", student_loss="kd")
    with pytest.raises(ValueError, match="vocabularies of student and teacher"):
        weak_to_strong(config, trainer_config(tmp_path / "run", WeakToStrongConfig), make_rows("generation"))
    assert not (tmp_path / "run" / "weak-0-seed-0").exists()


def test_kd_without_a_weight_is_refused_before_a_run(models, tmp_path):
    args = trainer_config(tmp_path / "run", WeakToStrongConfig, kd_weight=0.0)
    config = WeakToStrongArguments(models[:1], models[1:], task="generation", student_loss="kd")
    with pytest.raises(ValueError, match="kd_weight=0 has no teacher"):
        weak_to_strong(config, args, make_rows("generation"))


@pytest.mark.parametrize(
    ("task", "column"), [("preference", "chosen"), ("outcome", "prompt"), ("process", "completions")]
)
def test_rows_beyond_the_positions_of_a_model_are_judged_by_what_fits(task, column, tmp_path, caplog):
    """The run ended with an error after the weak model had been trained, and no argument could prevent it."""
    own = [str(save_tiny_model(tmp_path / str(seed), "gpt2", seed=seed, n_positions=32)) for seed in (0, 1)]
    rows = make_rows(task).to_list()
    for row in rows[::6]:
        row[column] = [row[column][0], " 2" * 60] if task == "process" else row[column] + " 2" * 60
    report, started = run(own, tmp_path, task, Dataset.from_list(rows))
    assert len(started) == 3 and sum(report.rows.values()) == 48
    assert "at most 32 tokens: longer rows are judged by what fits" in caplog.text


@pytest.mark.parametrize("task", ["preference", "outcome", "process", "generation"])
def test_another_trainers_arguments_are_refused_before_a_run(task, tmp_path):
    other = trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="args is a DPOConfig"):
        weak_to_strong(WeakToStrongArguments(["a"], ["b"], task=task), other, Dataset.from_list([{"prompt": "a"}]))


def test_an_adapter_that_cannot_be_loaded_again_is_refused_before_a_run(tmp_path):
    args = trl.RewardConfig(str(tmp_path), use_cpu=True, bf16=False)  # TRL's own is taken
    adapter = LoraConfig(target_modules="all-linear", init_lora_weights="pissa")
    for name in ("peft_config", "weak_peft_config"):
        with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
            weak_to_strong(WeakToStrongArguments(["a"], ["b"]), args, Dataset.from_list([]), **{name: adapter})


def test_missing_columns_are_named(models):
    with pytest.raises(ValueError, match=r"no column \['label'\]"):
        make_splits(arguments(models, "outcome"), make_rows("outcome").remove_columns("label"), None)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weak_share": 1.0}, "weak_share=1.0"),
        ({"seeds": [1, 1]}, "none twice"),
        ({"student_loss": "kd"}, "cannot be used with task='preference'"),
        ({"student_loss_kwargs": {"alpha": 0.1}}, "of 'logconf'"),
        ({"task": "generation", "weak_ensemble": "mean"}, "texts cannot be averaged"),
        ({"weak_ensemble": True}, "weak_ensemble=True"),
        ({"fusion_share": 0.0}, "fusion_share=0.0"),
        ({"weak_training": "{"}, "not JSON"),
        ({"task": "rows"}, "task='rows' is not known"),
    ],
)
def test_arguments_that_cannot_work(kwargs, message, models):
    with pytest.raises(ValueError, match=message):
        arguments(models, **kwargs)


def test_an_unknown_argument_of_the_weak_model_is_named(models, tmp_path):
    with pytest.raises(ValueError, match="'max_stepz'"):
        run(models, tmp_path, weak_training={"max_stepz": 3})
    assert not (tmp_path / "run").exists()  # before a model is trained
    with pytest.raises(ValueError, match=r"weak_training sets \['seed'\]"):
        run(models, tmp_path, weak_training={"seed": 3})


# --------------------------------------------------------------------------------------- reports
def test_report_by_hand():
    """Four test rows, one seed: weak right on two, student on three, ceiling on all."""

    def judge(*right):
        return [Judgement(value, 0.5 + 0.4 * value) for value in right]

    runs = [{"seed": 0, "weak": judge(1, 1, 0, 0), "student": judge(1, 1, 1, 0), "ceiling": judge(1, 1, 1, 1)}]
    runs[0]["labels"] = judge(1, 0)
    many = [{**runs[0], **{name: runs[0][name] * 40 for name in ("weak", "student", "ceiling")}}]
    found = pair_report(["w"], "s", many, ["a", "b", "a", "b"] * 40, [str(n) for n in range(160)], True)
    assert (found.weak, found.weak_to_strong, found.ceiling, found.pgr) == (0.5, 0.75, 1.0, 0.5)
    assert found.pgr_interval[0] < 0.5 < found.pgr_interval[1]
    assert found.agreement == {"when_right": 1.0, "when_wrong": 0.5}
    assert found.weak_labels["accuracy"] == 0.5
    # sure of 0.9 (right) and 0.5 (wrong): |0.9 - 1| and |0.5 - 0|, half each
    assert found.weak_labels["calibration_error"] == pytest.approx(0.3)
    assert found.by_class["a"] == {"weak": 0.5, "student": 1.0, "ceiling": 1.0}


def test_the_report_has_intervals_for_every_figure(tmp_path):
    def judge(wrong_every):
        return [Judgement(float(n % wrong_every != 0), 0.9) for n in range(400)]

    run = {"seed": 0, "weak": judge(2), "student": judge(4), "ceiling": judge(10), "labels": judge(2)}
    prompts = [str(n) for n in range(400)]
    pairs = [pair_report([f"a/{name}"], "b/big", [run], ["a"] * 400, prompts, True) for name in ("one", "two")]
    for name, spread in (("weak", 0.5), ("weak_to_strong", 0.433), ("ceiling", 0.3)):
        low, high = pairs[0].intervals[name]  # 1.96 standard errors of a mean of 400
        assert (high - low) / 2 == pytest.approx(1.96 * spread / 20, rel=0.1)
    report = WeakToStrongReport("outcome", "xent", {"labelled": 400}, pairs)
    assert report.pair_names() == ["one -> big", "two -> big"]
    assert f"0.500 ({pairs[0].intervals['weak'][0]:.3f} to" in report.markdown()
    same = [replace(pairs[0], weak_models=["a/one"]), replace(pairs[0], weak_models=["c/one"])]
    assert WeakToStrongReport("outcome", "xent", {}, same).pair_names() == ["a/one -> b/big", "c/one -> b/big"]
    report.save(tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text())["pairs"][0]
    assert saved["intervals"]["ceiling"] == list(pairs[0].intervals["ceiling"])


def test_all_wandb_runs_share_a_project_and_a_group(models, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_PROJECT", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.setup()  # as after an earlier run of this process: W&B reads the variables no more
    opened, init = [], wandb.init

    def recorded(*args, **kwargs):
        opened.append(init(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(wandb, "init", recorded)
    args = trainer_config(tmp_path / "digits", ORMConfig, max_steps=1, report_to="wandb")
    weak_to_strong(arguments(models, "outcome"), args, make_rows("outcome"))
    assert {(run.project, run.group) for run in opened} == {("huggingface", "digits")}
    names = ["weak-0-seed-0", "ceiling-0-seed-0", "student-weak-0-0-seed-0", "weak-to-strong-outcome"]
    assert [run.name for run in opened] == names and wandb.run is None
    assert "WANDB_RUN_GROUP" not in os.environ


def test_the_report_uses_a_wandb_run_that_is_open_and_names_the_pairs(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    judged = {
        name: [Judgement(float(n % k != 0), 0.9) for n in range(40)] for name, k in (("weak", 2), ("student", 4))
    }
    run = {"seed": 0, **judged, "ceiling": [Judgement(1.0, 0.9)] * 40, "labels": judged["weak"]}
    prompts = [str(n) for n in range(40)]
    pairs = [pair_report([f"a/{name}"], "b/big", [run], ["a"] * 40, prompts, True) for name in ("one", "two")]
    with wandb.init(project="mine", dir=str(tmp_path)) as mine:
        WeakToStrongReport("outcome", "xent", {"labelled": 40}, pairs).save(tmp_path, report_to="wandb")
        assert wandb.run is mine  # still open
        summary = dict(mine.summary)
    assert summary["one -> big/weak"] == 0.5 and summary["two -> big/pgr"] == pairs[1].pgr
    assert summary["one -> big/pgr_low"] == pairs[0].pgr_interval[0]


def test_an_interval_without_an_end_is_null_in_the_report(tmp_path):
    def judge(*right):
        return [Judgement(float(value), 0.5 + 0.4 * value) for value in right]

    run = {"seed": 0, "weak": judge(*[0] * 8), "student": judge(*[1, 0] * 4), "ceiling": judge(*[0] * 5, *[1] * 3)}
    pair = pair_report(["w"], "s", [{**run, "labels": judge(1)}], ["a"] * 8, [str(n) for n in range(8)], True)
    open_ended = replace(pair, pgr_interval=(pair.pgr_interval[0], float("inf")))
    WeakToStrongReport("outcome", "xent", {}, [open_ended, pair]).save(tmp_path)
    text = (tmp_path / "report.json").read_text()
    assert "Infinity" not in text and json.loads(text)["pairs"][0]["pgr_interval"][1] is None
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_calibration_error():
    def error(probabilities, right):
        calibration = Calibration(bins=10)
        calibration.add(torch.tensor(probabilities), torch.tensor(right))
        return calibration.summary()["ece"]

    assert error([0.75, 0.75, 0.75, 0.75], [1, 1, 1, 0]) == pytest.approx(0.0)
    assert error([1.0, 0.05], [0, 1]) == pytest.approx((1.0 + 0.95) / 2)


def test_metric_of_texts_is_checked():
    rows = [{"prompt": "p", "completion": "gold"}]
    assert exact_match(["p"], [" gold "], ["gold"]) == [1.0]
    assert GenerationTask().judge_texts(["gold"], rows, [False]) == [Judgement(1.0, "gold", finished=False)]
    with pytest.raises(ValueError, match="not in"):
        GenerationTask(lambda prompts, completions, **columns: [2.0]).judge_texts(["x"], rows, [True])


# --------------------------------------------------------------------------------------- cache keys
def test_the_cache_key_of_a_run_counts_what_matters(models, tmp_path):
    def identity(seed=0, **kwargs):
        args = trainer_config(tmp_path, RewardConfig, **kwargs)
        return cache_settings(Run(PreferenceTask(), models[0], args, seed), "model", ["test"])

    same = identity()
    assert identity(logging_steps=7) == same and identity(report_to="wandb") == same
    assert identity(learning_rate=0.5) != same and identity(seed=1) != same
    assert json.loads(json.dumps(same)) == same


def test_the_wandb_run_is_named_after_the_folder(tmp_path):
    def name(**kwargs):
        run = Run(PreferenceTask(), "m", trainer_config(tmp_path, RewardConfig, **kwargs), seed=0)
        return run.arguments(tmp_path / "weak-0-seed-1.partial", "wandb").run_name

    assert name() == "weak-0-seed-1" and name(run_name="mine") == "mine-weak-0-seed-1"


def test_the_cache_key_of_a_run_without_a_teacher_has_no_weight_of_it(tmp_path):
    def identity(loss, metric=None, **kwargs):
        args = trainer_config(tmp_path, WeakToStrongConfig, **kwargs)
        return cache_settings(Run(GenerationTask(metric), "m", args, seed=0, loss=loss), "model", ["test"])

    assert identity("gold", kd_weight=0.5) == identity("gold") and identity("kd", kd_weight=0.5) != identity("kd")
    assert identity("gold", dataloader_drop_last=True) != identity("gold")
    named = [identity("gold", metric) for metric in METRICS]
    assert all(named.count(one) == 1 for one in named)


def test_runs_of_a_model_whose_weights_changed_run_again(models, tmp_path):
    weak = shutil.copytree(models[0], tmp_path / "weak")
    pair = [str(weak), models[1]]
    run(pair, tmp_path)
    torch.save(load_file(weak / "model.safetensors"), weak / "pytorch_model.bin")
    assert run(pair, tmp_path)[1] == ["weak-0-seed-0", "student-weak-0-0-seed-0"]


def test_the_cache_key_counts_the_text_of_its_chat_template(tmp_path):
    template = tmp_path / "template.jinja"
    found = []
    for text in ("{{ messages }}", "{{ messages[0] }}"):
        template.write_text(text)
        args = trainer_config(tmp_path, RewardConfig, chat_template_path=str(template))
        found.append(cache_settings(Run(PreferenceTask(), "m", args, seed=0), "model", ["test"]))
    assert found[0] != found[1]
