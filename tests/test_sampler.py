"""The order of training: every row once, the same optimizer steps however they are cut."""

import numpy as np
import pytest
from datasets import Dataset

from axolotl_amopo.training.sampler import GROUPED_PASSES, LengthGroupedSampler, row_lengths

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


def test_row_lengths():
    rows = {
        "prompt_ids": [[[1, 2], [3]], [[1, 2, 3, 4], [5] * 9]],
        "response_ids": [[[7], [8, 9]], [[1] * 5, [2] * 6]],
        "winners": [[0, 1], [0, 0]],
        "input_ids": [[0]] * 2,
    }
    dataset = Dataset.from_dict(rows)
    assert row_lengths(dataset).tolist() == [3 + 2 * 3, 13 + 2 * 11]
    # As after axolotl's split: behind an indices mapping, out of order.
    assert row_lengths(dataset.select([1, 0, 1])).tolist() == [35, 9, 35]
