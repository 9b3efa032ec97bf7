"""Answers and their ratings -> what asking changes, with intervals over prompts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy.stats import rankdata

from axolotl_amopo.commands.kit.margins import FEW_PROMPTS, RESAMPLES, percentiles
from axolotl_amopo.commands.steer.collect import Said
from axolotl_amopo.steering.asks import Ask
from axolotl_amopo.steering.effect import steered
from axolotl_amopo.steering.front import hypervolume

WORDS = "words"
# From this share of answers on that max_new_tokens cut off, their ratings say little.
MANY_CUT = 0.1

Interval = tuple[float, float]


@dataclass(frozen=True)
class Rated:
    """Say how a rater rates a dimension."""

    name: str
    scale: tuple[float, float]
    lower: bool = False  # whether lower is better

    def shares(self, ratings: np.ndarray) -> np.ndarray:
        """Return ratings as shares of the way from the worst to the best."""
        low, high = self.scale
        shares = (ratings - low) / (high - low)
        return 1 - shares if self.lower else shares


@dataclass
class Effect:
    """Hold a mean change and its 95 % interval."""

    change: float
    interval: Interval


@dataclass
class Curve:
    """Hold what is obtained of a dimension over what is asked for."""

    dimension: str
    levels: list[float]
    means: list[float]  # on the rater's scale
    intervals: list[Interval]
    rank_correlation: float  # of what follows the request: of weights, the better end of the scale
    rank_interval: Interval
    monotone: bool
    span: Effect  # from the lowest number asked for to the highest


@dataclass
class Front:
    """Hold the points of a sweep of weights, and the volume below them."""

    dimensions: list[str]  # [D]
    points: list[list[float]]  # [F][D] shares of the way from the worst rating to the best
    asked: list[str]
    volume: float  # of the box between the worst and the best of all dimensions
    interval: Interval


@dataclass
class Steered:
    """Hold all that was measured of one model."""

    name: str
    plain: dict[str, Effect]  # of answers without any instruction: means, not changes
    curves: list[Curve] = field(default_factory=list)
    # What changes in every dimension, and in words, from the lowest number asked for to the
    # highest; of a model that takes no numbers, from no instruction to being asked.
    effects: dict[str, dict[str, Effect]] = field(default_factory=dict)
    front: Front | None = None
    cut: float = 0.0  # share of the answers that max_new_tokens cut off
    unrated: int = 0  # ratings that no rater gave


@dataclass
class SteerReport:
    """Hold what several models did on the same prompts."""

    prompts: int
    samples: int
    dimensions: list[str]
    scales: dict[str, tuple[float, float]]
    lower: list[str]
    raters: dict[str, Any]
    models: list[Steered]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the report for programs, with null for what no rating tells: JSON has no NaN."""
        return _without_nan(asdict(self))


