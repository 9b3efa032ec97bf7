"""Rate the responses of a file."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from axolotl_amopo.commands.rate.agreement import Agreement, agreement
from axolotl_amopo.commands.rate.rows import (
    Answered,
    Scores,
    is_by_people,
    rated_row,
    read_rows,
    scores_of,
)
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.raters.base import Estimate
from axolotl_amopo.raters.rating import Raters, Ratings, Tally, ignore


@dataclass
class RatedDimensionReport:
    """Hold what came of a dimension."""

    name: str
    rater: dict[str, Any]  # provenance
    scale: tuple[float, float]
    direction: str
    tally: Tally
    mean: float
    lowest: float
    highest: float
    commonest: tuple[float, int]  # the rating that most responses have, and how many
    agreement: Agreement | None  # with people; None where they rated fewer than two responses


@dataclass
class RateReport:
    """Hold what a file's ratings are, and the rows with them."""

    source: str
    prompts: int
    responses: int
    dimensions: list[RatedDimensionReport]
    rows: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return the report without the rows."""
        return {
            "source": self.source,
            "prompts": self.prompts,
            "responses": self.responses,
            "dimensions": [
                asdict(one)
                | {
                    "tally": asdict(one.tally) | {"missing": one.tally.missing},
                    "agreement": one.agreement and one.agreement._asdict(),
                }
                for one in self.dimensions
            ],
        }

    def text(self) -> str:
        """Return the rows as JSON lines."""
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)


def rate_file(
    source: Path,
    raters: Raters,
    *,
    journal: Path | None = None,
    limit: int | None = None,
    scores: Scores = "keep",
    progress: Callable[[int], Callable[[int], None]] = lambda count: ignore,
) -> RateReport:
    """Return a file's responses with ratings, and how they compare with people's.

    Args:
        journal: see `Raters.rate`.
        limit: rate the first so many rows.
        scores: what becomes of scores that are there, see `rows.Scores`.
        progress: called with the number of ratings to come; what it returns is called with the
            number of those that just came.

    Raises:
        AMoPOError: for a row that can't be read, or ratings that can't be had.
    """
    rows = read_rows(source, limit)
    items = [item for row in rows for item in row.items]
    advance = progress(len(items) * len(raters.dimensions))
    ratings = raters.rate(items, journal=journal, progress=advance)
    made, start = [], 0
    for row in rows:
        mine = ratings[start : start + len(row.items)]
        made.append(rated_row(row, mine, raters.provenance, scores))
        start += len(mine)
    dimensions = []
    for one in raters.dimensions:
        values = [value for mine in ratings if (value := mine[one.name]) is not None]
        dimensions.append(
            RatedDimensionReport(
                one.name,
                raters.provenance[one.name],
                one.scale,
                one.direction,
                raters.tally[one.name],
                sum(values) / len(values),
                min(values),
                max(values),
                Counter(values).most_common(1)[0],
                _with_people(rows, ratings, one.name),
            )
        )
    prompts = {json.dumps(row.messages, sort_keys=True) for row in rows}
    return RateReport(str(source), len(prompts), len(items), dimensions, made)


def estimate_file(
    source: Path, raters: Raters, *, journal: Path | None = None, limit: int | None = None
) -> dict[str, Estimate]:
    """Return about what rating a file takes, by dimension, without asking anyone.

    Raises:
        AMoPOError: for a row that can't be read.
    """
    items = [item for row in read_rows(source, limit) for item in row.items]
    return raters.estimate(items, journal)


def _with_people(rows: list[Answered], ratings: list[Ratings], name: str) -> Agreement | None:
    mine: list[float] = []
    theirs: list[float] = []
    prompts: list[int] = []
    numbers: dict[str, int] = {}
    each = iter(ratings)
    for row in rows:
        prompt = json.dumps(row.messages, sort_keys=True)
        number = numbers.setdefault(prompt, len(numbers))
        for response, item in zip(row.responses, row.items, strict=True):
            value = next(each)[name]
            found = scores_of(response).get(name)
            if found is None or value is None or not is_by_people(response, name):
                continue
            try:
                theirs.append(float(found))
            except (TypeError, ValueError):
                raise AMoPOError(
                    f"{item.where}, scores.{name}: must be a number, got {found!r}."
                ) from None
            mine.append(value)
            prompts.append(number)
    return agreement(mine, theirs, prompts) if len(mine) > 1 else None
