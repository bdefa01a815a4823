"""`PRMTrainer`: scripts and data of TRL 1.13 unchanged, labels of every kind, and what the metrics say."""

import dataclasses
import inspect
import math

import pytest
import torch
from datasets import Dataset, Features, List, Value
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_recall_fscore_support, roc_auc_score
from transformers import AutoModelForTokenClassification, AutoTokenizer

from tests.tiny import save_tiny_model
from tests.trainers.helpers import history
from tests.trainers.table import logits_of, step_rows, tiny_trainer
from trl_ext import PRMConfig, PRMTrainer
from trl_ext.trainers.token.evaluation import StepEvaluator
from trl_ext.trainers.token.objective import TokenObjective
from trl_ext.trainers.token.recording import labelled_points


# The public arguments of TRL 1.13.0's `trl.experimental.prm`.
TRL_FIELDS = {
    "learning_rate": 1e-5,
    "max_length": 1024,
    "max_completion_length": None,
    "disable_dropout": True,
    "step_separator": "\n",
    "train_on_last_step_only": False,
    "dataset_num_proc": None,
    "logging_steps": 10,
    "gradient_checkpointing": True,
}
TRL_ARGUMENTS = [
    "model",
    "args",
    "data_collator",
    "train_dataset",
    "eval_dataset",
    "processing_class",
    "model_init",
    "compute_metrics",
    "callbacks",
    "optimizers",
    "preprocess_logits_for_metrics",
    "peft_config",
]


def test_arguments_of_trl_1_13_keep_their_names_order_and_defaults():
    fields = {field.name: field.default for field in dataclasses.fields(PRMConfig)}
    assert {name: fields[name] for name in TRL_FIELDS} == TRL_FIELDS
    ours = list(inspect.signature(PRMTrainer).parameters)
    assert ours[: len(TRL_ARGUMENTS)] == TRL_ARGUMENTS


