"""A training example: what a prepared row is, and what a batch is made of.

    Example(
        prompts=[[1, 5, 6], [1, 5, 7]],            # X = 2 texts, as token ids
        responses=[[8, 9, 2], [10, 2]],            # N = 2
        follows=[[0, 0], [1, 1]],                  # K = 2 prompts, each one text for both responses
        comparisons=[(0, 1)],                      # P = 1: the first response against the second
        reads=[[0, 1]],                            # criterion 0 reads it under prompt 0, 1 under 1
        signs=[[1, -1]],                           # C = 2: by the second one, the other wins
        ratings=[[0.75, 0.25], [0.5, 0.5]],
        points=[4.0, 4.0],
    )

Nothing is imported here, so that every layer may know it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import batched
from math import nan
from typing import Any, Self

#: A text and a response, by their places in `Example.prompts` and `Example.responses`.
Place = tuple[int, int]


@dataclass
class Example:
    """K prompts, N responses, and P comparisons of two of them, judged by C criteria.

    A prompt is what a criterion reads a comparison under. It is one text, or, where it states a
    response's own rating (`rating_in_prompt: own`), a text per response.
    """

    prompts: list[list[int]]  # [X] token ids of the different texts
    responses: list[list[int]]  # [N] token ids, each response once
    follows: list[list[int]]  # [K][N] which of the texts a response follows under a prompt
    comparisons: list[Place]  # [P] two responses, the overall winner first; or one with itself
    reads: list[list[int]]  # [P][C] the prompt under which a criterion reads a comparison
    signs: list[list[int]]  # [P][C] +1 the first response wins, -1 the second, 0 says nothing
    ratings: list[list[float]]  # [N][C] on 0 to 1, 1 the better end; NaN where missing
    points: list[float]  # [C] the width of each criterion's scale
    weights: list[float] = field(default_factory=list)  # [C] of the criteria, or none
    # [K][N] how near a response's ratings are to what a prompt asks for; NaN where it is not known
    fit: list[list[float]] = field(default_factory=list)
    id: int = 0  # seeds the example's draws

    @property
    def criteria(self) -> int:
        """Return C."""
        return len(self.points)

    def winner_first(self, comparison: int, criterion: int) -> list[Place]:
        """Return text and response of the winner, then of the loser."""
        first, second = self.comparisons[comparison]
        if self.signs[comparison][criterion] < 0:
            first, second = second, first
        texts = self.follows[self.reads[comparison][criterion]]
        return [(texts[first], first), (texts[second], second)]

    def places(self, *, silent: bool = False) -> list[Place]:
        """Return each text with each response that a criterion reads behind it, once.

        A comparison of a response with itself says nothing, and is there so that it is read.

        Args:
            silent: also what only criteria read that say nothing. Without it, an example in which
                no criterion says anything keeps what its first one reads, so that it can run.
        """
        found: dict[Place, None] = {}
        for p, (first, second) in enumerate(self.comparisons):
            for c, sign in enumerate(self.signs[p]):
                if sign or silent or first == second:
                    found |= dict.fromkeys(self.winner_first(p, c))
        return list(found or self.winner_first(0, 0))

    def only(self, kept: Sequence[int]) -> Self:
        """Return the example with some of its responses, and the comparisons between them."""
        places = {response: place for place, response in enumerate(kept)}
        among = [p for p, both in enumerate(self.comparisons) if places.keys() >= set(both)]
        return replace(
            self,
            responses=[self.responses[n] for n in kept],
            follows=[[texts[n] for n in kept] for texts in self.follows],
            comparisons=[(places[a], places[b]) for a, b in (self.comparisons[p] for p in among)],
            reads=[self.reads[p] for p in among],
            signs=[self.signs[p] for p in among],
            ratings=[self.ratings[n] for n in kept],
            fit=[[fits[n] for n in kept] for fits in self.fit],
        )

    def longest(self) -> tuple[list[int], list[int]]:
        """Return prompt and response of the sequence with the most tokens."""
        pairs = (
            (self.prompts[text], self.responses[response])
            for text, response in self.places(silent=True)
        )
        return max(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))

    def to_row(self) -> dict[str, Any]:
        """Return the columns of a prepared row.

        `input_ids`, `labels` and `attention_mask` are those of the longest sequence: axolotl's
        handling of lengths and its token statistics read them.
        """
        prompt, response = self.longest()
        return {
            "input_ids": prompt + response,
            "labels": [-100] * len(prompt) + response,
            "attention_mask": [1] * (len(prompt) + len(response)),
            "prompt_ids": self.prompts,
            "response_ids": self.responses,
            "follows": flat(self.follows),
            "comparisons": flat(self.comparisons),
            "reads": flat(self.reads),
            "signs": flat(self.signs),
            "ratings": flat(self.ratings),
            "points": self.points,
            "weights": self.weights,
            "fit": flat(self.fit),
            "example_id": self.id,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Return the example that `to_row` made the row of."""
        responses, criteria = len(row["response_ids"]), len(row["points"])

        def rows(column: str, width: int) -> list[list]:
            return [list(part) for part in batched(row[column], width)]

        return cls(
            prompts=row["prompt_ids"],
            responses=row["response_ids"],
            follows=rows("follows", responses),
            comparisons=[(a, b) for a, b in rows("comparisons", 2)],
            reads=rows("reads", criteria),
            signs=rows("signs", criteria),
            ratings=rows("ratings", criteria),
            points=list(row["points"]),
            weights=list(row["weights"]),
            fit=rows("fit", responses),
            id=row["example_id"],
        )


def pair(prompts: list[list[int]], responses: list[list[int]], *, id: int = 0) -> Example:
    """Return the example of a pair under K prompts, each of which a criterion of its own reads.

    The first response is the better one everywhere; nothing is rated.
    """
    places = range(len(prompts))
    return Example(
        prompts=prompts,
        responses=responses,
        follows=[[k, k] for k in places],
        comparisons=[(0, 1)],
        reads=[list(places)],
        signs=[[1 for _ in places]],
        ratings=[[nan for _ in places] for _ in responses],
        points=[nan for _ in places],
        id=id,
    )


def flat(rows: Iterable[Iterable]) -> list:
    """Return the items of all rows, one row after the other."""
    return [item for row in rows for item in row]
