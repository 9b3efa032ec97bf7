"""The order of training: every row once, the same optimizer steps however they are cut."""

from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset

from axolotl_amopo.example import pair
from axolotl_amopo.training.sampler import (
    GROUPED_PASSES,
    LengthGroupedSampler,
    pairs_in,
    row_lengths,
)

LENGTHS = np.random.default_rng(0).integers(10, 1000, 203)


def order(pass_size=2, window=4, seed=1, epoch=0, lengths=LENGTHS):
    return list(LengthGroupedSampler(lengths, pass_size, window, seed, lambda: epoch))


@pytest.mark.parametrize("pass_size", [1, 2, 8, 300])
@pytest.mark.parametrize("window", [1, 4, GROUPED_PASSES])
def test_every_row_once(pass_size, window):
    assert sorted(order(pass_size, window)) == list(range(len(LENGTHS)))


def test_order_depends_on_seed_and_epoch_alone():
    assert order() == order()
    assert len({tuple(order(seed=seed, epoch=epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_a_steps_rows_do_not_depend_on_how_it_is_cut():
    """8 rows a step: one pass of 8, two of 4, ..."""

    def steps(pass_size, window):
        rows = order(pass_size, window)
        return [set(rows[i : i + 8]) for i in range(0, len(rows), 8)]

    assert steps(8, 1) == steps(4, 2) == steps(2, 4) == steps(1, 8)


def padding(rows, pass_size):
    passes = [LENGTHS[rows[i : i + pass_size]] for i in range(0, len(rows), pass_size)]
    run = sum(len(lengths) * lengths.max() for lengths in passes)
    return run / LENGTHS.sum() - 1


def test_rows_of_a_pass_are_alike():
    shuffled, in_a_step, grouped = (
        padding(order(4, window), 4) for window in (1, 8, GROUPED_PASSES)
    )
    assert in_a_step < 0.5 * shuffled
    assert grouped < 0.25 * shuffled


def test_passes_are_not_in_order_of_length():
    rows = order(4, GROUPED_PASSES)
    longest = [LENGTHS[rows[i : i + 4]].max() for i in range(0, 200, 4)]
    assert abs(np.corrcoef(longest, range(50))[0, 1]) < 0.4


@pytest.fixture(scope="module")
def prepared():
    """Two pairs under two prompts each, one under a text per response, a group under one prompt."""
    own = replace(pair([[1] * 5], [[2] * 3, [3] * 4]), prompts=[[1] * 5, [1] * 6], follows=[[0, 1]])
    group = replace(
        pair([[5] * 10], [[1] * 2, [2] * 3, [3] * 4]),
        follows=[[0, 0, 0]],
        comparisons=[(0, 1), (2, 0)],
        reads=[[0], [0]],
        signs=[[1], [-1]],
    )
    two = [
        pair([[1, 2], [3]], [[7], [8, 9]]),
        pair([[1, 2, 3, 4], [5] * 9], [[1] * 5, [2] * 6]),
    ]
    return Dataset.from_list([example.to_row() for example in [*two, own, group]])


def test_row_lengths(prepared):
    expected = [3 + 2 * 3, 13 + 2 * 11, 11 + 7, 10 + 9]
    assert row_lengths(prepared).tolist() == expected
    # As after axolotl's split: behind an indices mapping, out of order.
    order = [3, 1, 0, 1]
    assert row_lengths(prepared.select(order)).tolist() == [expected[i] for i in order]


def test_pairs_are_counted(prepared):
    assert pairs_in(prepared) == 1 + 1 + 1 + 2
    assert pairs_in(prepared.select([3, 0])) == 3


def test_a_response_alone_is_no_pair():
    alone = replace(pair([[5] * 10], [[1] * 2]), follows=[[0]], comparisons=[(0, 0)])
    two = replace(
        pair([[5] * 10], [[1] * 2, [2] * 3]),
        comparisons=[(0, 1), (0, 0), (1, 1)],
        reads=[[0]] * 3,
        signs=[[1], [0], [0]],
    )
    rows = Dataset.from_list([example.to_row() for example in [alone, two, alone]])
    assert pairs_in(rows) == 1
