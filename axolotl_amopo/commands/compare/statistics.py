"""Lines of results -> means, intervals and differences, in pure functions.

A pair is ordered right or not under each of its ratings. The numbers of a variant are means over
pairs, of seeds averaged pair by pair, with all folds put together: each prompt is held out in one
fold, so each is counted once. What claims a certainty draws or swaps whole prompts: pairs of one
prompt share its text, and runs of one variant share their data.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy import stats

from axolotl_amopo.commands.compare.comparison import CONFLICT, LENGTH, MEAN, OVERALL, WORST
from axolotl_amopo.commands.kit.margins import (
    LEVEL,
    RESAMPLES,
    correct,
    holm,
    percentiles,
    without_length,
)
from axolotl_amopo.errors import AMoPOError

# Swaps of the randomisation test, drawn in so many parts to save memory.
SWAPS, PARTS = 9999, 9
# Budgets differ where the pairs or the tokens of an average run do by more than this share.
APART = 0.05

Prompting = Literal["own", "plain"]
Json = dict[str, Any]


@dataclass
class Columns:
    """Hold, per pair, what is right (0, a half, 1) by column; NaN where a column says nothing.

    Columns: each rating, the pairs whose dimensions disagree, and each dimension without length.
    """

    prompts: np.ndarray  # [N] which prompt a pair belongs to
    values: np.ndarray  # [N, C]


@dataclass
class Difference:
    """Compare a measure of a variant with the baseline's, on the same pairs."""

    difference: float
    interval: tuple[float, float]
    p: float  # of swapping the two models prompt by prompt
    p_holm: float | None = None  # None: not among the comparisons that were named


@dataclass
class Cell:
    """Hold one measure of one variant."""

    value: float | None
    interval: tuple[float, float] | None = None
    run_deviation: float | None = None  # standard deviation over seeds; with one seed None
    change: Difference | None = None


@dataclass
class Table:
    """Hold one measure of all variants, under one kind of prompt."""

    prompting: Prompting
    measure: str
    pairs: int
    prompts: int
    cells: dict[str, Cell] = field(default_factory=dict)


@dataclass
class Cost:
    """Hold what an average run of a variant cost, and where its budget is not the baseline's."""

    runs: int
    seconds: float
    steps: float
    pairs: float
    tokens: float
    peak_bytes: float
    differs: list[str] = field(default_factory=list)


def pair_keys(scored: Json) -> list[tuple[Any, ...]]:
    """Return what tells the pairs of a run apart, the same in every run of the same data."""
    seen: Counter = Counter()
    keys = []
    dimensions = [k for k, name in enumerate(scored["names"]) if name != OVERALL]
    for where, tokens, labels in zip(
        scored["where"], scored["tokens"], scored["labels"], strict=True
    ):
        # Machines that share runs may have the data in other folders.
        key = (where.rpartition("/")[2], *tokens, *(labels[k] for k in dimensions))
        keys.append((*key, seen[key]))
        seen[key] += 1
    return keys


def columns_of(scored: Json, names: Sequence[str], prompting: Prompting) -> Columns:
    """Return the columns of one run, see `column_names`.

    Args:
        names: the ratings; one that the run does not have says nothing.
    """
    count = len(scored["where"])
    labels, margins = np.zeros((count, len(names))), np.full((count, len(names)), np.nan)
    for k, name in enumerate(names):
        if name in scored["names"]:
            own = scored["names"].index(name)
            labels[:, k] = [row[own] for row in scored["labels"]]
            given = scored["plain"] if prompting == "plain" else [r[own] for r in scored["own"]]
            margins[:, k] = [np.nan if one is None else one for one in given]
    said = (labels != 0) & ~np.isnan(margins)
    oriented = np.where(said, labels * margins, np.nan)
    right = np.where(said, correct(oriented), np.nan)
    dimensions = [k for k, name in enumerate(names) if name != OVERALL]
    own = np.where(said, labels, 0)[:, dimensions]
    disagree = (own > 0).any(1) & (own < 0).any(1)
    conflict = np.full(count, np.nan)
    if disagree.any():
        conflict[disagree] = np.nanmean(right[disagree][:, dimensions], axis=1)
    lengths = np.array(scored["tokens"], dtype=float)
    adjusted = np.full((count, len(dimensions)), np.nan)
    for column, k in enumerate(dimensions):
        rows = said[:, k]
        if rows.any():
            ordered = np.where(labels[rows, k, None] < 0, lengths[rows][:, ::-1], lengths[rows])
            adjusted[rows, column] = correct(without_length(oriented[rows, k], ordered))
    values = np.column_stack([right, conflict, adjusted])
    return Columns(np.array(scored["prompt"]), values)


