"""Rated responses -> preference pairs, by the rule that the README states.

A response's overall score is the mean of its ratings over the configured dimensions, each first
brought to 0..1 by its scale. Where the data itself names a winner (`amopo.pairs`), that one is
the overall winner, whatever the ratings say.

`winner: overall`: the higher overall score wins under every prompt; pairs with equal scores are
dropped. `winner: per_dimension`: each dimension's own ratings pick its winner, dimensions where
they are equal weigh nothing, as does the overall prompt where the overall scores are equal; a
pair in which nothing is left is dropped.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from axolotl_amopo.args import AMoPOConfig
from axolotl_amopo.data.rows import RatedPrompt, Ratings

Scales = dict[str, tuple[float, float]]

# Why a pair was not made; the texts of the log's summary.
TIE = "pairs whose responses tie"
IDENTICAL = "pairs of identical responses"
MISSING = "pairs with a missing rating (missing_ratings: drop)"
SINGLE = "prompts with one response (single_responses: drop)"


@dataclass
class Pair:
    """A preference pair under K prompts (`AMoPOConfig.prompt_names`)."""

    prompt: RatedPrompt
    responses: tuple[int, int]  # overall winner and loser: indices into prompt.responses
    winners: list[int]  # [K] which of `responses` wins under each prompt: 0 or 1
    mask: list[bool]  # [K] false where a prompt weighs nothing for this pair


def overall_score(ratings: Ratings, scales: Scales) -> float:
    """Mean rating, each on 0..1; dimensions without a rating are left out."""
    scores = [
        (rating - scales[name][0]) / (scales[name][1] - scales[name][0])
        for name, rating in ratings.items()
        if rating is not None
    ]
    # Rounded, so that equal means stay equal whatever order they were summed in.
    return round(sum(scores) / len(scores), 9) if scores else 0.0


def make_pairs(
    prompt: RatedPrompt, config: AMoPOConfig, scales: Scales, dropped: Counter
) -> Iterator[Pair]:
    """The pairs of one prompt; what can't be one is counted in `dropped` by reason."""
    if len(prompt.responses) < 2:
        dropped[SINGLE] += 1
        return
    for first, second in _candidates(prompt, config, scales):
        responses = prompt.responses[first], prompt.responses[second]
        if responses[0].text == responses[1].text:
            dropped[IDENTICAL] += 1
            continue
        ratings = [response.ratings for response in responses]
        rated = {name: None not in (ratings[0][name], ratings[1][name]) for name in scales}
        if not all(rated.values()) and config.missing_ratings != "mask":
            dropped[MISSING] += 1
            continue

        common = [{n: r for n, r in side.items() if rated[n]} for side in ratings]
        scores = [overall_score(side, scales) for side in common]
        lead = 1.0 if prompt.ordered else scores[0] - scores[1]
        if lead < 0:
            first, second = second, first
            ratings.reverse()

        winners, mask = [], []
        if config.overall:
            winners.append(0)
            mask.append(lead != 0)
        for name in config.dimension_names:
            gap = ratings[0][name] - ratings[1][name] if rated[name] else 0.0
            if config.winner == "overall":
                winners.append(0)
                mask.append(rated[name])
            else:
                winners.append(0 if gap >= 0 else 1)
                mask.append(gap != 0)
        if (config.winner == "overall" and lead == 0) or not any(mask):
            dropped[TIE] += 1
            continue
        yield Pair(prompt, (first, second), winners, mask)


def _candidates(
    prompt: RatedPrompt, config: AMoPOConfig, scales: Scales
) -> Iterator[tuple[int, int]]:
    indices = range(len(prompt.responses))
    if config.pairs == "best_worst":
        # A response that could not be in a pair is neither best nor worst.
        usable = any if config.missing_ratings == "mask" else all
        scores = {
            i: overall_score(prompt.responses[i].ratings, scales)
            for i in indices
            if usable(rating is not None for rating in prompt.responses[i].ratings.values())
        }
        if len(scores) > 1:  # with equal scores, the first and the last: a tie
            yield max(scores, key=scores.get), min(reversed(scores), key=scores.get)
            return
    yield from itertools.combinations(indices, 2)
