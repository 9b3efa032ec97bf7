"""Which tokens of a batch continue which others.

All the sequences of an example, its prompts times its responses, share what comes before they
differ: the responses to a prompt share that prompt, and the prompts share their common beginning
(a system message, earlier turns, and the question where the instruction comes after it). So a
batch is a forest of segments, each continuing its parent:

    common beginning ─┬─ rest of prompt 0 ─┬─ response 0
                      │                    └─ response 1
                      └─ rest of prompt 1 ─┬─ response 0
                                           └─ response 1

A token sees its own segment up to itself and the segments on the way to the root, and its
position counts from the root; so it has the same hidden state as in a sequence of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import NamedTuple

from axolotl_amopo.example import Example

# A shorter common beginning of the prompts saves less than the extra segment costs.
MIN_SHARED_BEGINNING = 16


class Leaf(NamedTuple):
    """A response's segment, and who reads it."""

    segment: int
    example: int
    response: int
    prompts: tuple[int, ...]  # those whose text it follows; several where their texts are equal


@dataclass
class Forest:
    """The segments of a batch, parents before their children."""

    examples: int  # B
    prompts: int  # K, the most that an example has
    responses: int  # N, the most that an example has
    parents: list[int] = field(default_factory=list)  # -1 at a root
    lengths: list[int] = field(default_factory=list)  # tokens, at least one
    leaves: list[Leaf] = field(default_factory=list)
    longest_response: int = 0  # T, the tokens of the longest response

    @classmethod
    def of(cls, examples: Sequence[Example]) -> tuple["Forest", list[int]]:
        """Return the forest of a batch, and its tokens, segment after segment.

        What no criterion reads is left out. An example in which none says anything keeps a prompt,
        so that no process is without work.
        """
        forest = cls(
            len(examples),
            max(len(example.follows) for example in examples),
            max(len(example.responses) for example in examples),
        )
        tokens: list[int] = []
        for number, example in enumerate(examples):
            forest._add(number, example, tokens)
        forest.longest_response = max(forest.lengths[leaf.segment] for leaf in forest.leaves)
        return forest, tokens

    def _add(self, number: int, example: Example, tokens: list[int]) -> None:
        def add_segment(parent: int, ids: list[int]) -> int:
            self.parents.append(parent)
            self.lengths.append(len(ids))
            tokens.extend(ids)
            return len(self.parents) - 1

        places = example.places()
        texts = [example.prompts[text] for text in dict.fromkeys(text for text, _ in places)]
        # Every prompt keeps a token of its own, which predicts its responses' first tokens.
        beginning = commonprefix(texts)  # noqa: RUF071, of token ids, not of paths
        shared = min(len(beginning), min(map(len, texts)) - 1)
        root, begin = -1, 0
        if len(texts) > 1 and shared >= MIN_SHARED_BEGINNING:
            root, begin = add_segment(-1, texts[0][:shared]), shared
        segments: dict[int, int] = {}  # by text
        for text, response in places:
            if text not in segments:
                segments[text] = add_segment(root, example.prompts[text][begin:])
            segment = add_segment(segments[text], example.responses[response])
            prompts = (k for k, texts in enumerate(example.follows) if texts[response] == text)
            self.leaves.append(Leaf(segment, number, response, tuple(prompts)))

    def path(self, segment: int) -> list[int]:
        """Return the segments from the root to `segment`."""
        path = [segment]
        while (parent := self.parents[path[0]]) >= 0:
            path.insert(0, parent)
        return path

    def count(self, segments: list[int]) -> int:
        """Return how many tokens these segments have."""
        return sum(self.lengths[segment] for segment in segments)
