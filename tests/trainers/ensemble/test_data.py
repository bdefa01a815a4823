"""Who trains on which row: orders, weights and shares, without a model."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader, skip_first_batches
from datasets import Dataset

from trl_ext.data.collators import GroupCollator
from trl_ext.metrics.disagreement import error_by_decile
from trl_ext.trainers.ensemble.config import RewardEnsembleConfig
from trl_ext.trainers.ensemble.data import MemberCollator, MemberRows, MemberSampler, RowWeights, member_dataloader


ROWS = torch.arange(6000)


@pytest.mark.parametrize("epoch", [0, 3])
def test_orders_are_those_of_accelerate(epoch):
    sampler = MemberSampler(11, [5, 9])
    sampler.set_epoch(epoch)
    for own, seed in zip(zip(*sampler, strict=True), (5, 9), strict=True):
        theirs = SeedableRandomSampler(range(11), data_seed=seed)
        theirs.set_epoch(epoch)
        assert list(own) == list(theirs)


def test_two_processes_go_on_in_the_right_epoch_after_a_resume(tmp_path):
    """As Accelerate prepares the loader in each of two processes, and as Trainer skips and sets epochs."""
    columns = {"candidate_ids": [[[1], [2]]] * 16, "candidate_ratings": [[1.0, 0.0]] * 16, "row_index": range(16)}

    def loader(process):
        trainer = SimpleNamespace(
            args=RewardEnsembleConfig(str(tmp_path), use_cpu=True, bf16=False),
            train_dataset=Dataset.from_dict({name: list(values) for name, values in columns.items()}),
            data_collator=GroupCollator(0),
            get_total_train_batch_size=lambda args: 2,
            accelerator=SimpleNamespace(
                prepare=partial(
                    prepare_data_loader,
                    num_processes=2,
                    process_index=process,
                    put_on_device=False,
                    use_seedable_sampler=True,
                )
            ),
        )
        return member_dataloader(trainer, [*columns], [5, 9])

    def rows(batches, epoch):
        batches.set_epoch(epoch)
        return [batch["row_index"].tolist() for batch in batches]

    orders = [[rows(loader(process), epoch) for process in (0, 1)] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    for epoch in (0, 1):
        for process in (0, 1):
            assert rows(skip_first_batches(loader(process), 2), epoch) == orders[epoch][process][2:]


def test_bootstrap_weights_are_poisson_and_independent():
    weights = RowWeights("bootstrap", [1, 2, 3], 0)(ROWS)
    assert weights.shape == (3, 6000) and weights.dtype == torch.float32
    assert (weights.mean(1) - 1).abs().max() < 0.05 and (weights.var(1) - 1).abs().max() < 0.1
    assert ((weights == 0).float().mean(1) - 0.3679).abs().max() < 0.03
    assert torch.corrcoef(weights).triu(1).abs().max() < 0.05
    # a function of row and seed, whatever comes with it
    assert torch.equal(RowWeights("bootstrap", [3, 7], 0)(torch.tensor([40, 2]))[0], weights[2, [40, 2]])


def test_every_row_is_in_one_fold():
    weights = RowWeights("kfold", [1, 2, 3, 4], 0)(ROWS)
    assert torch.equal(weights.sum(0), torch.full((6000,), 3.0))
    assert ((1 - weights).mean(1) - 0.25).abs().max() < 0.03
    assert not torch.equal(weights, RowWeights("kfold", [1, 2, 3, 4], 1)(ROWS))


def test_a_column_says_who():
    weights = RowWeights("column:who", [0, 1], 0)
    weights.read_column(Dataset.from_dict({"who": [["a"], ["b"], ["a", "b"], None]}), "train")
    assert weights(torch.arange(4)).tolist() == [[1, 0, 1, 1], [0, 1, 1, 1]]
    weights.read_column(Dataset.from_dict({"who": [True, False], "row_index": [5, 2]}), "train")  # prepared before
    assert weights(torch.tensor([2, 5])).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("flat", [False, True])
def test_batches_are_member_major_and_know_their_shares(flat):
    prompt = [5] * 6
    rows = [
        {"candidate_ids": [prompt + [n] * (k + 1) for k in range(2 + n % 2)], "candidate_ratings": [1.0] * (2 + n % 2)}
        | {"row_index": n}
        for n in range(4)
    ]
    items = MemberRows(Dataset.from_list(rows)).__getitems__([(3, 0), (1, 2)])
    batch = MemberCollator(GroupCollator(0, shared_prefix=flat))(items)
    assert batch["row_index"].tolist() == [3, 1, 0, 2]
    assert ("prefix_layout" in batch) == flat
    # member 0 has two groups of three, member 1 two of two
    assert batch["member_shares"] == ([2 * (6 + 1 + 2 + 3), 2 * (6 + 1 + 2)] if flat else [6, 4])
    total = batch["prefix_layout"].num_tokens if flat else len(batch["input_ids"])
    assert sum(batch["member_shares"]) == total


def test_errors_by_decile_of_disagreement():
    groups = [(float(n), float(n >= 15)) for n in range(20)] + [(99.0, float("nan"))]
    rows = error_by_decile(groups)
    assert [row[0] for row in rows] == list(range(1, 11)) and {row[1] for row in rows} == {2}
    assert rows[0][2:] == [0.5, 0.0] and rows[7][2:] == [14.5, 0.5] and rows[9][2:] == [18.5, 1.0]
    assert error_by_decile([]) == []