def measure(
    name: str,
    asks: Sequence[Ask],
    said: Sequence[Said],
    ratings: Sequence[dict[str, float | None]],
    dimensions: Sequence[Rated],
    seed: int = 0,
) -> Steered:
    """Return what a model gives when it is asked.

    Args:
        said: the answers, as many per ask and prompt.
        ratings: of each answer; None where there is none, which counts for nothing.
        seed: of the bootstrap over prompts.

    Raises:
        ValueError: for answers that are not as many everywhere.
    """
    values = table(len(asks), said, ratings, [d.name for d in dimensions])
    draws = resamples(values.shape[1], seed)
    means = Means(values, draws)
    plain = next(i for i, ask in enumerate(asks) if ask.kind == "plain")
    columns = [*(d.name for d in dimensions), WORDS]
    made = Steered(
        name,
        {column: means.mean(plain, d) for d, column in enumerate(columns)},
        cut=float(np.mean([not one.finished for one in said])),
        unrated=int(np.isnan(values[..., :-1]).sum()),
    )
    for k, dimension in enumerate(dimensions):
        sweep = [i for i, ask in enumerate(asks) if ask.dimension == dimension.name]
        sweep.sort(key=lambda i: asks[i].number or 0.0)
        if not sweep:
            continue
        first, last = (sweep[0], sweep[-1]) if len(sweep) > 1 else (plain, sweep[0])
        made.effects[dimension.name] = {
            column: means.change(first, last, d) for d, column in enumerate(columns)
        }
        if len(sweep) > 1:
            levels = [float(asks[i].number or 0.0) for i in sweep]
            obtained = values[sweep][..., k]  # [L, P, S]
            # More weight asks for better ratings, which may be the lower ones.
            falls = dimension.lower and asks[last].by_weight
            span = means.change(first, last, k)
            made.curves.append(curve(dimension.name, levels, obtained, draws, span, falls=falls))
    points = [i for i, ask in enumerate(asks) if ask.kind in ("front", "best")]
    weighed = {name for ask in asks if ask.kind == "front" for name in ask.settings}
    if weighed:
        # What raters rate besides is no part of the compromise.
        axes = [k for k, dimension in enumerate(dimensions) if dimension.name in weighed]
        obtained = _mean(values[points][..., axes], 2)
        own = [dimensions[k] for k in axes]
        made.front = front([asks[i].name for i in points], obtained, own, draws)
    return made


def table(
    asks: int,
    said: Sequence[Said],
    ratings: Sequence[dict[str, float | None]],
    names: Sequence[str],
) -> np.ndarray:
    """Return ratings, and the number of words, as [asks, P prompts, S samples, D + 1].

    NaN where there is no rating.

    Raises:
        ValueError: for answers that are not as many everywhere.
    """
    prompts = 1 + max(one.prompt for one in said)
    samples = 1 + max(one.sample for one in said)
    if len(said) != asks * prompts * samples:
        raise ValueError(f"{len(said)} answers are not {asks} x {prompts} x {samples}")
    values = np.full((asks, prompts, samples, len(names) + 1), np.nan)
    for one, rated in zip(said, ratings, strict=True):
        found = [rated.get(name) for name in names]
        row = [np.nan if rating is None else rating for rating in found]
        values[one.ask, one.prompt, one.sample] = [*row, len(one.text.split())]
    return values


def resamples(prompts: int, seed: int) -> np.ndarray:
    """Return [R, P] places of the prompts of R bootstrap samples.

    Whole prompts are drawn, for answers to one prompt resemble each other.
    """
    return np.random.default_rng(seed).integers(prompts, size=(RESAMPLES, prompts))


class Means:
    """Take means over prompts, and their intervals.

    Args:
        values: [asks, P, S, D], NaN where there is no rating.
        draws: [R, P] of `resamples`.
    """

    def __init__(self, values: np.ndarray, draws: np.ndarray):
        self.values = _mean(values, 2)  # [asks, P, D]
        self.draws = draws

    def mean(self, ask: int, d: int) -> Effect:
        """Return the mean of an ask."""
        return self._effect(self.values[ask, :, d])

    def change(self, first: int, last: int, d: int) -> Effect:
        """Return the mean change from one ask to another, prompt by prompt."""
        return self._effect(self.values[last, :, d] - self.values[first, :, d])

    def _effect(self, of_prompts: np.ndarray) -> Effect:
        return Effect(float(_mean(of_prompts, 0)), _interval(_mean(of_prompts[self.draws], 1)))


