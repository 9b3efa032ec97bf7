"""Rated responses -> preference pairs, by the rule that docs/data.md states.

A response's overall rating (`amopo.order_by`) is the mean of its ratings over the configured
dimensions, each first brought to 0..1 by its scale, 1 being the better end; or one dimension's; or
the dataset's own. Where the data itself names a winner (`amopo.pairs`), that one is the overall
winner, whatever the ratings say, unless `order_by` says otherwise.

`winner: overall`: the response with the higher overall rating wins under every prompt; pairs with
equal ones are dropped. `winner: per_dimension`: each dimension's own ratings pick its winner,
dimensions where they are equal weigh nothing, as does the overall prompt where the overall ratings
are equal; a pair in which nothing is left is dropped. With `min_gap`, what differs by less counts
as equal.

`winner: nearest` (CDPO, Guo et al., EMNLP 2024, https://arxiv.org/abs/2402.19085): the prompts ask
for the ratings of one of the prompt's responses, the target, which is drawn; in each dimension the
response with the nearer rating wins, and overall the one whose mean distance is smaller. So low
ratings are learned too.

For objectives that take all responses of a prompt, each one that can be used is also in a
comparison with itself, which says nothing: so it is in the example whether it is in a pair or not.
"""

import functools
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from axolotl_amopo.config.instructions import nearest_level
from axolotl_amopo.data.rows import RatedPrompt, Ratings

if TYPE_CHECKING:  # imports torch
    from axolotl_amopo.config.block import AMoPOConfig

Scales = dict[str, tuple[float, float]]

# Why a pair was not made; the texts of the log's summary.
TIE = "pairs whose responses tie"
IDENTICAL = "pairs of identical responses"
MISSING = "pairs with a missing rating (missing_ratings: drop)"
SINGLE = "prompts with one response (single_responses: drop)"
UNRATED = "responses with a missing rating"
NO_ORDER = "pairs without the rating that amopo.order_by names"
CLOSE = "pairs whose responses tie or differ by less than min_gap"
NOT_DRAWN = "pairs that were not drawn (amopo.pairs)"

# Of ratings on 0..1: what floats make of equal ones.
EPSILON = 1e-9


@dataclass
class Pair:
    """Two responses of a prompt, judged by C criteria (`AMoPOConfig.criteria`)."""

    prompt: RatedPrompt
    responses: tuple[int, int]  # overall winner and loser: indices into prompt.responses
    signs: list[int]  # [C] +1 the first of them wins, -1 the second, 0 the criterion says nothing
    target: Ratings | None = None  # what its prompts ask for, with `winner: nearest`

    @property
    def alone(self) -> bool:
        """Return whether it is one response, compared with itself."""
        return self.responses[0] == self.responses[1]

    def winner(self, criterion: int) -> int:
        """Return 0 or 1: which of `responses` wins; the first one where none does."""
        return int(self.signs[criterion] < 0)


@dataclass(frozen=True)
class Asks:
    """Hold what a prompt asks of every response."""

    dimensions: list[str]  # none without an instruction, or where each response has its own
    ratings: Ratings | None  # None: the best
    weights: Sequence[float]  # [D] of all dimensions, where weights are asked for


def normalised(rating: float, scale: tuple[float, float], lower_is_better: bool) -> float:
    """Return a rating on 0..1, where 1 is the better end."""
    share = (rating - scale[0]) / (scale[1] - scale[0])
    return 1 - share if lower_is_better else share


def at_levels(ratings: Ratings, scales: Scales, levels: int | None) -> Ratings:
    """Return ratings as prompts ask for them, rounded where `rating_levels` says so."""
    if levels is None:
        return ratings
    return {
        name: None if rating is None else nearest_level(rating, scales[name], levels)
        for name, rating in ratings.items()
    }


def as_written(weights: list[float]) -> list[float]:
    """Return weights as a prompt shows them, with one decimal, scaled to sum to 1 again."""
    rounded = [round(weight, 1) for weight in weights]
    total = sum(rounded)
    return [weight / total for weight in rounded] if total else weights


def mean_rating(ratings: Ratings, scales: Scales, lower: Set[str] = frozenset()) -> float:
    """Return the mean of the ratings, each on 0..1; dimensions without one are left out."""
    scores = [
        normalised(rating, scales[name], name in lower)
        for name, rating in ratings.items()
        if rating is not None
    ]
    # Rounded, so that equal means stay equal whatever order they were summed in.
    return round(sum(scores) / len(scores), 9) if scores else 0.0


