"""Rows in the layouts of public data sets become rows that our trainers and evaluations read."""

import pytest
from datasets import Dataset, IterableDataset

from tests.tiny import tiny_tokenizer
from trl_ext.data.formats import prepare_groups
from trl_ext.data.recipes import RECIPES, convert, find_recipe
from trl_ext.data.spans import prepare_spans
from trl_ext.data.tokenization import TokenizationSettings
from trl_ext.data.validation import DataError
from trl_ext.evaluation.items import family_of, read_item


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


def rated(text: str, rating: int | None) -> dict:
    return {"text": text, "rating": rating, "flagged": False}


def step(completions, chosen, human=None) -> dict:
    return {"completions": completions, "chosen_completion": chosen, "human_completion": human}


def phase(finish: str, *steps: dict) -> dict:
    question = {"problem": "2 + 3?", "ground_truth_answer": "5"}
    return {"question": question, "label": {"steps": list(steps), "finish_reason": finish}}


HUMAN = {"text": "So 5.", "rating": None, "source": "human", "flagged": False, "corrected_rating": None}
# name -> released rows, our rows
RELEASED: dict[str, tuple[list[dict], list[dict]]] = {
    "prm800k": (
        [
            phase(
                "solution",
                step([rated("Add.", 1), rated("Sing.", -1)], 0),
                step([rated("Hm.", 0)], 0),
                step([rated("So 6.", -1)], None, HUMAN),
            ),
            phase("found_error", step([rated("Subtract.", -1)], None)),
            phase("bad_problem", step([rated("Add.", 1)], 0)),
        ],
        [
            {"prompt": "2 + 3?\n", "completions": ["Sing."], "labels": [0.0]},
            {"prompt": "2 + 3?\n", "completions": ["Add.", "Hm.", "So 6."], "labels": [None, None, 0.0]},
            {"prompt": "2 + 3?\n", "completions": ["Add.", "Hm.", "So 5."], "labels": [1.0, 1.0, None]},
            {"prompt": "2 + 3?\n", "completions": ["Subtract."], "labels": [0.0]},
        ],
    ),
    "prm800k_neutral": (
        [phase("solution", step([rated("Add.", 1)], 0), step([rated("Hm.", 0)], 0))],
        [{"prompt": "2 + 3?\n", "completions": ["Add.", "Hm."], "labels": [1.0, 0.0]}],
    ),
    "math_shepherd": (
        [
            {
                "input": "2 + 3? Step 1: Add. ки\nStep 2: So 6. ки",
                "label": "2 + 3? Step 1: Add. +\nStep 2: So 6. -",
                "task": "GSM8K",
            },
            {"input": "2 + 3? Add. ки", "label": "2 + 3? Add. +", "task": "GSM8K"},
            {"input": "2? Step 1: 2 ки", "label": "3? Step 1: 2 +", "task": "MATH"},
            {"input": "2? Step 1: 2 ки\nStep 2: more", "label": "2? Step 1: 2 +\nStep 2: more", "task": "MATH"},
        ],
        [{"prompt": "2 + 3?\n", "completions": ["Step 1: Add.", "Step 2: So 6."], "labels": [1.0, 0.0]}],
    ),
    "processbench": (
        [
            {"id": "a-0", "problem": "2 + 3?", "steps": ["Add.", "6.", "Done."], "label": 1},
            {"id": "a-1", "problem": "2 + 3?", "steps": ["Add.", "5."], "label": -1},
        ],
        [
            {"prompt": "2 + 3?\n", "completions": ["Add.", "6.", "Done."], "labels": [1.0, 0.0, None]},
            {"prompt": "2 + 3?\n", "completions": ["Add.", "5."], "labels": [1.0, 1.0]},
        ],
    ),
    "ultrafeedback": (
        [
            {
                "instruction": "Hi?",
                "source": "s",
                "completions": [
                    {"model": "a", "response": "Hi.", "fine-grained_score": 4.25, "overall_score": 10.0},
                    {"model": "b", "response": "Go.", "fine-grained_score": 1.5, "overall_score": 1.0},
                    {"model": "c", "response": "Oh.", "fine-grained_score": None, "overall_score": 1.0},
                ],
            },
            {"instruction": "Ho?", "source": "s", "completions": []},
        ],
        [{"prompt": [user("Hi?")], "completions": [[says("Hi.")], [says("Go.")]], "ratings": [4.25, 1.5]}],
    ),
    "ultrafeedback_binarized": (
        [
            {
                "prompt": "Hi?",
                "chosen": [user("Hi?"), says("Hi.")],
                "rejected": [user("Hi?"), says("Go.")],
                "score_chosen": 8.0,
                "score_rejected": 4.5,
            }
        ],
        [
            {
                "prompt": [user("Hi?")],
                "chosen": [says("Hi.")],
                "rejected": [says("Go.")],
                "chosen_rating": 8.0,
                "rejected_rating": 4.5,
            }
        ],
    ),
    "helpsteer2": (
        [
            {"prompt": "Hi?", "response": "Hi.", "helpfulness": 4, "verbosity": 1},
            {"prompt": "Hi?", "response": "Go.", "helpfulness": 0, "verbosity": 2},
            {"prompt": "So?<extra_id_1>Assistant\nYes.<extra_id_1>User\nWhy?", "response": "Eh", "helpfulness": 1},
            {"prompt": "So?<extra_id_1>Assistant\nYes.<extra_id_1>User\nWhy?", "response": "A.", "helpfulness": 3},
            {"prompt": "alone", "response": "A.", "helpfulness": 3},
        ],
        [
            {"prompt": [user("Hi?")], "completions": [[says("Hi.")], [says("Go.")]], "ratings": [4.0, 0.0]},
            {
                "prompt": [user("So?"), says("Yes."), user("Why?")],
                "completions": [[says("Eh")], [says("A.")]],
                "ratings": [1.0, 3.0],
            },
        ],
    ),
    "helpsteer2_preference": (
        [
            {"prompt": "Hi?", "response_1": "Hi.", "response_2": "Go.", "preference_strength": -2, "split": "train"},
            {"prompt": "Hi?", "response_1": "Hi.", "response_2": "Ho.", "preference_strength": 0, "split": "train"},
        ],
        [{"prompt": [user("Hi?")], "chosen": [says("Hi.")], "rejected": [says("Go.")], "preference_strength": 2.0}],
    ),
    "helpsteer3": (
        [{"context": [user("Hi?")], "response1": "Go.", "response2": "Hi.", "overall_preference": 3, "domain": "c"}],
        [{"prompt": [user("Hi?")], "chosen": [says("Hi.")], "rejected": [says("Go.")], "preference_strength": 3.0}],
    ),
    "nectar": (
        [
            {
                "prompt": "\n\nHuman: Hi?\n\nAssistant: ",
                "answers": [
                    {"answer": "Go.", "model": "a", "rank": 2.0},
                    {"answer": "Hi.", "model": "b", "rank": 1.0},
                ],
                "num_responses": 2,
            }
        ],
        [{"prompt": [user("Hi?")], "completions": [[says("Go.")], [says("Hi.")]], "ranks": [2, 1]}],
    ),
    "hh_rlhf": (
        [
            {
                "chosen": "\n\nHuman: Hi?\n\nAssistant: Hi.\n\nHuman: So\n\nso?\n\nAssistant: Yes.",
                "rejected": "\n\nHuman: Hi?\n\nAssistant: Hi.\n\nHuman: So\n\nso?\n\nAssistant: No.",
            },
            {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hi.", "rejected": "\n\nHuman: Hi?\n\nAssistant: "},
            {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hi.", "rejected": "\n\nHuman: Ho?\n\nAssistant: Hi."},
            {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hi.", "rejected": "\n\nHuman: Hi?\n\nAssistant: Hi."},
        ],
        [
            {
                "prompt": [user("Hi?"), says("Hi."), user("So\n\nso?")],
                "chosen": [says("Yes.")],
                "rejected": [says("No.")],
            }
        ],
    ),
    "skywork": (
        [{"chosen": [user("Hi?"), says("Hi.")], "rejected": [user("Hi?"), says("Go.")], "source": "s"}],
        [{"prompt": [user("Hi?")], "chosen": [says("Hi.")], "rejected": [says("Go.")]}],
    ),
    "rewardbench": (
        [{"prompt": "Hi?", "chosen": "Hi.", "rejected": "Go.", "chosen_model": "m", "subset": "hep-python", "id": 1}],
        [{"prompt": [user("Hi?")], "chosen": [says("Hi.")], "rejected": [says("Go.")], "subset": "hep-python"}],
    ),
    "rewardbench2": (
        [{"prompt": "Hi?", "chosen": ["Hi."], "rejected": ["Go.", "No."], "subset": "Focus", "id": "1"}],
        [
            {
                "prompt": [user("Hi?")],
                "completions": [[says("Hi.")], [says("Go.")], [says("No.")]],
                "ratings": [1.0, 0.0, 0.0],
                "subset": "Focus",
            }
        ],
    ),
}


def test_every_recipe_has_rows_here():
    assert RELEASED.keys() == RECIPES.keys()


@pytest.mark.parametrize("name", RELEASED)
def test_released_rows_become_ours(name):
    released, ours = RELEASED[name]
    assert convert(Dataset.from_list(released), name).to_list() == ours
    stream = convert(IterableDataset.from_generator(lambda: iter(released)), name)
    assert list(stream) == ours


@pytest.mark.parametrize("name", RELEASED)
def test_our_rows_are_trained_and_evaluated_on(name):
    rows = convert(Dataset.from_list(RELEASED[name][0]), name)
    tokenizer, settings = tiny_tokenizer("qwen"), TokenizationSettings(append_eos=False)
    arguments = {"tokenization": settings, "max_length": None, "min_survival": 1.0}
    if "labels" in rows.column_names:
        classes = 3 if name == "prm800k_neutral" else 2
        prepared, _ = prepare_spans(rows, tokenizer, kind="stepwise", num_labels=classes, **arguments)
        found = [row["label_values"] for row in prepared]
        assert found == [[label for label in row["labels"] if label is not None] for row in rows]
    else:
        prepared, _ = prepare_groups(rows, tokenizer, **arguments)
        assert len(prepared) == len(rows)
    item = read_item(rows[0], 0, family_of(rows.column_names))
    assert len(item.ratings) == len(item.completions) > 0


def test_what_no_recipe_reads_is_refused():
    with pytest.raises(ValueError, match="'hh_rlfh' is known. Did you mean 'hh_rlhf'"):
        find_recipe("hh_rlfh")
    with pytest.raises(DataError, match=r"found the columns \['text'\]; needed \['chosen', 'rejected'\] too"):
        convert(Dataset.from_list([{"text": "a"}]), "hh_rlhf")
    rows = [RELEASED["helpsteer3"][0][0], {**RELEASED["helpsteer3"][0][0], "context": None}]
    with pytest.raises(DataError, match="row 1: found a row that the format 'helpsteer3' cannot read"):
        convert(Dataset.from_list(rows), "helpsteer3")


def test_neighbours_are_joined_across_the_end_of_a_batch(monkeypatch):
    monkeypatch.setattr("trl_ext.data.recipes._BATCH_ROWS", 3)
    rows = [{"prompt": f"{n // 2}?", "response": f"{n}", "helpfulness": n % 5} for n in range(8)]
    converted = convert(Dataset.from_list(rows), "helpsteer2")
    assert [len(row["completions"]) for row in converted] == [2, 2, 2, 2]


def test_text_before_the_first_turn_is_refused():
    row = {"chosen": "A preamble.\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"}
    with pytest.raises(DataError, match="begins with 'A preamble.'"):
        convert(Dataset.from_list([row]), "hh_rlhf")
