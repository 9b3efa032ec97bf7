"""Rate responses by several raters, each on its dimensions, and count what came of it."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.raters.base import (
    Estimate,
    Item,
    RatedDimension,
    Rater,
    Rating,
    Task,
    short_hash,
)
from axolotl_amopo.raters.journal import Journal, open_journal, read_journal

Ratings = dict[str, float | None]


@dataclass
class Tally:
    """Count what a dimension's rater did in one call of `Raters.rate`."""

    responses: int = 0
    rated: int = 0
    from_journal: int = 0  # of those, without asking anyone
    clipped: int = 0  # outside of the scale, and set to its end
    expected: int = 0  # answers of a judge read by their probabilities
    unreadable: int = 0  # answers of a judge without a rating
    requests: int = 0  # answers of a server
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    alike: int = 0  # responses of which all draws are alike
    problem: str = ""  # of the first response without a rating, and where it is

    @property
    def missing(self) -> int:
        """Return how many responses have no rating."""
        return self.responses - self.rated


class Job(NamedTuple):
    """Hold what one rater is to do: tasks that no journal knows, each once."""

    rater: Rater
    all_keys: dict[str, list[str]]  # of each dimension, a key per item
    keys: list[str]  # of the tasks: an item's and the draw's number
    tasks: list[Task]


def ignore(count: int) -> None:
    """Take a count of ratings, and show nothing."""