def curve(
    name: str,
    levels: list[float],
    obtained: np.ndarray,
    draws: np.ndarray,
    span: Effect,
    *,
    falls: bool = False,
) -> Curve:
    """Return a dimension's curve.

    Args:
        levels: [L] the numbers asked for, lowest first.
        obtained: [L, P, S] ratings, NaN where there is none.
        draws: [R, P].
        falls: whether ratings are to fall where the numbers rise.
    """
    asked = np.broadcast_to(np.array(levels)[:, None, None], obtained.shape)
    followed = -obtained if falls else obtained
    given = ~np.isnan(obtained)
    seen = None
    if given.any((1, 2)).sum() > 1:  # else raters left too little
        seen = steered(asked[given], followed[given])
    of_prompts = _mean(obtained, 2)  # [L, P]
    return Curve(
        name,
        levels,
        [float(_mean(row, 0)) for row in of_prompts],
        [_interval(_mean(row[draws], 1)) for row in of_prompts],
        seen.rank_correlation if seen else float("nan"),
        _interval(np.array([rank_correlation(asked[:, d], followed[:, d]) for d in draws])),
        seen.monotone if seen else False,
        span,
    )


def rank_correlation(asked: np.ndarray, obtained: np.ndarray) -> float:
    """Return Spearman's rank correlation; 0 where one of the two does not vary, NaN of nothing.

    Args:
        asked, obtained: of equal shape; NaN among the obtained is left out.
    """
    given = ~np.isnan(obtained)
    if not given.any():
        return float("nan")
    x, y = rankdata(asked[given]), rankdata(obtained[given])
    spread = x.std() * y.std()
    return float(((x - x.mean()) * (y - y.mean())).mean() / spread) if spread else 0.0


def front(
    asked: list[str], obtained: np.ndarray, dimensions: Sequence[Rated], draws: np.ndarray
) -> Front:
    """Return the front of several asks.

    Args:
        obtained: [F, P, D] mean ratings per prompt.
        dimensions: [D].
        draws: [R, P].
    """
    shares = np.stack(
        [dimension.shares(obtained[..., k]) for k, dimension in enumerate(dimensions)], axis=-1
    )  # [F, P, D]
    worst, best = [0.0] * len(dimensions), [1.0] * len(dimensions)

    def volume(places: np.ndarray | slice) -> float:
        points = _mean(shares[:, places], 1)
        points = points[~np.isnan(points).any(1)]
        return hypervolume(points.tolist(), worst, best) if len(points) else float("nan")

    whole = volume(slice(None))
    low, high = _interval(np.array([volume(places) for places in draws[: RESAMPLES // 4]]))
    # The best of noisy points is too good, and in a resample by as much again: so the interval is
    # the basic bootstrap's (Davison & Hinkley 1997, section 5.2), which turns the error round.
    ends = np.clip([2 * whole - high, 2 * whole - low], 0.0, 1.0)  # NaN stays NaN
    interval = float(ends[0]), float(ends[1])
    names = [dimension.name for dimension in dimensions]
    return Front(names, _mean(shares, 1).tolist(), asked, whole, interval)


def notes(models: Sequence[Steered], prompts: int) -> list[str]:
    """Return what a reader should know before trusting the numbers."""
    made = []
    if prompts < FEW_PROMPTS:
        made.append(f"{prompts} questions are few: intervals are too narrow below {FEW_PROMPTS}.")
    for model in models:
        if not model.effects and model.front is None:
            made.append(
                f"{model.name}: was trained without instructions, so nothing is asked of it, and "
                "only what it writes without any is here."
            )
        if model.cut >= MANY_CUT:
            made.append(
                f"{model.name}: {model.cut:.0%} of its answers were cut off; raise "
                "--max-new-tokens, for a cut answer is rated as it stands."
            )
        if model.unrated:
            made.append(f"{model.name}: {model.unrated} ratings are missing and were left out.")
    return made


def _mean(values: np.ndarray, axis: int) -> Any:
    """Return means that leave NaN out; NaN of nothing, without numpy's warning."""
    given = ~np.isnan(values)
    count = given.sum(axis)
    return np.where(given, values, 0.0).sum(axis) / np.where(count, count, np.nan)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _interval(values: np.ndarray) -> Interval:
    values = values[~np.isnan(values)]
    return percentiles(values) if len(values) else (float("nan"), float("nan"))
