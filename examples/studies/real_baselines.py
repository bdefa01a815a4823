"""The baselines of `real_data.py`: linear models on what the reward models have to beat.

Each gives every item of a test row a score, after a logistic regression on the training rows of the fold: on
differences of a row's candidates where these are ranked (Bradley-Terry with a linear score), else on the items. What
they read: the length of an item, its position, how likely the untrained model finds it, its n-grams, all of these
together, and the hidden states of the untrained model at the item (frozen features). The strength of the
regularisation is chosen by cross-validation, by group.
"""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from real_sets import Row, StudySet
from scipy import sparse
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler
from tools import ngrams
from transformers import AutoModelForCausalLM, AutoTokenizer


TOKENS = 2048  # of a batch in the pass of the untrained model
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # inverse; of the regularisation
RECIPE = {"version": 2, "strengths": STRENGTHS, "n-grams": repr(ngrams()), "scikit-learn": sklearn.__version__}
STATES, TOGETHER = "hidden states", "all but the states"


def item_texts(row: Row) -> list[str]:
    return [row.texts[0][start:end] for start, end in row.spans] if row.spans else row.texts


def positions(row: Row, study: StudySet) -> list[float]:
    """The number of a step, or the first character of a segment."""
    return [float(start) for start, _ in row.spans] if row.spans else list(map(float, range(len(row.texts))))


def whole_texts(row: Row, study: StudySet) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """The texts that a model reads, and where their items are, in characters."""
    if study.kind == "steps":
        text, spans = row.prompt, []
        for step in row.texts:
            spans.append((len(text), len(text) + len(step)))
            text += step + "\n"
        yield text, spans
    elif study.kind == "segments":
        yield row.prompt + row.texts[0], [(len(row.prompt) + a, len(row.prompt) + b) for a, b in row.spans]
    else:
        for text in row.texts:
            yield row.prompt + text, [(len(row.prompt), len(row.prompt) + len(text))]


