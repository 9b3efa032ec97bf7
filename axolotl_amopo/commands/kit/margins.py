"""Compute statistics of reward margins, in pure functions on arrays.

A margin is the reward of the response that the ratings call the better one, less the other's: above
0 the model orders the pair as the ratings do. The caller leaves out pairs without such an order.

Pairs of one prompt share its text and often a response, so they are not independent observations.
What claims a certainty here (`intervals`, `sign_test`) counts prompts, not pairs.
"""

from dataclasses import dataclass, field

import numpy as np
from scipy import stats

RESAMPLES = 2000
LEVEL = 0.95
# Two responses are similarly long if neither has a quarter more tokens than the other.
SIMILAR_RATIO = 1.25
QUANTILES = (5, 25, 50, 75, 95)
MOST_BINS = 5
# Below this many prompts a percentile interval is too narrow, and few tests reach anything.
FEW_PROMPTS = 30


@dataclass
class GapBin:
    """Describe pairs whose ratings differ by about as much."""

    low: float
    high: float
    n: int
    accuracy: float
    margin: float  # mean


@dataclass
class Measures:
    """Describe one model's margins on the pairs that one rating orders; shares are 0 to 1."""

    n: int
    prompts: int
    accuracy: float | None = None
    interval: tuple[float, float] | None = None
    margin: float | None = None  # mean
    quantiles: dict[str, float] = field(default_factory=dict)
    longer_wins: float | None = None  # by the ratings
    longer_preferred: float | None = None  # by the model
    similar_n: int = 0
    similar_accuracy: float | None = None
    adjusted_accuracy: float | None = None
    by_gap: list[GapBin] = field(default_factory=list)
    gap_correlation: float | None = None  # Spearman, of margin and rating gap


@dataclass
class AccuracyChange:
    """Compare one model's accuracy with another's on the same pairs."""

    difference: float  # of the accuracies
    interval: tuple[float, float]
    gained: int  # prompts of which more pairs are ordered right than before
    lost: int
    p: float
    p_holm: float = 1.0


def correct(margins: np.ndarray) -> np.ndarray:
    """Return [N]: 1 where a pair is ordered as rated, 0 where not, a half for equal rewards."""
    return (np.sign(margins) + 1) / 2


def measure(
    margins: np.ndarray,
    gaps: np.ndarray,
    lengths: np.ndarray,
    prompts: np.ndarray,
    interval: tuple[float, float] | None = None,
) -> Measures:
    """Return all measures of one model and one rating.

    Args:
        margins: [N], see the module's docstring.
        gaps: [N] by how much the ratings differ, on 0 to 1; NaN where that isn't known.
        lengths: [N, 2] tokens of the better response and of the other.
        prompts: [N] which prompt a pair belongs to.
        interval: of the accuracy, from `intervals`.
    """
    made = Measures(n=len(margins), prompts=len(np.unique(prompts)), interval=interval)
    if not made.n:
        return made
    right = correct(margins)
    longer = np.sign(lengths[:, 0] - lengths[:, 1])
    similar = np.abs(np.log(lengths[:, 0] / lengths[:, 1])) <= np.log(SIMILAR_RATIO)
    made.accuracy, made.margin = mean(right), mean(margins)
    quantiles = np.percentile(margins, QUANTILES)
    made.quantiles = {f"{q}%": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)}
    made.longer_wins = mean(correct(longer[longer != 0]))
    made.longer_preferred = mean(correct((longer * margins)[longer != 0]))
    made.similar_n, made.similar_accuracy = int(similar.sum()), mean(right[similar])
    made.adjusted_accuracy = mean(correct(without_length(margins, lengths)))
    known = gaps > 0
    made.by_gap = by_gap(margins[known], gaps[known])
    if len(made.by_gap) > 1 and np.ptp(margins[known]) > 0:
        made.gap_correlation = float(stats.spearmanr(gaps[known], margins[known]).statistic)
    return made


def mean(values: np.ndarray) -> float | None:
    """Return the mean, None of no values."""
    return float(values.mean()) if len(values) else None