@dataclass(frozen=True)
class PairRule:
    """How pairs are made of a prompt's responses."""

    config: "AMoPOConfig"
    scales: Scales
    lower: Set[str] = frozenset()  # dimensions in which lower ratings are better
    seed: int = 0
    grid: bool = False  # whether weights in prompts are a fixed grid instead of drawn

    def weight_vectors(self, pairs: list[Pair]) -> list[list[float]]:
        """Return the weights of the dimensions that stand in an example's prompts.

        For evaluation the corners, in the order of the dimensions, and the centre. Else draws from
        a Dirichlet distribution that depend on the seed and the example's texts. A prompt writes
        them with one decimal, so they are rounded to that, and scaled to sum to 1 again.

        Returns:
            [M][D], for an objective without weights in its prompts [].
        """
        config, count = self.config, len(self.config.dimensions)
        if config.weight_draws is None or config.weight_concentration is None:
            return []
        if self.grid:
            corners = [[float(i == j) for j in range(count)] for i in range(count)]
            return [*corners, [1 / count] * count]
        prompt, used = pairs[0].prompt, dict.fromkeys(i for pair in pairs for i in pair.responses)
        turns = [prompt.responses[index].turn for index in used]
        numbers = random.Random(json.dumps(["weights", self.seed, prompt.messages, turns]))
        drawn = [
            [numbers.gammavariate(config.weight_concentration, 1.0) for _ in range(count)]
            for _ in range(config.weight_draws)
        ]
        return [as_written([one / sum(vector) for one in vector]) for vector in drawn]

    def fit(self, prompt: RatedPrompt, index: int, asks: Asks) -> float:
        """Return how near a response's ratings are to what a prompt asks for.

        Returns:
            1 minus the mean distance of the ratings, on 0..1, over the dimensions that the prompt
            names; by weights, the weighted mean of the ratings. NaN where a rating is missing, or
            nothing is asked for.
        """
        ratings = prompt.responses[index].ratings
        own = {name: self._normalised(ratings, name) for name in asks.dimensions}
        if not own or None in own.values():
            return math.nan
        if asks.weights:
            return sum(w * own[n] for n, w in zip(asks.dimensions, asks.weights, strict=True))
        wanted = asks.ratings
        best = {name: 1.0 if wanted is None else self._normalised(wanted, name) for name in own}
        if None in best.values():
            return math.nan
        return round(1 - sum(abs(own[name] - best[name]) for name in own) / len(own), 9)

    def pairs(self, prompt: RatedPrompt, dropped: Counter) -> Iterator[Pair]:
        """Yield the pairs of one prompt; count what can't be one in `dropped`, by reason.

        Where the objective takes all responses, those that can be used follow, each one alone.
        """
        used = range(len(prompt.responses))
        if self._all_responses:
            used = [i for i in used if self._usable(prompt.responses[i].ratings)]
            if unrated := len(prompt.responses) - len(used):
                dropped[UNRATED] += unrated
        if len(used) < 2 and (not used or self.config.single_responses != "keep"):
            dropped[SINGLE] += 1
            return
        for pair in self._compared(prompt, dropped):
            if pair.responses[0] in used and pair.responses[1] in used:
                yield pair
        if self._all_responses:
            silent = [0] * len(self.config.criteria)
            yield from (Pair(prompt, (i, i), silent) for i in used)

    @functools.cached_property
    def _all_responses(self) -> bool:
        return self.config.all_responses

    def _usable(self, ratings: Ratings) -> bool:
        """Return whether a response has the ratings that `missing_ratings` asks for."""
        enough = any if self.config.missing_ratings == "mask" else all
        return enough(rating is not None for rating in ratings.values())

    def _compared(self, prompt: RatedPrompt, dropped: Counter) -> Iterator[Pair]:
        limit = self.config.pairs
        candidates = self._candidates(prompt)
        if not isinstance(limit, int):
            for first, second in candidates:
                if pair := self._pair(prompt, first, second, dropped):
                    yield pair
            return
        # Drawn before they are made, so that a prompt of many responses costs no more.
        shuffled = list(candidates)
        text = json.dumps([self.seed, prompt.messages, [r.turn for r in prompt.responses]])
        random.Random(text).shuffle(shuffled)
        made = 0
        for first, second in shuffled:
            if made == limit:
                dropped[NOT_DRAWN] += 1
            elif pair := self._pair(prompt, first, second, dropped):
                made += 1
                yield pair

    def _candidates(self, prompt: RatedPrompt) -> Iterator[tuple[int, int]]:
        indices = range(len(prompt.responses))
        if self.config.pairs == "best_worst":
            # A response that could not be in a pair is neither best nor worst.
            scores = {
                i: self._overall(prompt, i, prompt.responses[i].ratings)
                for i in indices
                if self._usable(prompt.responses[i].ratings)
            }
            scores = {i: score for i, score in scores.items() if score is not None}
            if len(scores) > 1:  # with equal scores, the first and the last: a tie
                yield max(scores, key=scores.get), min(reversed(scores), key=scores.get)
                return
        yield from itertools.combinations(indices, 2)

    def ratings(self, prompt: RatedPrompt, index: int) -> list[float]:
        """Return a response's ratings by criterion, on 0..1 with 1 the better end, else NaN.

        The overall rating is NaN where the data gives an order alone.
        """
        ratings = prompt.responses[index].ratings
        values = [self._normalised(ratings, name) for name in self.config.dimension_names]
        if self.config.overall:
            ordered = prompt.ordered and self.config.order_by in (None, "dataset")
            known = any(rating is not None for rating in ratings.values())
            overall = self._overall(prompt, index, ratings) if known and not ordered else None
            values.insert(0, overall)
        return [math.nan if value is None else float(value) for value in values]

    def gap(self, pair: Pair, name: str) -> float:
        """Return by how much the overall winner's rating is the better one, on 0..1, else NaN.

        With a target, by how much it is the nearer one.
        """
        winner, loser = (
            self._score(pair.prompt.responses[index].ratings, name, pair.target)
            for index in pair.responses
        )
        return math.nan if winner is None or loser is None else round(winner - loser, 9)

    def points(self) -> list[float]:
        """Return the width of each criterion's scale, in rating points.

        Of the overall rating, that of the dimension it is, the mean of all, or 1 for the data's.
        """
        widths = {name: float(high - low) for name, (low, high) in self.scales.items()}
        of_dimensions = [widths[name] for name in self.config.dimension_names]
        order = self.config.order_by
        mean = sum(of_dimensions) / len(of_dimensions)
        overall = 1.0 if order == "dataset" else widths.get(order, mean)
        return [overall] * self.config.overall + of_dimensions

    def _overall(self, prompt: RatedPrompt, index: int, ratings: Ratings) -> float | None:
        """Return a response's overall rating by `order_by`; None where it has none."""
        order = self.config.order_by
        if prompt.ordered and order in (None, "dataset"):
            return -index
        if order == "dataset":
            return prompt.responses[index].overall
        if order in (None, "mean"):
            return mean_rating(ratings, self.scales, self.lower)
        return self._normalised(ratings, order)

    def _normalised(self, ratings: Ratings, name: str) -> float | None:
        rating = ratings.get(name)
        if rating is None:
            return None
        return normalised(rating, self.scales[name], name in self.lower)

    def _score(self, ratings: Ratings, name: str, target: Ratings | None) -> float | None:
        """Return a rating on 0..1; with a target, its distance from that as a negative number."""
        own = self._normalised(ratings, name)
        if target is None:
            return own
        wanted = self._normalised(target, name)
        return None if own is None or wanted is None else -abs(own - wanted)

    def _target(self, prompt: RatedPrompt, pair: tuple[int, int]) -> Ratings | None:
        """Return the ratings that a pair's prompts ask for: of a group, the same for every pair."""
        if self.config.winner != "nearest":
            return None
        usable = [r.ratings for r in prompt.responses if self._usable(r.ratings)]
        usable = [ratings for ratings in usable if None not in ratings.values()] or usable
        if not usable:
            return None
        which = None if self.config.group_by_prompt else pair
        turns = [response.turn for response in prompt.responses]
        text = json.dumps(["target", self.seed, prompt.messages, turns, which])
        return at_levels(random.Random(text).choice(usable), self.scales, self.config.rating_levels)

    def _gap(self, gap: float) -> float:
        """Return a gap between ratings on 0..1, or 0 where it is too small to count."""
        return gap if abs(gap) > EPSILON and abs(gap) >= self.config.min_gap - EPSILON else 0.0

    def _pair(self, prompt: RatedPrompt, first: int, second: int, dropped: Counter) -> Pair | None:
        config = self.config
        responses = prompt.responses[first], prompt.responses[second]
        if responses[0].turn == responses[1].turn:
            dropped[IDENTICAL] += 1
            return None
        ratings = [response.ratings for response in responses]
        target = self._target(prompt, (first, second))
        rated = {
            name: None not in (self._score(side, name, target) for side in ratings)
            for name in self.scales
        }
        if not all(rated.values()) and config.missing_ratings != "mask":
            dropped[MISSING] += 1
            return None
        common = [{n: r for n, r in side.items() if rated[n]} for side in ratings]
        if target is None:
            overall = [
                self._overall(prompt, index, side)
                for index, side in zip((first, second), common, strict=True)
            ]
        else:
            overall = [self._nearness(side, target) for side in common]
        if None in overall and config.winner == "overall":
            dropped[NO_ORDER] += 1
            return None
        lead = 0.0 if None in overall else self._gap(overall[0] - overall[1])
        if lead < 0:
            first, second = second, first
            ratings.reverse()

        signs = [int(lead != 0)] * config.overall
        for name in config.dimension_names:
            if config.winner == "overall":
                signs.append(int(rated[name]))
                continue
            gap = 0.0
            if rated[name]:
                better, worse = (self._score(side, name, target) for side in ratings)
                gap = self._gap(better - worse)
            signs.append((gap > 0) - (gap < 0))
        if (config.winner == "overall" and lead == 0) or not any(signs):
            dropped[TIE if not config.min_gap else CLOSE] += 1
            return None
        return Pair(prompt, (first, second), signs, target)

    def _nearness(self, ratings: Ratings, target: Ratings) -> float:
        """Return the mean distance of ratings from the target's, as a negative number."""
        scores = [self._score(ratings, name, target) or 0.0 for name in ratings]
        return round(sum(scores) / max(1, len(scores)), 9)
