"""What a loss declares about itself decides which data it gets; what it does not declare is read strictly."""

import functools

import pytest
from datasets import Dataset, IterableDataset

from tests.tiny import pair_rows, ranked_rows
from tests.trainers.helpers import config, trainer_for
from trl_ext.data.validation import DataError
from trl_ext.losses import bce, bradley_terry, listnet, mse, pairwise, ranking_losses, token_losses
from trl_ext.trainers.ranking.objective import RankingObjective, loss_name
from trl_ext.trainers.token.objective import TokenObjective


def by_distance(scores, ratings, mask, *, margin=None, target=None):
    return ((scores - ratings) * mask).square().sum(-1)


class Plugin:
    """An installed entry point, as importlib gives it."""

    name, value = "by_distance", "somewhere:by_distance"
    dist = type("Distribution", (), {"name": "my-package", "version": "1.0"})

    def __init__(self, loss):
        self.load = lambda: loss


def test_a_plugin_that_uses_distances_refuses_ranks_and_one_that_declares_otherwise_takes_them(
    base, tmp_path, monkeypatch
):
    rows = ranked_rows(4, ranks=True)
    monkeypatch.setattr(
        ranking_losses, "_plugins", lambda: [Plugin(ranking_losses.declare(max_candidates=None)(by_distance))]
    )
    args = config(tmp_path, loss_type="by_distance")
    with pytest.raises(DataError, match="column 'ranks'.*uses_distances=False"):
        trainer_for(base, args, rows)
    trainer_for(base, args, ranked_rows(4))

    @ranking_losses.declare(uses_distances=False, max_candidates=None)
    def by_order(scores, ratings, mask, *, margin=None, target=None):
        return pairwise(scores, ratings, mask)

    monkeypatch.setattr(ranking_losses, "_loaded", {})
    monkeypatch.setattr(ranking_losses, "_plugins", lambda: [Plugin(by_order)])
    trainer_for(base, args, rows)


def test_an_undeclared_loss_is_refused_what_it_does_not_declare(base, tmp_path):
    def plain(scores, ratings, mask, *, margin=None, target=None):
        return (scores[:, 0] - scores[:, 1]).square()  # ignores a third candidate, margin and target

    args = config(tmp_path, loss_type=plain)
    trainer_for(base, args, pair_rows(4))
    with pytest.raises(DataError, match="column 'completions': found 4 candidates.*max_candidates=None"):
        trainer_for(base, args, ranked_rows(4, k=4))
    with pytest.raises(DataError, match="column 'margin'.*does not declare takes_margin=True"):
        trainer_for(base, args, [{**row, "margin": 0.5} for row in pair_rows(4)])
    with pytest.raises(DataError, match="column 'preference_probability'.*does not declare takes_target=True"):
        trainer_for(base, args, [{**row, "preference_probability": 0.5} for row in pair_rows(4)])
    stream = trainer_for(base, args, Dataset.from_list(ranked_rows(4, k=4)).to_iterable_dataset())
    with pytest.raises(ValueError, match="compares 2 candidates, found 4"):
        stream.train()


@pytest.mark.parametrize(
    ("loss", "kwargs", "needs"),
    [
        ("plackett_luce", {}, False),
        ("listnet", {}, True),
        ("pairwise", {}, False),
        ("pairwise", {"margin_from_ratings": True}, True),
        (functools.partial(listnet, temperature=0.5), {}, True),
        (functools.partial(bradley_terry, margin_from_ratings=True), {}, True),
        (functools.partial(bradley_terry, margin_from_ratings=True), {"margin_from_ratings": False}, False),
        (by_distance, {}, True),
    ],
)
def test_which_losses_need_distances(loss, kwargs, needs):
    assert RankingObjective(loss, kwargs).needs_ratings is needs


def test_a_switch_that_the_loss_does_not_have_is_refused():
    @ranking_losses.declare(uses_distances="widht")
    def loss(scores, ratings, mask, *, width=False):
        return scores[:, 0]

    with pytest.raises(ValueError, match=r"uses_distances='widht'.*one of \['width'\]"):
        RankingObjective(loss)


def token_objective(loss, outputs=1):
    return TokenObjective(loss, None, None, "token", categories=1, outputs=outputs)


def test_what_an_output_is_comes_from_what_the_loss_declares():
    own = token_losses.declare(outputs="log_odds", labels="probability")(lambda *given, **more: bce(*given, **more))
    for loss in (bce, "bce", functools.partial(bce), own):
        objective = token_objective(loss)
        assert objective.calibrated and objective.meaning == "log-odds of right" and objective.threshold == 0.0
    assert token_objective(functools.partial(mse)).is_number
    assert token_objective("ce", 3).meaning == "class logits: -1, 0, 1"
    undeclared = token_objective(lambda *given, **more: bce(*given, **more))
    assert not undeclared.calibrated and not undeclared.is_number and "trained with the loss" in undeclared.meaning


def test_labels_are_checked_as_the_loss_declares():
    own = token_losses.declare(outputs="log_odds", labels="probability")(lambda *given, **more: bce(*given, **more))
    rows = Dataset.from_list([{"label_values": [0.5, 1.0], "row_index": 0}, {"label_values": [2.0], "row_index": 7}])
    for loss in (own, functools.partial(bce)):
        with pytest.raises(DataError, match=r"row 7, column 'label'.*label 2.*\[0, 1\]"):
            token_objective(loss).check_data(rows, "train", "label")
    token_objective("mse").check_data(rows, "train", "label")


def test_the_name_of_a_partial_tells_its_arguments():
    assert loss_name(functools.partial(listnet, temperature=0.5)) == "trl_ext.losses.ranking.listnet(temperature=0.5)"


def test_a_stream_has_the_checks_of_a_data_set(base, tmp_path):
    pairs = pair_rows(4)
    margins = [{**row, "margin": 0.5} for row in pairs]
    cases = [
        (dict(loss_type="pairwise", loss_kwargs={"margin_from_ratings": True}), pairs, "pairs without ratings"),
        (dict(loss_type="rao_kupper", loss_kwargs={"good_from": 0.5}), pairs, "pairs without ratings"),
        (dict(loss_type="plackett_luce"), margins, "column 'margin'"),
        (dict(label_smoothing_factor=0.1), margins, "a margin beside label_smoothing_factor"),
    ]
    for arguments, rows, words in cases:
        listed = Dataset.from_list(rows)
        unknown = IterableDataset.from_generator(lambda rows=rows: iter(rows))
        for data in (listed, listed.to_iterable_dataset(), unknown):
            with pytest.raises(DataError, match=words):
                trainer_for(base, config(tmp_path, **arguments), data)
