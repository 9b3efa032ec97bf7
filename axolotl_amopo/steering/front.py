"""The front that points draw, and the volume that it encloses."""

import itertools
from collections.abc import Sequence

import numpy as np

Point = Sequence[float]


def pareto(points: Sequence[Point]) -> list[tuple[float, ...]]:
    """Return the different points that no other one beats: more of one thing and less of none."""
    kept = sorted({tuple(map(float, point)) for point in points}, reverse=True)
    return [
        one
        for one in kept
        if not any(
            other != one and all(a >= b for a, b in zip(other, one, strict=True)) for other in kept
        )
    ]


def hypervolume(points: Sequence[Point], worst: Point, best: Point) -> float:
    """Return the share of the box between `worst` and `best` that is below one of the points.

    >>> hypervolume([(2, 1), (1, 2)], worst=(0, 0), best=(2, 2))
    0.75

    Exact: the last coordinate is cut into slices, in each of which the others are a front of one
    dimension less.

    Args:
        points: [n][D], more being better in each of the D.
        worst, best: [D]; what is outside of the box counts as on its border.
    """
    low, high = np.asarray(worst, dtype=float), np.asarray(best, dtype=float)
    shares = ((np.asarray(points, dtype=float) - low) / (high - low)).clip(0.0, 1.0)
    return _volume(pareto(shares.tolist()))


def _volume(points: list[tuple[float, ...]]) -> float:
    if not points:
        return 0.0
    if len(points[0]) == 1:
        return max(point[0] for point in points)
    heights = sorted({0.0, *(point[-1] for point in points)})
    return sum(
        (above - below) * _volume(pareto([p[:-1] for p in points if p[-1] >= above]))
        for below, above in itertools.pairwise(heights)
    )


def simplex(count: int) -> list[list[float]]:
    """Return weights that go over the whole simplex: its corners, the middles of edges, the centre.

    Of two weights, every quarter.
    """
    if count == 2:
        return [[i / 4, 1 - i / 4] for i in range(5)]
    corners = [[float(i == k) for i in range(count)] for k in range(count)]
    middles = [
        [0.5 * (i in pair) for i in range(count)]
        for pair in itertools.combinations(range(count), 2)
    ]
    return [*corners, *middles, [1 / count] * count] if count > 1 else corners
