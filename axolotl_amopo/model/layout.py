"""Where the tokens of a batch stand, and what each may see.

All the sequences of a pair, K prompts times two responses, share what comes before they differ:
the two responses of a prompt share that prompt, and the K prompts share their common beginning
(a system message, earlier turns, and the question where the instruction comes after it). So a
batch is a forest of segments, each continuing its parent:

    common beginning ─┬─ rest of prompt 0 ─┬─ chosen
                      │                    └─ rejected
                      └─ rest of prompt 1 ─┬─ chosen
                                           └─ rejected

In a group, all pairs of a prompt's N responses, the branches end in N responses instead of two.

A token sees its own segment up to itself and the segments on the way to the root, and its
position counts from the root; so it has the same hidden state as in a sequence of its own. The
forest can be laid out in three ways:

    packed     one row of all segments, no padding; needs an attention that knows the forest
    tree       a row per prompt (or per pair, where the pair shares most), under a 4D mask
    sequences  a row per response, nothing shared: for models that can't do the others
"""

import math
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from axolotl_amopo.data.tokenizer import PairTokens

LayoutName = Literal["packed", "tree", "sequences"]

# A shorter common beginning of the prompts saves less than the extra segment costs.
MIN_SHARED_BEGINNING = 16
# One row per pair instead of one per prompt where that saves this share of the tokens; below, the
# larger mask costs more than the tokens.
MIN_SAVED_BY_ONE_ROW = 0.25


class Leaf(NamedTuple):
    """A response's segment, and whose it is."""

    segment: int
    example: int
    prompt: int
    place: int  # among the example's responses under the prompt; of a pair 0 chosen, 1 rejected


@dataclass(frozen=True)
class Forest:
    """The segments of a batch of B examples under K prompts, parents before their children."""

    parents: list[int]  # -1 at a root
    lengths: list[int]  # tokens, at least one
    leaves: list[Leaf]
    examples: int  # B
    prompts: int  # K
    # [P, K, 2] the places of each pair's chosen and rejected response; None where every example is
    # one pair, whose places are 0 and 1.
    pairs: list[list[list[int]]] | None = None

    @property
    def longest_response(self) -> int:
        return max(self.lengths[leaf.segment] for leaf in self.leaves)

    @property
    def responses(self) -> int:
        """The most responses that an example has under a prompt."""
        return max(self.responses_by_example())

    def responses_by_example(self) -> list[int]:
        """[B] responses under the prompt that has most."""
        counts = [2] * self.examples
        for leaf in self.leaves:
            counts[leaf.example] = max(counts[leaf.example], leaf.place + 1)
        return counts

    def path(self, segment: int) -> list[int]:
        """Segments from the root to `segment`."""
        path = [segment]
        while (parent := self.parents[path[0]]) >= 0:
            path.insert(0, parent)
        return path

    def count(self, segments: list[int]) -> int:
        """Tokens of these segments."""
        return sum(self.lengths[segment] for segment in segments)


def plant(
    pairs: list[PairTokens], keep_PK: list[list[bool]], groups: list[int] | None = None
) -> tuple[Forest, list[int]]:
    """The forest of a batch, and its tokens, segment after segment.

    Args:
        pairs: P pairs.
        keep_PK: false where a prompt weighs nothing for a pair. Those sequences are left out; an
            example without any keeps its first prompt, so that no process is without work.
        groups: [P] the example that each pair belongs to, in order; by default one each. Pairs of
            an example share every response that they have in common under the same prompt.
    """
    parents: list[int] = []
    lengths: list[int] = []
    leaves: list[Leaf] = []
    tokens: list[int] = []
    places_PK2 = [[[0, 1] for _ in keep_K] for keep_K in keep_PK]

    def grow(parent: int, ids: list[int]) -> int:
        parents.append(parent)
        lengths.append(len(ids))
        tokens.extend(ids)
        return len(parents) - 1

    numbers = groups or list(range(len(pairs)))
    members: dict[int, list[int]] = {}
    for pair, example in enumerate(numbers):
        members.setdefault(example, []).append(pair)
    for example, group in members.items():
        kept = [(p, k) for p in group for k, keep in enumerate(keep_PK[p]) if keep]
        kept = kept or [(group[0], 0)]
        sequences = {p: pairs[p].sequences() for p in group}
        prompts = [sequences[p][2 * k + side][0] for p, k in kept for side in (0, 1)]
        # Every prompt keeps a token of its own, which predicts its responses' first tokens.
        beginning = commonprefix(prompts)  # noqa: RUF071, of token ids, not of paths
        shared = min(len(beginning), min(map(len, prompts)) - 1)
        root, begin = -1, 0
        if len({k for _, k in kept}) > 1 and shared >= MIN_SHARED_BEGINNING:
            root, begin = grow(-1, prompts[0][:shared]), shared
        segments: dict[Any, int] = {}  # of prompts
        places: dict[Any, int] = {}  # of responses
        counts = [0] * len(keep_PK[0])
        for p, k in kept:
            for side in (0, 1):
                ids, response = sequences[p][2 * k + side]
                key = (k, *ids)
                if key not in segments:
                    segments[key] = grow(root, ids[begin:])
                # Two responses of one pair are never one, whatever they say.
                leaf = (segments[key], *response) if len(group) > 1 else (k, side)
                if leaf not in places:
                    places[leaf] = counts[k]
                    leaves.append(Leaf(grow(segments[key], response), example, k, counts[k]))
                    counts[k] += 1
                places_PK2[p][k][side] = places[leaf]
    if len(members) == len(pairs):
        places_PK2 = None
    return Forest(parents, lengths, leaves, len(members), len(keep_PK[0]), places_PK2), tokens


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
    slots_M: Tensor  # its flat place in [B, K, N, T], N the forest's `responses`

    def to(self, device: torch.device | str) -> "Layout":
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return Layout(**vars(self) | moved)


def lay_out(forest: Forest, name: LayoutName, pad_to_multiple_of: int = 1) -> Layout:
    """Lay a forest out; `packed` is never padded."""
    rows = _rows(forest, name)
    multiple = 1 if name == "packed" else pad_to_multiple_of
    length = math.ceil(max(map(forest.count, rows)) / multiple) * multiple
    depth = max(map(len, rows))
    longest, responses = forest.longest_response, forest.responses

    tokens = torch.arange(sum(forest.lengths)).split(forest.lengths)
    leaves = {leaf.segment: leaf for leaf in forest.leaves}
    sees_RSS = torch.eye(depth + 1, dtype=torch.bool).repeat(len(rows), 1, 1)
    index: list[Tensor] = []
    places: list[Tensor] = []
    predict: list[Tensor] = []
    targets: list[Tensor] = []
    slots: list[Tensor] = []
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
                place = (leaf.example * forest.prompts + leaf.prompt) * responses + leaf.place
                slots.append(place * longest + torch.arange(end - start))

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
    )


def _rows(forest: Forest, name: LayoutName) -> list[list[int]]:
    """The segments of every row, a parent before its children."""
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
        one_row = sorted({segment for row in by_prompt.values() for segment in row})
        apart = sum(map(forest.count, by_prompt.values()))
        if forest.count(one_row) <= (1 - MIN_SAVED_BY_ONE_ROW) * apart:
            rows.append(one_row)
        else:
            rows += by_prompt.values()
    return rows