def measures(means: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return every measure from the means of the columns.

    Args:
        means: [..., C], NaN where a column has no pair.
    """
    of_dimensions = means[..., [k for k, name in enumerate(names) if name != OVERALL]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where no dimension has a pair: NaN
        made = {MEAN: np.nanmean(of_dimensions, -1), WORST: np.nanmin(of_dimensions, -1)}
        without_length = np.nanmean(means[..., len(names) + 1 :], -1)
    made |= {name: means[..., k] for k, name in enumerate(names)}
    return made | {CONFLICT: means[..., len(names)], LENGTH: without_length}


def totals(columns: Columns, prompt_count: int) -> np.ndarray:
    """Return sums and counts of the columns by prompt, [P, 2C]."""
    known = ~np.isnan(columns.values)
    both = np.column_stack([np.where(known, columns.values, 0), known])
    made = np.zeros((prompt_count, both.shape[1]))
    np.add.at(made, columns.prompts, both)
    return made


def column_means(sums: np.ndarray) -> np.ndarray:
    """Return means [..., C] of sums and counts [..., 2C]."""
    values, counts = np.split(sums, 2, axis=-1)
    return np.divide(values, counts, out=np.full_like(values, np.nan), where=counts > 0)


class Study:
    """All lines of a comparison, aligned pair by pair.

    Raises:
        AMoPOError: where runs of one fold have no pair in common.
    """

    def __init__(self, lines: Sequence[Json], baseline: str):
        self.baseline = baseline
        self.notes: list[str] = []
        self.lines = list(lines)
        reference = [line for line in lines if line["name"] == baseline] or self.lines
        self.names: list[str] = reference[0]["scored"]["names"]
        for line in lines:  # a method without an overall rating must not hide that of the others
            if len(line["scored"]["names"]) > len(self.names):
                self.names = line["scored"]["names"]
        self.by_name: dict[str, list[Json]] = {}
        for line in lines:
            self.by_name.setdefault(line["name"], []).append(line)
        self.prompt_count = 0
        self.places: dict[Any, dict[tuple[Any, ...], int]] = {}  # by fold: a pair's prompt
        self._align(reference)

    def _align(self, reference: list[Json]) -> None:
        folds: dict[Any, list[Json]] = {}
        for line in self.lines:
            folds.setdefault(line["fold"], []).append(line)
        dropped = 0
        for fold, lines in folds.items():
            first = next((line for line in reference if line["fold"] == fold), lines[0])
            common = set(pair_keys(first["scored"]))
            total = max(len(line["scored"]["where"]) for line in lines)
            for line in lines:
                common &= set(pair_keys(line["scored"]))
            if not common:
                raise AMoPOError(
                    f"the runs of fold {fold} were scored on different pairs; delete them and run "
                    "again."
                )
            dropped += total - len(common)
            keys = zip(pair_keys(first["scored"]), first["scored"]["prompt"], strict=True)
            kept = [(key, prompt) for key, prompt in keys if key in common]
            numbers: dict[int, int] = {}
            for _, prompt in kept:
                numbers.setdefault(prompt, self.prompt_count + len(numbers))
            self.places[fold] = {key: numbers[prompt] for key, prompt in kept}
            self.prompt_count += len(numbers)
        if dropped:
            self.notes.append(
                f"{dropped} pairs were not scored in every run, and are left out everywhere."
            )

    def run_columns(self, line: Json, prompting: Prompting) -> Columns:
        """Return a run's columns of the pairs that all runs have, in an order common to all."""
        columns = columns_of(line["scored"], self.names, prompting)
        places = self.places[line["fold"]]
        rows = {key: row for row, key in enumerate(pair_keys(line["scored"])) if key in places}
        order = [rows[key] for key in places]
        return Columns(np.array(list(places.values())), columns.values[order])

    def folds_of(self, name: str) -> list[Any]:
        """Return the folds in which a variant has a run."""
        return list(dict.fromkeys(line["fold"] for line in self.by_name[name]))

    def totals(self, name: str, prompting: Prompting, folds: Sequence[Any]) -> np.ndarray:
        """Return a variant's sums and counts by prompt, seeds averaged pair by pair."""
        made = np.zeros((self.prompt_count, 1))
        for fold in folds:
            runs = [
                self.run_columns(line, prompting)
                for line in self.by_name[name]
                if line["fold"] == fold
            ]
            values = np.mean([run.values for run in runs], axis=0)
            made = made + totals(Columns(runs[0].prompts, values), self.prompt_count)
        return made

    def deviation(self, name: str, prompting: Prompting) -> dict[str, float | None]:
        """Return the standard deviation of each measure over seeds, folds put together."""
        seeds: dict[Any, np.ndarray] = {}
        for line in self.by_name[name]:
            sums = totals(self.run_columns(line, prompting), self.prompt_count).sum(0)
            seeds[line["seed"]] = seeds.get(line["seed"], 0) + sums
        if len(seeds) < 2:
            return {}
        made = measures(column_means(np.array(list(seeds.values()))), self.names)
        return {key: number(values.std(ddof=1)) for key, values in made.items()}

    def tables(self, prompting: Prompting, seed: int = 0) -> list[Table]:
        """Return a table per measure; p-values are corrected later, see `correct_p`."""
        tables: dict[str, Table] = {}
        draws = np.random.default_rng(seed).multinomial(
            self.prompt_count, np.full(self.prompt_count, 1 / self.prompt_count), size=RESAMPLES
        )
        before_of: dict[tuple[Any, ...], np.ndarray] = {}
        for name in self.by_name:
            folds = self.folds_of(name)
            sums = self.totals(name, prompting, folds)
            values = measures(column_means(sums.sum(0)), self.names)
            counts = measures_count(sums, self.names)
            drawn = measures(column_means(draws @ sums), self.names)
            deviations = self.deviation(name, prompting)
            shared = [fold for fold in folds if fold in self._baseline_folds()]
            changes: dict[str, Difference] = {}
            if name != self.baseline and shared:
                after = sums if shared == folds else self.totals(name, prompting, shared)
                key = tuple(shared)
                if key not in before_of:
                    before_of[key] = self.totals(self.baseline, prompting, shared)
                changes = compare(before_of[key], after, self.names, draws, seed)
            for measure, value in values.items():
                table = tables.setdefault(measure, Table(prompting, measure, *counts[measure]))
                cell = Cell(number(value), run_deviation=deviations.get(measure))
                if cell.value in (0, 1) and measure in self.names:
                    cell.interval = exact_interval(cell.value, counts[measure][1])
                elif cell.value is not None:
                    cell.interval = percentiles(without_nan(drawn[measure]))
                cell.change = changes.get(measure)
                table.cells[name] = cell
                table.pairs = max(table.pairs, counts[measure][0])
                table.prompts = max(table.prompts, counts[measure][1])
        return [table for table in tables.values() if table.pairs]

    def _baseline_folds(self) -> list[Any]:
        return self.folds_of(self.baseline) if self.baseline in self.by_name else []

    def costs(self) -> dict[str, Cost]:
        """Return what each trained variant cost, and where its budget is not the baseline's."""
        made = {}
        for name, lines in self.by_name.items():
            records = [line["cost"] for line in lines if line["cost"].get("steps")]
            if records:
                mean = {
                    key: float(np.mean([record[key] for record in records]))
                    for key in ("seconds", "steps", "pairs", "tokens", "peak_bytes")
                }
                made[name] = Cost(runs=len(records), **mean)
        standard = made.get(self.baseline)
        for name, cost in made.items():
            if standard is None or name == self.baseline:
                continue
            for key, apart in (("steps", 0.0), ("pairs", APART), ("tokens", APART)):
                usual = getattr(standard, key)
                if abs(getattr(cost, key) - usual) > apart * usual:
                    cost.differs.append(key)
        return made


def compare(
    before: np.ndarray,
    after: np.ndarray,
    names: Sequence[str],
    draws: np.ndarray,
    seed: int,
) -> dict[str, Difference]:
    """Return the difference of every measure between two models on the same prompts.

    The interval is of the paired bootstrap over prompts. The p-value is of a randomisation test:
    if the two models were alike, then which of the two gave a prompt's results would be a coin's
    toss (Noreen, Computer-Intensive Methods for Testing Hypotheses, 1989).

    Args:
        before, after: [P, 2C] sums and counts by prompt.
        draws: [R, P] how often each prompt is drawn.
        seed: of the swaps.
    """
    ends = [measures(column_means(one.sum(0)), names) for one in (before, after)]
    drawn = [measures(column_means(draws @ one), names) for one in (before, after)]
    generator = np.random.default_rng(seed)
    size = (SWAPS // PARTS, len(before))
    moved = np.concatenate(  # [S, 2C]
        [generator.integers(0, 2, size=size) @ (after - before) for _ in range(PARTS)]
    )
    swapped = [
        measures(column_means(before.sum(0) + moved), names),
        measures(column_means(after.sum(0) - moved), names),
    ]
    made = {}
    for measure in ends[0]:
        difference = number(ends[1][measure] - ends[0][measure])
        if difference is None:
            continue
        spread = without_nan(drawn[1][measure] - drawn[0][measure])
        chance = without_nan(swapped[1][measure] - swapped[0][measure])
        as_far = np.abs(chance) >= abs(difference) - 1e-12
        p = float((1 + as_far.sum()) / (1 + len(chance)))
        made[measure] = Difference(difference, percentiles(spread), p)
    return made


def measures_count(sums: np.ndarray, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return of how many pairs and prompts each measure is; of several columns, their most."""
    counts = np.split(sums, 2, axis=-1)[1]  # [P, C]
    dimensions = [k for k, name in enumerate(names) if name != OVERALL]
    of = {MEAN: dimensions, WORST: dimensions, CONFLICT: [len(names)]}
    of |= {name: [k] for k, name in enumerate(names)}
    of[LENGTH] = list(range(len(names) + 1, counts.shape[1]))
    return {
        measure: (int(counts[:, ks].sum(0).max()), int((counts[:, ks] > 0).any(1).sum()))
        for measure, ks in of.items()
    }


def correct_p(tables: Sequence[Table], named: Sequence[str]) -> int:
    """Correct the p-values of the named measures together, and return how many there are."""
    changes = [
        cell.change
        for table in tables
        if table.measure in named
        for cell in table.cells.values()
        if cell.change
    ]
    for one, p in zip(changes, holm([one.p for one in changes]), strict=True):
        one.p_holm = p
    return len(changes)


def exact_interval(share: float, prompts: int) -> tuple[float, float]:
    """Return the interval of Clopper and Pearson where all pairs are right, or all wrong.

    Every resample is the same there. As in `score`, prompts are what is counted.
    """
    exact = stats.binomtest(int(share) * prompts, prompts).proportion_ci(LEVEL)
    return float(exact.low), float(exact.high)


def number(value: Any) -> float | None:
    """Return a number, None for NaN."""
    return None if np.isnan(value) else float(value)


def without_nan(values: np.ndarray) -> np.ndarray:
    """Return the values that are numbers: a resample may have no pair of a kind."""
    return values[~np.isnan(values)]
