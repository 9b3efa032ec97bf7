"""Does a model give what it is asked for? One pure function of what was asked and obtained."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr


class Steered(NamedTuple):
    """How what was obtained follows what was asked."""

    levels: list[float]  # [L] the different numbers that were asked for, lowest first
    means: list[float]  # [L] the mean of what was obtained at each
    counts: list[int]  # [L] answers at each
    rank_correlation: float  # Spearman's, over answers: -1 to 1; 0 where nothing varies
    monotone: bool  # whether the mean never falls from a level to the next higher one
    span: float  # the mean at the highest level minus that at the lowest
    error: float  # mean |obtained - asked| over answers; says something on equal scales alone


def steered(asked: Sequence[float], obtained: Sequence[float]) -> Steered:
    """Return how what was obtained follows what was asked.

    >>> steered([1, 1, 3, 3, 5, 5], [2, 2, 2, 3, 4, 5])[:5]
    ([1.0, 3.0, 5.0], [2.0, 2.5, 4.5], [2, 2, 2], 0.8890008890013336, True)

    Args:
        asked: [n] the rating or the weight that each answer was asked for.
        obtained: [n] the attribute that the answer has, more being more of it.

    Raises:
        ValueError: for arrays of different lengths, with NaN, or with fewer than two levels.
    """
    wanted, found = np.asarray(asked, dtype=float), np.asarray(obtained, dtype=float)
    if wanted.ndim != 1 or wanted.shape != found.shape:
        raise ValueError(f"asked and obtained must be [n], got {wanted.shape} and {found.shape}")
    if not (np.isfinite(wanted).all() and np.isfinite(found).all()):
        raise ValueError("asked and obtained must be finite numbers")
    levels, places = np.unique(wanted, return_inverse=True)
    if len(levels) < 2:
        raise ValueError("steering shows where at least two different levels are asked for")
    counts = np.bincount(places)
    means = np.bincount(places, weights=found) / counts
    varies = found.min() < found.max()
    return Steered(
        levels=levels.tolist(),
        means=means.tolist(),
        counts=counts.tolist(),
        rank_correlation=float(spearmanr(wanted, found).statistic) if varies else 0.0,
        monotone=bool((np.diff(means) >= 0).all()),
        span=float(means[-1] - means[0]),
        error=float(np.abs(found - wanted).mean()),
    )