def without_length(margins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the part [N] of the margins that the responses' lengths don't explain.

    It is the residual of the least-squares fit of the margin on the difference of the two lengths
    in tokens and on that of their logarithms. Which response comes first is arbitrary and flips all
    three signs, so the fit has no intercept. By the theorem of Frisch, Waugh and Lovell this is the
    part of the margin that a linear regression of the winner on margin and lengths would use. A
    reward of the form a * length + b * log(length) leaves nothing, and so an accuracy of one half.
    Of a reward that measures quality, the part that grows with length is taken away too: where
    better answers are longer, this errs on the strict side.

    Args:
        margins: [N].
        lengths: [N, 2].
    """
    lengths = lengths.astype(float)
    differences = np.column_stack(
        [lengths[:, 0] - lengths[:, 1], np.log(lengths[:, 0] / lengths[:, 1])]
    )
    scale = np.abs(differences).max(0)
    differences = differences / np.where(scale > 0, scale, 1)
    rest = margins - differences @ np.linalg.lstsq(differences, margins, rcond=None)[0]
    # What rounding leaves of an exact fit is not a preference.
    return np.where(np.abs(rest) <= 1e-9 * np.abs(margins).max(), 0.0, rest)


def by_gap(margins: np.ndarray, gaps: np.ndarray) -> list[GapBin]:
    """Return accuracy and mean margin by rating gap: per gap, or of many gaps per fifth.

    Args:
        margins, gaps: [N].
    """
    gaps = gaps.round(6)
    edges = np.unique(gaps)
    if len(edges) > MOST_BINS:
        edges = np.unique(np.quantile(gaps, np.arange(MOST_BINS) / MOST_BINS))
    bins = np.digitize(gaps, edges) - 1
    return [
        GapBin(
            low=float(gaps[inside].min()),
            high=float(gaps[inside].max()),
            n=int(inside.sum()),
            accuracy=float(correct(margins[inside]).mean()),
            margin=float(margins[inside].mean()),
        )
        for inside in (bins == i for i in range(len(edges)))
        if inside.any()
    ]


def resampled_means(values: np.ndarray, prompts: np.ndarray, seed: int) -> np.ndarray:
    """Return the means [R, V] of R bootstrap samples, the same samples for every column.

    Prompts are drawn with replacement, each with all its pairs (the cluster bootstrap: Davison and
    Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).

    Args:
        values: [N, V], N above 0.
        prompts: [N].
    """
    _, group = np.unique(prompts, return_inverse=True)
    count = group.max() + 1
    totals = np.zeros((count, values.shape[1] + 1))
    np.add.at(totals, group, np.column_stack([values, np.ones(len(values))]))
    generator = np.random.default_rng(seed)
    sums = np.stack(
        [totals[generator.integers(count, size=count)].sum(0) for _ in range(RESAMPLES)]
    )
    return sums[:, :-1] / sums[:, -1:]


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """Return the two ends of the middle LEVEL of the values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def intervals(right: np.ndarray, prompts: np.ndarray, seed: int) -> list[tuple[float, float]]:
    """Return a 95 % interval of each column's mean: percentiles of the bootstrap.

    Where all pairs are right, or all wrong, every resample is the same, and the interval is that
    of Clopper and Pearson for as many observations as there are prompts.

    Args:
        right: [N, V] of 0, a half and 1, N above 0; one column per model.
        prompts: [N].
    """
    means = resampled_means(right, prompts, seed)
    made = []
    for column, sample in zip(right.T, means.T, strict=True):
        if (column == column[0]).all() and column[0] in (0, 1):
            count = len(np.unique(prompts))
            exact = stats.binomtest(int(column[0]) * count, count).proportion_ci(LEVEL)
            made.append((float(exact.low), float(exact.high)))
        else:
            made.append(percentiles(sample))
    return made


def change(before: np.ndarray, after: np.ndarray, prompts: np.ndarray, seed: int) -> AccuracyChange:
    """Return the change between two models' accuracies on the same pairs.

    Its interval resamples both models together.

    Args:
        before, after: [N] of 0, a half and 1, N above 0.
        prompts: [N].
    """
    means = resampled_means(np.column_stack([before, after]), prompts, seed)
    gained, lost, p = sign_test(after - before, prompts)
    return AccuracyChange(
        difference=float(after.mean() - before.mean()),
        interval=percentiles(means[:, 1] - means[:, 0]),
        gained=gained,
        lost=lost,
        p=p,
    )


def sign_test(differences: np.ndarray, prompts: np.ndarray) -> tuple[int, int, float]:
    """Return how many prompts gained, how many lost, and the exact two-sided p of that balance.

    With one pair per prompt this is the exact form of McNemar's test (Psychometrika 12, 1947):
    under chance, a pair that only one of two models orders right is as likely to be either model's.
    A prompt with several pairs counts once, by what its pairs gained less what they lost.
    """
    _, group = np.unique(prompts, return_inverse=True)
    balance = np.bincount(group, weights=differences)
    gained, lost = int((balance > 0).sum()), int((balance < 0).sum())
    p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return gained, lost, float(p)


def holm(p_values: list[float]) -> list[float]:
    """Return p-values corrected for their number (Holm, Scand. J. Statist. 6, 1979)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(steps, 1)
    return corrected.tolist()


def agreement(values: np.ndarray) -> np.ndarray:
    """Return the share [K, K] of the pairs that two columns order alike, of those both order.

    Args:
        values: [N, K], whose signs say which response is the better one; 0 or NaN: neither.

    Returns:
        NaN where there is no pair that both order.
    """
    signs = np.sign(np.nan_to_num(values.astype(float)))  # [N, K]
    both = np.abs(signs).T @ np.abs(signs)
    alike = (signs.T @ signs + both) / 2
    return np.divide(alike, both, out=np.full_like(both, np.nan), where=both > 0)
