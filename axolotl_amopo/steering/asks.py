"""List what to ask a model for, to see whether it gives it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.steering.front import simplex
from axolotl_amopo.steering.steering import Settings, Steering, Weights, written

# plain: no instruction. best: all dimensions at their best. sweep: one dimension at one number.
# front: weights of all dimensions.
Kind = Literal["plain", "best", "sweep", "front"]


@dataclass(frozen=True)
class Ask:
    """Hold one thing to ask for."""

    kind: Kind
    settings: Settings
    dimension: str | None = None  # of a sweep
    number: float | None = None  # of a sweep; None where training had no numbers
    by_weight: bool = False  # whether the number is a weight, and no rating

    @property
    def name(self) -> str:
        """Return how people write it."""
        return written(self.settings) if self.settings else "plain"

    def to_json(self) -> dict[str, Any]:
        """Return what tells it from others."""
        weights = isinstance(self.settings, Weights)
        return {"kind": self.kind, "weights" if weights else "settings": dict(self.settings)}


def asks_of(
    steering: Steering, dimensions: Sequence[str], points: int = 5, only: Kind | None = None
) -> list[Ask]:
    """Return all that a model is asked for: plain, the best, each dimension's sweep, the front.

    What has no instruction, since training had none, is left out: such a model is asked plainly.
    The front is asked for only where `dimensions` are all that the model was trained on: of others,
    nobody would see what they cost.

    Args:
        dimensions: those to sweep, in any order.
        points: at most so many numbers per sweep, the lowest and the highest among them.
        only: `sweep` or `front`, beside which nothing but plain and best is asked for.

    Raises:
        AMoPOError: for a dimension that the model does not know, or a front that it can't have.
    """
    swept = [steering.dimension(name) for name in dimensions]
    made = [Ask("plain", {})]
    if steering.overall or (steering.one_prompt and not steering.weighted):
        made.append(Ask("best", steering.everything()))
    for dimension in swept if only != "front" else ():
        numbers: list[float | None] = [None]
        # A dimension alone has all the weight, whatever number stands there.
        alone = steering.weighted and len(steering.dimensions) == 1
        if steering.takes_numbers and not alone:
            numbers = [*thinned(steering.tries(dimension), points)]
        made += [
            Ask("sweep", {dimension.name: n}, dimension.name, n, steering.weighted) for n in numbers
        ]
    names = [d.name for d in steering.dimensions]
    has_front = steering.takes_weights and len(names) > 1 and set(names) == set(dimensions)
    if only == "front" and not has_front:
        raise AMoPOError(
            "there is no front to ask for: it takes several dimensions, a rater for each of them, "
            "and a model that takes weights."
        )
    if has_front and only != "sweep":
        made += [
            Ask("front", Weights(zip(names, weights, strict=True)))
            for weights in simplex(len(names))
        ]
    return [ask for ask in made if ask.kind == "plain" or steering.instruction(ask.settings)]


def thinned(numbers: Sequence[float], most: int) -> list[float]:
    """Return at most so many of the numbers, evenly spaced, the first and the last among them.

    >>> thinned([1, 2, 3, 4, 5], 3)
    [1, 3, 5]
    """
    if len(numbers) <= most:
        return list(numbers)
    last = len(numbers) - 1
    return [numbers[round(i * last / (most - 1))] for i in range(most)]