@torch.no_grad()
def untrained(rows: list[Row], study: StudySet, model: str, device: str) -> dict[str, np.ndarray]:
    """
    What the language model itself says of each item, in the order of the rows.

    Returns:
        `dict`: `states` (N, H), the means of the last hidden states over an item's tokens, and `likelihoods` (N, 2),
            the mean and the sum of the log-likelihoods of these tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device).eval()
    texts = [text for row in rows for text in whole_texts(row, study)]
    first_item = np.cumsum([0, *(len(spans) for _, spans in texts)])
    coded = tokenizer([text for text, _ in texts], return_offsets_mapping=True)
    states = np.zeros((first_item[-1], network.config.hidden_size), np.float32)
    likelihoods = np.zeros((first_item[-1], 2), np.float32)
    order = sorted(range(len(texts)), key=lambda n: len(coded["input_ids"][n]))
    while order:
        longest, batch = len(coded["input_ids"][order[-1]]), []
        while order and (len(batch) + 1) * longest <= max(TOKENS, longest):
            batch.append(order.pop())
        ids = [torch.tensor(coded["input_ids"][n]) for n in batch]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id or 0)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(own) for own in ids], batch_first=True)
        hidden = network.model(padded.to(device), attention_mask=mask.to(device)).last_hidden_state
        for place, n in enumerate(batch):
            for number, (start, end) in enumerate(texts[n][1]):
                own = [t for t, (a, b) in enumerate(coded["offset_mapping"][n]) if t and a < end and b > start]
                if not own:
                    continue  # nothing to read: zeros
                logits = network.lm_head(hidden[place, [t - 1 for t in own]]).float()
                said = logits.log_softmax(-1).gather(1, padded[place, own].to(device)[:, None])
                states[first_item[n] + number] = hidden[place, own].float().mean(0).cpu().numpy()
                likelihoods[first_item[n] + number] = said.mean().item(), said.sum().item()
    return {"states": states, "likelihoods": likelihoods}


def baselines(
    rows: list[Row], study: StudySet, features: Path, training: list[int], test: list[int]
) -> dict[str, list[list[float]]]:
    """
    The scores of the test rows' items by each baseline.

    Args:
        rows (`list[Row]`): all rows.
        features (`Path`): the file with what [`untrained`] found for them.
        training, test (`list[int]`): numbers of rows.
    """
    known = np.load(features)
    vectors = ngrams().fit([text for n in training for text in item_texts(rows[n])])
    numbers = {"length": column([float(len(text)) for row in rows for text in item_texts(row)])}
    if study.measure == "auc":
        numbers["position"] = column([place for row in rows for place in positions(row, study)])
    numbers["likelihood"] = known["likelihoods"]
    first = np.cumsum([0, *(len(row.labels) for row in rows)])
    fitted = [place for n in training for place in range(first[n], first[n + 1])]
    scaled = {
        name: StandardScaler().fit(view[fitted]).transform(view)
        for name, view in {**numbers, STATES: known["states"]}.items()
    }
    views: dict[str, Any] = {name: scaled[name] for name in numbers}
    views["n-grams"] = vectors.transform([text for row in rows for text in item_texts(row)])
    parts = [sparse.csr_matrix(views[name]) for name in numbers]
    views[TOGETHER] = sparse.hstack([*parts, views["n-grams"]], format="csr")
    views[STATES] = scaled[STATES]
    return {name: by_line(rows, study, view, first, name == STATES, training, test) for name, view in views.items()}


def column(values: list[float]) -> np.ndarray:
    return np.array(values)[:, None]


def by_line(
    rows: list[Row],
    study: StudySet,
    view: Any,
    first: np.ndarray,
    one_line: bool,
    training: list[int],
    test: list[int],
) -> list[list[float]]:
    """
    Scores of a linear model on a view (items, features).

    Args:
        first (`np.ndarray`): the place of each row's first item.
        one_line (`bool`): one model for all strata, and not one for each.
    """
    scores: dict[int, list[float]] = {}
    for stratum in {"" if one_line else rows[n].stratum for n in test}:
        inside = [n for n in training if one_line or rows[n].stratum == stratum]
        if study.measure == "auc" and len({label for n in inside for label in rows[n].labels}) < 2:
            inside = training  # too few rows of this stratum to learn from
        inputs, labels, groups = examples(rows, study, view, first, inside)
        splits = list(GroupKFold(3).split(inputs, labels, groups)) if len(set(groups)) > 2 else []
        common = {"fit_intercept": study.measure == "auc", "max_iter": 500}
        if splits and all(len({labels[n] for n in side}) == 2 for split in splits for side in split):
            model = LogisticRegressionCV(
                Cs=STRENGTHS,
                cv=splits,
                l1_ratios=(0.0,),
                scoring="neg_log_loss",
                use_legacy_attributes=False,
                **common,
            )
        else:
            model = LogisticRegression(**common)
        model.fit(inputs, labels)
        weights = model.coef_[0]
        for n in test:
            if one_line or rows[n].stratum == stratum:
                scores[n] = np.asarray(view[first[n] : first[n + 1]] @ weights).ravel().tolist()
    return [scores[n] for n in test]


def examples(
    rows: list[Row], study: StudySet, view: Any, first: np.ndarray, inside: list[int]
) -> tuple[Any, list[int], list[str]]:
    """
    What the regression reads, with labels and groups: the items, or, where a row's items are compared, their
    differences, every other one turned round.
    """
    if study.measure == "auc":
        places = [place for n in inside for place in range(first[n], first[n + 1])]
        groups = [rows[n].group for n in inside for _ in rows[n].labels]
        return view[places], [int(label) for n in inside for label in rows[n].labels], groups
    better, worse, groups = [], [], []
    for n in inside:
        labels = rows[n].labels
        for a, b in combinations(range(len(labels)), 2):
            if labels[a] != labels[b]:
                a, b = (a, b) if labels[a] > labels[b] else (b, a)
                better.append(first[n] + a)
                worse.append(first[n] + b)
                groups.append(rows[n].group)
    sign = np.where(np.arange(len(better)) % 2, 1, -1)
    differences = view[better] - view[worse]
    turned = differences.multiply(sign[:, None]).tocsr() if sparse.issparse(view) else differences * sign[:, None]
    return turned, sign.tolist(), groups
