"""Rated pairs -> batches in which a response that several pairs of a prompt have runs once."""

import copy
import math

from axolotl_amopo.commands.score.data import RatedPairs
from axolotl_amopo.example import Example, Place


class Group:
    """Pairs of a prompt as one example, in which a response runs once behind each text."""

    def __init__(self) -> None:
        self.pairs: list[int] = []  # their numbers
        self.reads: list[list[int]] = []  # [P] per pair
        self.sides: list[Place] = []  # per pair, its two responses
        self.places: set[Place] = set()  # what runs
        self._signs: list[list[int]] = []
        self._texts: dict[tuple[int, ...], int] = {}
        self._responses: dict[tuple[int, ...], int] = {}
        self._follows: list[dict[int, int]] = []  # per prompt, the text that a response follows

    def add(self, number: int, pair: Example) -> None:
        """Add a pair to the group, under its number."""
        texts = [_place(self._texts, ids) for ids in pair.prompts]
        first, second = (_place(self._responses, ids) for ids in pair.responses)
        prompts = [self._prompt({first: texts[a], second: texts[b]}) for a, b in pair.follows]
        self.pairs.append(number)
        self.reads.append([prompts[k] for k in pair.reads[0]])
        self.sides.append((first, second))
        self.places |= {(texts[text], (first, second)[side]) for text, side in pair.places()}
        self._signs.append(pair.signs[0])

    def takes(self, pair: Example, most: int) -> bool:
        """Return whether the group has at most `most` sequences with a pair more."""
        larger = copy.deepcopy(self)
        larger.add(-1, pair)
        return len(larger.places) <= most

    @property
    def tokens(self) -> int:
        """Return the tokens of all sequences, one beside the other."""
        texts, responses = list(self._texts), list(self._responses)
        return sum(len(texts[text]) + len(responses[n]) for text, n in self.places)

    def _prompt(self, texts: dict[int, int]) -> int:
        """Return the prompt under which responses follow these texts, a new one if there is none.

        One that another pair has will do, where the two pairs want the same of it.
        """
        for number, others in enumerate(self._follows):
            if all(others.get(response, text) == text for response, text in texts.items()):
                others |= texts
                return number
        self._follows.append(texts)
        return len(self._follows) - 1

    def example(self) -> Example:
        """Return the pairs as comparisons of one example."""
        count, criteria = len(self._responses), len(self._signs[0])
        return Example(
            prompts=[list(ids) for ids in self._texts],
            responses=[list(ids) for ids in self._responses],
            follows=[[texts.get(n, 0) for n in range(count)] for texts in self._follows],
            comparisons=self.sides,
            reads=self.reads,
            signs=self._signs,
            ratings=[[math.nan] * criteria for _ in range(count)],
            points=[math.nan] * criteria,
        )


def _place(found: dict[tuple[int, ...], int], ids: list[int]) -> int:
    return found.setdefault(tuple(ids), len(found))


def batches(pairs: RatedPairs, batch_pairs: int) -> list[list[Group]]:
    """Return all pairs in groups of a prompt, and these in batches, the longest first.

    What doesn't fit into memory so fails at once.

    Args:
        pairs: to be scored.
        batch_pairs: a batch has at most as many sequences as the largest so many pairs have.
    """
    most = batch_pairs * max(len(example.places()) for example in pairs.examples)
    groups: list[Group] = []
    latest: dict[int, Group] = {}  # of a prompt
    for number, (prompt, example) in enumerate(zip(pairs.prompts, pairs.examples, strict=True)):
        if prompt not in latest or not latest[prompt].takes(example, most):
            groups.append(Group())
            latest[prompt] = groups[-1]
        latest[prompt].add(number, example)
    groups.sort(key=lambda group: -group.tokens)
    made: list[list[Group]] = []
    room = 0
    for group in groups:
        if len(group.places) > room:
            made.append([])
            room = most
        made[-1].append(group)
        room -= len(group.places)
    return made
