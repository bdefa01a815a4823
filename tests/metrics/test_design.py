"""Greedy designs against brute force."""

import itertools
import math

import pytest
import torch

from trl_ext.metrics.design import greedy_determinant, information_gain, k_centre


def random_vectors(rows, rank, width, seed=0):
    return torch.randn(rows, rank, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def half_log_determinant(vectors):
    flat = vectors.reshape(-1, vectors.shape[-1])
    return torch.logdet(torch.eye(flat.shape[1], dtype=flat.dtype) + flat.T @ flat).item() / 2


def test_the_gain_of_one_row_by_hand():
    vectors = torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]], [[3.0, 4.0]]])
    assert information_gain(vectors).tolist() == pytest.approx([math.log(5) / 2, 0.0, math.log(26) / 2])


@pytest.mark.parametrize("rank", [1, 3])
def test_each_step_takes_the_row_that_adds_most(rank):
    vectors = random_vectors(12, rank, 5)
    rows, gains = greedy_determinant(vectors, 8)
    assert len(set(rows)) == 8
    for step in range(8):
        before = half_log_determinant(vectors[rows[:step]]) if step else 0.0
        added = {
            row: half_log_determinant(vectors[[*rows[:step], row]]) - before
            for row in range(12)
            if row not in rows[:step]
        }
        assert gains[step] == pytest.approx(max(added.values()), abs=1e-9)
        assert added[rows[step]] == pytest.approx(gains[step], abs=1e-9)
    assert gains == sorted(gains, reverse=True)
    assert sum(gains) == pytest.approx(half_log_determinant(vectors[rows]))


def test_the_greedy_batch_is_close_to_the_best_one():
    vectors = random_vectors(10, 1, 4, seed=1)
    best = max(half_log_determinant(vectors[list(rows)]) for rows in itertools.combinations(range(10), 3))
    assert sum(greedy_determinant(vectors, 3)[1]) > 0.9 * best


def test_of_two_alike_the_second_comes_last():
    vectors = torch.tensor([[[2.0, 0.0]], [[2.0, 0.0]], [[0.0, 1.0]]])
    rows, gains = greedy_determinant(vectors, 3)
    assert rows == [0, 2, 1]
    assert gains[2] == pytest.approx(math.log(9 / 5) / 2)


def test_k_centre_ignores_which_completion_comes_first():
    directions = torch.tensor([[1.0, 0.0], [-3.0, 0.1], [0.0, 2.0], [1.0, 1.0]])
    assert k_centre(directions, 4) == [0, 2, 3, 1]
    assert k_centre(directions, 1, first=2) == [2]