class Raters:
    """Rate on all dimensions of a file of raters.

    `tally` has the counts of the last call of `rate`, by dimension.

    Args:
        raters: in the order in which they are asked.
        order: of the dimensions' names, for reports.
    """

    def __init__(self, raters: Sequence[Rater], order: Sequence[str] = ()):
        self.raters = list(raters)
        self.order = list(order)
        self.tally: dict[str, Tally] = {}

    @property
    def dimensions(self) -> list[RatedDimension]:
        """Return all dimensions."""
        found = [one for rater in self.raters for one in rater.dimensions]
        places = {name: place for place, name in enumerate(self.order)}
        return sorted(found, key=lambda one: places.get(one.name, 0))

    @property
    def provenance(self) -> dict[str, Any]:
        """Return who rates each dimension: kind, model or version, rubric's hash. No secret."""
        made_by = f"axolotl-amopo {version('axolotl-amopo')}"
        raters = {one.name: rater for rater in self.raters for one in rater.dimensions}
        return {
            one.name: raters[one.name].provenance(one.name) | {"by": made_by}
            for one in self.dimensions
        }

    def estimate(self, items: Sequence[Item], journal: Path | None = None) -> dict[str, Estimate]:
        """Return about what rating would take, by dimension, without asking anyone."""
        totals = {one.name: Estimate() for one in self.dimensions}
        for job in self._jobs(items, read_journal(journal)):
            for task in job.tasks:
                took = job.rater.estimate(task)
                pairs = zip(totals[task.dimension], took, strict=True)
                totals[task.dimension] = Estimate(*(a + b for a, b in pairs))
        return totals

    def rate(
        self,
        items: Sequence[Item],
        *,
        journal: Path | None = None,
        progress: Callable[[int], None] = ignore,
    ) -> list[Ratings]:
        """Return each item's rating per dimension, on its scale; None where none could be had.

        Equal items are rated once. Several draws become their mean.

        Args:
            journal: a file of JSON lines to which ratings are added as they come; what is in it is
                not rated, and not paid for, again.
            progress: called with the number of ratings that are there; all of them are
                `len(items) * len(dimensions)`.

        Raises:
            AMoPOError: where a server stops, the disk is full, or a dimension has no rating at all.
        """
        self.tally = {one.name: Tally(len(items)) for one in self.dimensions}
        with open_journal(journal) as book:
            jobs = list(self._jobs(items, book.known))
            try:
                for job in jobs:
                    if job.tasks:  # all of them before the first is paid for
                        job.rater.prepare()
                for job in jobs:
                    unknown = {key.partition(".")[0] for key in job.keys}
                    for name, keys in job.all_keys.items():
                        self.tally[name].from_journal = sum(key not in unknown for key in keys)
                        progress(self.tally[name].from_journal)
                    self._do(job, book, progress)
            except AMoPOError as error:
                if not (journal and book.known):
                    raise
                end = "" if str(error)[-1:] in (".", "?", "!") else "."
                raise AMoPOError(
                    f"{error}{end} What was rated is kept in {journal}; the same command goes on."
                ) from None
            return self._collect(items, jobs, book.known)

    def _jobs(self, items: Sequence[Item], known: dict[str, float]) -> Iterator[Job]:
        for rater in self.raters:
            all_keys = {one.name: _keys(items, rater, one.name) for one in rater.dimensions}
            todo: dict[str, Task] = {}
            for name, keys in all_keys.items():
                for key, item in zip(keys, items, strict=True):
                    for draw in range(rater.draws):
                        if (mine := f"{key}.{draw}") not in known:
                            todo.setdefault(mine, Task(item, name, draw))
            yield Job(rater, all_keys, list(todo), list(todo.values()))

    def _do(self, job: Job, book: Journal, progress: Callable[[int], None]) -> None:
        left = Counter(key.partition(".")[0] for key in job.keys)  # draws of each response
        same = Counter(key for keys in job.all_keys.values() for key in keys)
        scales = {one.name: one.scale for one in job.rater.dimensions}
        for place, rating in job.rater.rate(job.tasks) if job.tasks else ():
            task, key = job.tasks[place], job.keys[place]
            rating = _checked(rating, scales[task.dimension], job.rater.clips)
            book.add(key, task.dimension, rating)
            tally = self.tally[task.dimension]
            tally.requests += bool(rating.prompt_tokens or rating.completion_tokens)
            tally.prompt_tokens += rating.prompt_tokens
            tally.completion_tokens += rating.completion_tokens
            tally.cost += rating.cost
            tally.unreadable += rating.unreadable
            tally.expected += rating.expected
            if rating.again:
                continue
            if rating.problem and not tally.problem:
                tally.problem = f"{task.item.where}: {rating.problem}"
            response = key.partition(".")[0]
            left[response] -= 1
            if not left[response]:
                progress(same[response])

    def _collect(
        self, items: Sequence[Item], jobs: list[Job], known: dict[str, float]
    ) -> list[Ratings]:
        ratings: list[Ratings] = [{} for _ in items]
        for job in jobs:
            for dimension in job.rater.dimensions:
                tally = self.tally[dimension.name]
                low, high = dimension.scale
                for mine, key in zip(ratings, job.all_keys[dimension.name], strict=True):
                    draws = (known.get(f"{key}.{i}") for i in range(job.rater.draws))
                    drawn = [value for value in draws if value is not None]
                    mine[dimension.name] = None
                    if drawn:
                        inside = [min(max(value, low), high) for value in drawn]
                        mine[dimension.name] = statistics.fmean(inside)
                        tally.rated += 1
                        tally.clipped += inside != drawn
                        tally.alike += len(drawn) > 1 and len(set(drawn)) == 1
                if items and not tally.rated:
                    raise AMoPOError(
                        f"{dimension.name}: none of the {len(items)} responses could be rated; "
                        f"{tally.problem}."
                    )
        return ratings


def _keys(items: Sequence[Item], rater: Rater, dimension: str) -> list[str]:
    """Return a key per item, equal where equal ratings would be given."""
    who = rater.identity(dimension)
    return [
        short_hash([who, one.messages, one.response, one.row if rater.reads_row else None])
        for one in items
    ]


def _checked(rating: Rating, scale: tuple[float, float], clips: bool) -> Rating:
    """Return the rating, without a value where it is no number, or not on the scale."""
    value, (low, high) = rating.value, scale
    if value is None or (math.isfinite(value) and (clips or low <= value <= high)):
        return rating
    return rating._replace(
        value=None, problem=f"its rating is {value:g}, and the scale is {low:g} to {high:g}"
    )
