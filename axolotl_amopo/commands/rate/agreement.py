"""Compare ratings with those that people gave: rank correlation, and pairs of one prompt."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from axolotl_amopo.commands.kit.margins import RESAMPLES, percentiles


class Agreement(NamedTuple):
    """Hold how one rater's ratings follow another's, on one dimension."""

    responses: int
    prompts: int
    rank_correlation: float | None  # Spearman's, over all responses; None where one side is flat
    interval: tuple[float, float] | None  # 95 %, by prompts
    pairs: int  # of responses to one prompt that the other rated differently
    same_order: float | None  # the share of those in the same order; a tie counts half


def agreement(
    rated: Sequence[float], other: Sequence[float], prompts: Sequence[int], seed: int = 0
) -> Agreement:
    """Return how far `rated` agrees with `other`.

    The interval is the bootstrap's, prompts drawn with replacement, each with all its responses.

    >>> agreement([1, 2, 3, 4], [1, 2, 4, 3], [0, 0, 1, 1])[2:]
    (0.8, (0.3333333333333333, 1.0), 2, 0.5)

    Args:
        rated, other: [n] ratings of the same responses.
        prompts: [n] the number of the prompt that each response answers.
    """
    mine, theirs = np.asarray(rated, dtype=float), np.asarray(other, dtype=float)
    groups = [np.flatnonzero(np.asarray(prompts) == one) for one in np.unique(prompts)]
    found = _spearman(mine, theirs)
    interval = None
    if found is not None and len(groups) > 1:
        generator = np.random.default_rng(seed)
        drawn = []
        for _ in range(RESAMPLES):
            picked = generator.integers(len(groups), size=len(groups))
            places = np.concatenate([groups[i] for i in picked])
            drawn.append(_spearman(mine[places], theirs[places]))
        interval = percentiles(np.array([one for one in drawn if one is not None]))
    right, pairs = 0.0, 0
    for places in groups:
        first, second = np.triu_indices(len(places), k=1)
        wanted = np.sign(theirs[places][first] - theirs[places][second])
        got = np.sign(mine[places][first] - mine[places][second])
        pairs += int((wanted != 0).sum())
        right += float(((wanted * got)[wanted != 0] + 1).sum() / 2)
    return Agreement(
        len(mine), len(groups), found, interval, pairs, right / pairs if pairs else None
    )


def _spearman(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return the rank correlation, None where it is not defined."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])
