"""The types that all raters share."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from axolotl_amopo.data.rows import Message
from axolotl_amopo.errors import wants_traceback


class Item(NamedTuple):
    """Hold a response to be rated."""

    where: str  # file, row and response, for error messages
    messages: list[Message]  # the conversation before the response
    response: str
    row: Mapping[str, Any]  # the prompt's row as it stands in the file: facts, references, ...


@dataclass(frozen=True)
class RatedDimension:
    """Say what a rating of a dimension means."""

    name: str
    scale: tuple[float, float]
    direction: Literal["higher", "lower"] = "higher"  # which ratings are better


class Task(NamedTuple):
    """Name what is to be rated, and which of several draws it is."""

    item: Item
    dimension: str
    draw: int = 0


class Rating(NamedTuple):
    """Hold what came of asking a rater once."""

    value: float | None  # None: there is none
    problem: str = ""  # why there is none, as a clause
    again: bool = False  # whether the rater is asked again, there being none
    unreadable: bool = False  # an answer came, and held no rating
    expected: bool = False  # the mean over the probabilities of all ratings, not one of them
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0  # in the currency of the judge's `price`


class Estimate(NamedTuple):
    """Hold about what a task will take."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0  # at most
    cost: float = 0.0


class Rater(Protocol):
    """Rate responses on one dimension, or on several at once."""

    dimensions: list[RatedDimension]
    draws: int  # how often each response is rated, for the mean
    reads_row: bool  # whether a rating depends on more than conversation and response
    # Whether a value outside of the scale counts as the scale's nearer end; else there is none.
    clips: bool

    def identity(self, dimension: str) -> dict[str, Any]:
        """Return what shapes the ratings: equal for raters that give equal ratings. JSON."""
        ...

    def provenance(self, dimension: str) -> dict[str, Any]:
        """Return what a row says of its rater: the identity and more. JSON, no secret."""
        ...

    def estimate(self, task: Task) -> Estimate:
        """Return about what a task takes."""
        ...

    def prepare(self) -> None:
        """Load what is needed, and look whether it is all there, before anything is rated.

        Raises:
            AMoPOError: saying what is missing.
        """
        ...

    def rate(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Rating]]:
        """Yield places of tasks and their ratings, in any order; `again` comes before the last.

        Raises:
            AMoPOError: where no more tasks can be done.
        """
        ...


class LocalRater(ABC):
    """Rate one dimension, response by response, in this process and for nothing."""

    dimension: RatedDimension
    name: str  # of what computes the ratings
    draws = 1

    @property
    def dimensions(self) -> list[RatedDimension]:
        """Return the one dimension."""
        return [self.dimension]

    def estimate(self, task: Task) -> Estimate:
        """Return nothing: no server is asked."""
        return Estimate()

    def prepare(self) -> None:  # noqa: B027
        """Need nothing."""

    def rate(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Rating]]:
        """Yield each response's rating.

        Raises:
            Exception: of the computation, where the environment asks for tracebacks.
        """
        for place, task in enumerate(tasks):
            try:
                yield place, self.rating(task.item)
            except Exception as error:  # code of the user's, or a library's of an odd text
                if wants_traceback():
                    raise
                yield place, Rating(None, f"{self.name} raised {type(error).__name__}: {error}")

    @abstractmethod
    def rating(self, item: Item) -> Rating:
        """Return the rating of a response; what it raises says that there is none."""


def short_hash(value: Any) -> str:
    """Return 16 hexadecimal digits of a JSON value's hash."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
