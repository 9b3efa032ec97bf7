"""Where the tokens of a batch stand, and what each may see.

A forest of segments can be laid out in three ways:

    packed     one row of all segments; needs an attention that knows the forest
    tree       a row per prompt (or per example, where that shares most), under a 4D mask
    sequences  a row per response, nothing shared: for models that can't do the others
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from axolotl_amopo.model.forest import Forest

LayoutName = Literal["packed", "tree", "sequences"]

# One row per example instead of one per prompt where that saves this share of the tokens, and the
# mask has no more than so many times the entries: all of them are computed.
MIN_SAVED_BY_ONE_ROW = 0.25
MAX_MASK_OF_ONE_ROW = 1.5


@dataclass
class Layout:
    """A forest laid out as R rows of L columns.

    M is the number of response tokens in the batch, T the most that one response has.
    """

    name: LayoutName
    forest: Forest
    index_RL: Tensor  # which of the forest's tokens stands there, -1 for padding
    segments_RL: Tensor  # the segment's place in its row, S for padding
    sees_RSS: Tensor  # [R, S + 1, S + 1] bool: whether a segment of the row sees another
    predict_M: Tensor  # flat place (row * L + column) of the token before each response token
    targets_M: Tensor  # which of the forest's tokens each response token is
    slots_S: Tensor  # flat places in [B, K, N, T] that the log-probabilities fill
    sources_S: Tensor  # which of the M fills each

    def to(self, device: torch.device | str) -> "Layout":
        """Return the layout with its tensors on a device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)


def lay_out(forest: Forest, name: LayoutName, pad_to_multiple_of: int = 1) -> Layout:
    """Return a forest laid out, its rows padded to a multiple of so many columns."""
    rows = _rows(forest, name)
    longest_row = max(map(forest.count, rows))
    length = math.ceil(longest_row / pad_to_multiple_of) * pad_to_multiple_of
    depth = max(map(len, rows))
    longest = forest.longest_response

    tokens = torch.arange(sum(forest.lengths)).split(forest.lengths)
    leaves = {leaf.segment: leaf for leaf in forest.leaves}
    sees_RSS = torch.eye(depth + 1, dtype=torch.bool).repeat(len(rows), 1, 1)
    index: list[Tensor] = []
    places: list[Tensor] = []
    predict: list[Tensor] = []
    targets: list[Tensor] = []
    slots: list[Tensor] = []
    sources: list[Tensor] = []
    made = 0
    for r, row in enumerate(rows):
        local = {segment: i for i, segment in enumerate(row)}
        starts = torch.tensor([0, *(forest.lengths[segment] for segment in row)]).cumsum(0).tolist()
        index.append(torch.cat([tokens[segment] for segment in row]))
        sizes = torch.tensor([forest.lengths[segment] for segment in row])
        places.append(torch.arange(len(row)).repeat_interleave(sizes))
        for segment in row:
            for ancestor in forest.path(segment):
                sees_RSS[r, local[segment], local[ancestor]] = True
            if leaf := leaves.get(segment):
                last_of_prompt = starts[local[forest.parents[segment]] + 1] - 1
                start, end = starts[local[segment]], starts[local[segment] + 1]
                before = torch.tensor([last_of_prompt, *range(start, end - 1)])
                predict.append(r * length + before)
                targets.append(tokens[segment])
                for prompt in leaf.prompts:
                    place = leaf.example * forest.prompts + prompt
                    place = place * forest.responses + leaf.response
                    slots.append(place * longest + torch.arange(end - start))
                    sources.append(torch.arange(made, made + end - start))
                made += end - start

    def padded(values: list[Tensor], fill: int) -> Tensor:
        filled = pad_sequence(values, batch_first=True, padding_value=fill)
        return torch.nn.functional.pad(filled, (0, length - filled.shape[1]), value=fill)

    return Layout(
        name,
        forest,
        padded(index, -1),
        padded(places, depth),
        sees_RSS,
        torch.cat(predict),
        torch.cat(targets),
        torch.cat(slots),
        torch.cat(sources),
    )


def _rows(forest: Forest, name: LayoutName) -> list[list[int]]:
    """Return the segments of every row, a parent before its children."""
    if name == "packed":
        return [list(range(len(forest.parents)))]
    if name == "sequences":
        return [forest.path(leaf.segment) for leaf in forest.leaves]
    rows = []
    for example in range(forest.examples):
        by_prompt: dict[int, list[int]] = {}
        for leaf in forest.leaves:
            if leaf.example == example:
                path = forest.path(leaf.segment)
                by_prompt.setdefault(path[-2], path[:-1]).append(leaf.segment)
        if not by_prompt:  # in another part of the batch
            continue
        one_row = sorted({segment for row in by_prompt.values() for segment in row})
        together, apart = forest.count(one_row), list(map(forest.count, by_prompt.values()))
        saves = together <= (1 - MIN_SAVED_BY_ONE_ROW) * sum(apart)
        # The rows of a batch are as long as its longest one.
        if saves and together**2 <= MAX_MASK_OF_ONE_ROW * len(apart) * max(apart) ** 2:
            rows.append(one_row)
        else:
            rows += by_prompt.values()
    return rows
