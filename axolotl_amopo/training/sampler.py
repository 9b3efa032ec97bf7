"""The order of training: shuffled, and rows of similar length side by side where that is free."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from torch.utils.data import Sampler

from axolotl_amopo.data.examples import pairs_of

# Forward passes whose rows are sorted together with `group_by_length: true`; more would pad less
# and shuffle less.
GROUPED_PASSES = 50


class LengthGroupedSampler(Sampler[int]):
    """Every row once an epoch, rows of similar length in a forward pass.

    The rows are shuffled and cut into windows; the rows of a window are sorted by length, cut into
    passes, and the passes shuffled. With a window of one optimizer step, every step has the rows
    that plain shuffling gives it, and only which of them are padded together is chosen: the
    training is the same, and stays so when the micro batch size and accumulation trade places.
    The order depends on seed and epoch alone, so a resumed run goes on in it.

    Args:
        lengths: of the rows.
        pass_size: rows of a forward pass, on all processes together.
        window: passes in a window.
        seed: of the shuffling.
        epoch: tells the epoch that begins. (`set_epoch` would not do: accelerate's data loader
            calls it on samplers, but not on one that it wrapped to skip the batches of a resumed
            epoch on several processes.)
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        pass_size: int,
        window: int,
        seed: int,
        epoch: Callable[[], int],
    ):
        self.lengths = np.asarray(lengths)
        self.pass_size = pass_size
        self.window = window
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch()])
        order = random.permutation(len(self.lengths))
        for rows in np.split(order, range(0, len(order), self.window * self.pass_size)[1:]):
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            # Rows that don't fill a pass come last, drawn from all lengths.
            short = random.permutation(len(rows))[: len(rows) % self.pass_size]
            passes = np.delete(rows, short).reshape(-1, self.pass_size)
            yield from random.permutation(passes).flatten().tolist()
            yield from rows[short].tolist()


def row_lengths(dataset: Dataset) -> np.ndarray:
    """Return the tokens of every prepared row: its prompts once each, its responses under every
    prompt."""
    columns = dataset.select_columns(["prompt_ids", "response_ids", "follows"])
    lengths = [
        _sums(table["prompt_ids"])
        + _sums(table["response_ids"]) * (_items(table["follows"]) // _items(table["response_ids"]))
        for table in columns.with_format("arrow").iter(batch_size=10_000)
    ]
    return np.concatenate(lengths)


def row_items(dataset: Dataset, column: str) -> np.ndarray:
    """Return the items of every row in a column of lists."""
    tables = dataset.select_columns([column]).with_format("arrow").iter(batch_size=10_000)
    return np.concatenate([_items(table[column]) for table in tables])


def pairs_in(dataset: Dataset) -> int:
    """Return how many pairs the examples of a dataset have in all."""
    tables = dataset.select_columns(["comparisons"]).with_format("arrow").iter(batch_size=10_000)
    return sum(int(pairs_of(table["comparisons"]).sum()) for table in tables)


def _items(lists: pa.ChunkedArray) -> np.ndarray:
    """Return the items in each row of a column of lists."""
    return pc.list_value_length(lists).to_numpy()


def _sums(lists: pa.ChunkedArray) -> np.ndarray:
    """Return the items in each row of a column of lists of lists."""
    totals = np.concatenate([[0], _items(pc.list_flatten(lists)).cumsum()])
    ends = _items(lists).cumsum()
    return totals[ends] - totals[ends - _items(lists)]