def test_a_trl_1_13_script_with_the_import_changed(base, tmp_path):
    """Beside it, the loss of the same rows as TRL 1.13 made them: pieces, a label a step, mean cross-entropy."""
    model = AutoModelForTokenClassification.from_pretrained(str(base), num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training_args = PRMConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        step_separator="\n",
        max_steps=1,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        train_sampling_strategy="sequential",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    train_dataset = Dataset.from_list(step_rows(4))
    trainer = PRMTrainer(
        model=model,
        args=training_args,
        processing_class=tokenizer,
        train_dataset=train_dataset,
        eval_dataset=Dataset.from_list(step_rows(6, seed=1)),
    )

    pieces = []
    for row in train_dataset:
        ids = [tokenizer.bos_token_id, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
        labels = [-100] * len(ids)
        for step, label in zip(row["completions"], row["labels"], strict=True):
            step_ids = tokenizer(step, add_special_tokens=False)["input_ids"]
            step_ids += tokenizer("\n", add_special_tokens=False)["input_ids"]
            ids += step_ids
            labels += [-100] * (len(step_ids) - 1) + [int(label)]
        pieces.append((ids, labels))
    assert [row["span_input_ids"] for row in trainer.train_dataset] == [ids for ids, _ in pieces]
    losses = []
    for ids, labels in pieces:
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([ids])).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none"))
    labelled = torch.cat([torch.tensor(labels) for _, labels in pieces]) != -100
    want = torch.cat(losses)[labelled].mean()

    trainer.train()
    trainer.save_model()
    assert history(trainer, "loss")[0] == pytest.approx(want.item(), abs=1e-5)
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert "eval_accuracy" in trainer.state.log_history[1]
    reloaded = AutoModelForTokenClassification.from_pretrained(str(tmp_path))  # as before, a plain model
    assert reloaded.config.num_labels == 2


def test_a_compute_metrics_of_trl_1_13_still_works(base, tmp_path):
    """It gets (N, T, 2) and (N, T) with -100, and what it returns wins over ours."""
    seen = {}

    def compute(eval_pred):
        predictions, labels = eval_pred
        seen["shapes"] = predictions.shape, labels.shape
        chosen = labels != -100
        seen["labels"] = set(labels[chosen].tolist())
        return {"accuracy": 100 + (predictions.argmax(axis=2)[chosen] == labels[chosen]).mean().item()}

    rows = step_rows(7)
    trainer = tiny_trainer("prm", base, tmp_path, eval_rows=rows, trainer_kwargs={"compute_metrics": compute})
    plain = tiny_trainer("prm", base, tmp_path, eval_rows=rows)
    metrics, ours = trainer.evaluate(), plain.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(100 + ours["eval_accuracy"])
    assert metrics["eval_loss"] == pytest.approx(ours["eval_loss"], abs=1e-6)
    width = max(len(row["span_input_ids"]) for row in trainer.eval_dataset)
    assert seen == {"shapes": ((7, width, 2), (7, width)), "labels": {0.0, 1.0}}


KINDS_OF_LABELS = {
    "bool": (List(Value("bool")), [[True, False], [True, True, False], [False]]),
    "int": (List(Value("int64")), [[1, 0], [1, 1, 0], [0]]),
    "float": (List(Value("float32")), [[0.75, 0.25], [1.0, 0.5, 0.0], [0.125]]),
    "null": (List(Value("bool")), [[True, None], [None, True, False], [False]]),
}


@pytest.mark.parametrize("kind", KINDS_OF_LABELS)
@pytest.mark.parametrize("stream", [False, True], ids=["data set", "stream"])
def test_labels_survive_map_and_collate(kind, stream, base, tmp_path):
    """`datasets` must not cast them, and null is not wrong."""
    feature, labels = KINDS_OF_LABELS[kind]
    features = Features({"prompt": Value("string"), "completions": List(Value("string")), "labels": feature})
    rows = [{"prompt": "Q: ", "completions": ["a step"] * len(given), "labels": given} for given in labels]
    data = Dataset.from_list(rows, features=features)
    trainer = tiny_trainer("prm", base, tmp_path, data.to_iterable_dataset() if stream else data)
    batch = trainer.data_collator(list(trainer.train_dataset))
    for number, given in enumerate(labels):
        mask = batch["label_mask"][number, :, 0]
        assert batch["token_labels"][number, :, 0][mask].tolist() == [value for value in given if value is not None]
        annotated = [step for step, value in enumerate(given) if value is not None]
        assert batch["label_steps"][number, :, 0][mask].tolist() == annotated
        assert batch["unannotated_steps"][number].nonzero().flatten().tolist() == [
            step for step, value in enumerate(given) if value is None
        ]


def test_soft_labels_are_trained_with(base, tmp_path):
    rows = step_rows(8)
    for number, row in enumerate(rows):
        row["labels"] = [(number + step) % 5 / 4 for step in range(len(row["labels"]))]
    trainer = tiny_trainer(
        "prm", base, tmp_path, rows, per_device_train_batch_size=8, max_steps=1, train_sampling_strategy="sequential"
    )
    sums, count = 0.0, 0
    for row in trainer.train_dataset:
        log = logits_of(trainer, row)[row["label_positions"]].log_softmax(-1)
        q = torch.tensor(row["label_values"])
        sums, count = sums - (q * log[:, 1] + (1 - q) * log[:, 0]).sum().item(), count + len(q)
    trainer.train()
    assert history(trainer, "loss")[0] == pytest.approx(sums / count, abs=1e-5)


def test_options_of_the_data(base, tmp_path):
    rows = [{"prompt": "Q: ", "completions": ["one", "two", "three"], "labels": [True, False, False]}] * 4
    last = tiny_trainer("prm", base, tmp_path, rows, rows, train_on_last_step_only=True)
    assert last.train_dataset[0]["label_steps"] == [2]
    assert last.eval_dataset[0]["label_steps"] == [0, 1, 2]  # as in TRL
    masked = tiny_trainer("prm", base, tmp_path, rows, rows, mask_after_first_error=True)
    assert masked.train_dataset[0]["label_steps"] == [0, 1]
    assert masked.eval_dataset[0]["label_steps"] == [0, 1]
    cut = tiny_trainer("prm", base, tmp_path, rows, max_completion_length=3)
    assert len(cut.train_dataset[0]["span_input_ids"]) == cut.train_dataset[0]["completion_start"] + 3
    other = tiny_trainer("prm", base, tmp_path, rows, step_separator=" ;; ")
    text = other.processing_class.decode(other.train_dataset[0]["span_input_ids"])
    assert text.endswith("Q: one ;; two ;; three ;; ")


@pytest.mark.parametrize(
    ("steps", "labels", "length", "lost", "found"),
    [
        (["one", "two", "three"], [True, True, False], None, [], {"first_error_accuracy": 0.0}),
        (["a", "b", "c"], [True, True, False], 5, [2], {}),  # cut before the error
        (["a", "b", "c"], [True, False, True], 5, [2], {"first_error_accuracy": 0.0}),  # and behind it
        (["a", "b", "c"], [True, True, True], 5, [2], {}),  # the end may be right or wrong
        (["a", "b", "c"], [True, True, True], 6, [], {"no_error_accuracy": 1.0}),  # all of it is shown
        (["one", "", "three"], [True, False, True], None, [0, 1], {}),  # two labels on one token
        (["one", "", "three"], [True, True, True], None, [], {"no_error_accuracy": 1.0}),  # the same one, twice
    ],
)
def test_a_solution_whose_error_is_not_shown_is_not_judged(steps, labels, length, lost, found, tmp_path, base):
    rows = [{"prompt": "Q: ", "completions": steps, "labels": labels}]
    trainer = tiny_trainer("prm", base, tmp_path, rows, rows, max_completion_length=length)
    batch = trainer.data_collator(list(trainer.eval_dataset))
    assert batch["unannotated_steps"][0].nonzero().flatten().tolist() == lost
    evaluator = StepEvaluator(TokenObjective("ce", None, None, "token", 1, 2))
    trusting = torch.tensor([0.0, 1.0]).expand(*batch["label_mask"].shape, 2)
    evaluator.add(labelled_points(trusting, batch))
    summary = evaluator.summary()
    assert (summary["first_error_rows"], summary["first_error_skipped"]) == ((1, 0) if found else (0, 1))
    for name in ("first_error_accuracy", "no_error_accuracy"):
        assert summary[name] == found.get(name) or (name not in found and math.isnan(summary[name]))


def expected_steps(trainer, classes):
    """Score, label and (where there are three) class of each annotated step, by hand."""
    rows = []
    for row in trainer.eval_dataset:
        logits = logits_of(trainer, row)[row["label_positions"]]
        if classes == 3:
            scores = torch.logsumexp(logits[:, 1:], -1) - logits[:, 0]
        else:
            scores = logits[:, -1] - (logits[:, 0] if classes == 2 else 0)
        rows.append((scores.tolist(), row["label_values"], logits.argmax(-1).tolist()))
    return rows


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_metrics_against_scikit_learn(classes, base, tmp_path):
    """Base rate, per-class precision, recall and F1, balanced accuracy, AUC to the first error, ProcessBench."""
    rows = step_rows(40, classes=3 if classes == 3 else 2, seed=3)
    loss = "bce" if classes == 1 else "ce"
    trainer = tiny_trainer(
        "prm", base, tmp_path, rows, rows, num_labels=classes, loss_type=loss, learning_rate=3e-3, max_steps=20
    )
    trainer.train()
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    steps = expected_steps(trainer, classes)

    right = [label >= 0 if classes == 3 else label > 0.5 for _, labels, _ in steps for label in labels]
    predicted = [score > 0 for scores, _, _ in steps for score in scores]
    assert 0 < sum(predicted) < len(predicted)
    assert metrics["right_rate"] == pytest.approx(sum(right) / len(right))
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(right, predicted))
    precision, recall, f1, _ = precision_recall_fscore_support(right, predicted)
    for index, name in enumerate(("wrong", "right")):
        assert metrics[f"{name}_precision"] == pytest.approx(precision[index])
        assert metrics[f"{name}_recall"] == pytest.approx(recall[index])
        assert metrics[f"{name}_f1"] == pytest.approx(f1[index])

    scored, hits = [], {True: [], False: []}
    for scores, labels, _ in steps:
        good = [label >= 0 if classes == 3 else label > 0.5 for label in labels]
        first = good.index(False) if False in good else len(good)
        scored += list(zip(good, scores, strict=True))[: first + 1]
        found = next((step for step, score in enumerate(scores) if score <= 0), len(scores))
        hits[first < len(good)].append(found == first)
    assert metrics["auc_to_first_error"] == pytest.approx(roc_auc_score(*zip(*scored, strict=True)))
    wrong, clean = (sum(hits[key]) / len(hits[key]) for key in (True, False))
    assert metrics["first_error_accuracy"] == pytest.approx(wrong)
    assert metrics["no_error_accuracy"] == pytest.approx(clean)
    assert metrics["processbench_f1"] == pytest.approx(2 * wrong * clean / (wrong + clean) if wrong + clean else 0)
    assert metrics["first_error_rows"] == 40

    if classes == 3:
        labels = [int(label) + 1 for _, given, _ in steps for label in given]
        chosen = [label for _, _, given in steps for label in given]
        assert metrics["class_balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, chosen))
        scores = f1_score(labels, chosen, average=None, labels=[0, 1, 2], zero_division=0)
        for name, value in zip(("negative", "neutral", "positive"), scores, strict=True):
            assert metrics[f"class_{name}_f1"] == pytest.approx(value)
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_step_without_a_label_is_not_judged(base, tmp_path):
    """A solution whose first error may be at a step with a null label says nothing about first errors."""
    rows = [
        {"prompt": "Q: ", "completions": ["a", "b", "c"], "labels": [True, None, True]},
        {"prompt": "Q: ", "completions": ["a", "b", "c"], "labels": [True, True, None]},
        {"prompt": "Q: ", "completions": ["a", "b", "c"], "labels": [True, False, None]},
        {"prompt": "Q: ", "completions": ["a", "b"], "labels": [True, True]},
    ]
    metrics = tiny_trainer("prm", base, tmp_path, rows, rows).evaluate()
    assert metrics["eval_first_error_rows"] == 2
    assert metrics["eval_first_error_skipped"] == 2


def test_it_learns(base, tmp_path):
    rows = step_rows(64)
    trainer = tiny_trainer(
        "prm", base, tmp_path, rows, step_rows(32, seed=9), max_steps=60, learning_rate=5e-3, logging_steps=60
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_balanced_accuracy"] > 0.9
    assert metrics["eval_auc_to_first_error"] > 0.95


def test_encoders_read_steps_in_both_directions(tmp_path):
    """`label_placement="before"` puts the label in front of the step, for models that see what follows."""
    bert = save_tiny_model(tmp_path / "bert", "bert")
    rows = step_rows(8)
    last = tiny_trainer("prm", bert, tmp_path / "last", rows)
    before = tiny_trainer("prm", bert, tmp_path / "before", rows, label_placement="before", max_steps=2)
    assert before.train_dataset[0]["label_positions"][0] == before.train_dataset[0]["completion_start"] - 1
    assert last.train_dataset[0]["label_positions"][0] > before.train_dataset[0]["label_positions"][0]
    before.train()
