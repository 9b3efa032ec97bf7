"""Read prompts with responses, and write them with ratings.

{"prompt" | "messages" | "instruction": ..., "responses": [{"text": ..., ...}, ...], ...}
{"prompt" | "messages" | "instruction": ..., "response": ..., ...}
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from axolotl_amopo.data.rows import Message, Response, Row, Source
from axolotl_amopo.errors import DataError, did_you_mean
from axolotl_amopo.raters.base import Item
from axolotl_amopo.raters.rating import Ratings

PROMPTS = ("messages", "prompt", "instruction")
ROLES = {"human": "user", "gpt": "assistant"}
# keep: a score that is there stays, and the rater's stands beside it in `rated`. replace: the
# rater's takes its place, and it stands in `replaced`.
Scores = Literal["keep", "replace"]


@dataclass
class Answered:
    """Hold a row: a prompt and its responses."""

    values: dict[str, Any]  # as it stands in the file
    messages: list[Message]
    responses: list[dict[str, Any]]  # each with `text`, and what else was there
    items: list[Item]  # one per response


def read_rows(path: Path, limit: int | None = None) -> list[Answered]:
    """Return the rows of a file of JSON lines, the first `limit` of them.

    Raises:
        DataError: naming file, row and key.
    """
    rows = []
    for number, values in _objects(path):
        if limit is not None and len(rows) == limit:
            break
        rows.append(_row(Row(values, number, Source(str(path), [], {}, roles=ROLES))))
    if not rows:
        raise DataError(f"{path}: is empty: no response to rate.")
    return rows


def rated_row(
    row: Answered, ratings: list[Ratings], provenance: Mapping[str, Any], scores: Scores
) -> dict[str, Any]:
    """Return the row with ratings in `scores`, and in `raters` who gave them.

    A dimension without a rating is left out.
    """
    made = {name: value for name, value in row.values.items() if name != "response"}
    if "messages" not in made and "prompt" not in made:
        made["prompt"] = made.pop("instruction")
    made["responses"] = [
        _rated(one, {k: v for k, v in mine.items() if v is not None}, provenance, scores)
        for one, mine in zip(row.responses, ratings, strict=True)
    ]
    return made


def _rated(
    response: dict[str, Any],
    ratings: Mapping[str, float],
    provenance: Mapping[str, Any],
    scores: Scores,
) -> dict[str, Any]:
    there = scores_of(response)
    both = {name: there[name] for name in ratings if name in there}
    given = {name: round(value, 6) for name, value in ratings.items()}
    new = {name: value for name, value in given.items() if name not in there}
    made = response | {
        "scores": there | (given if scores == "replace" else new),
        "raters": response.get("raters", {}) | {name: provenance[name] for name in ratings},
    }
    if both and scores == "replace":
        made["replaced"] = response.get("replaced", {}) | both
    elif both:
        made["rated"] = response.get("rated", {}) | {name: given[name] for name in both}
    return made


def scores_of(response: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores that a response has; none is a dict too."""
    return {name: v for name, v in (response.get("scores") or {}).items() if v is not None}


def is_by_people(response: Mapping[str, Any], name: str) -> bool:
    """Return whether a score that is there was not written by `rate`."""
    return name not in response.get("raters", {}) or name in response.get("rated", {})


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as UTF-8 text: {error}.") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, row {number}: is not JSON ({error}).") from None
        if not isinstance(values, dict):
            raise DataError(f"{path}, row {number}: must be an object, got {line[:60]!r}.")
        yield number, values


def _row(row: Row) -> Answered:
    where = f"{row.source.name}, row {row.number}"
    if not any(row.has(name) for name in PROMPTS):
        known = [name for name, value in row.values.items() if value is not None]
        raise DataError(
            f"{where}, key 'prompt': is missing; a row needs one of {', '.join(PROMPTS)}, and has "
            f"{', '.join(known) or 'nothing'}.{did_you_mean('prompt', known)}"
        )
    messages = row.conversation(*PROMPTS)
    if row.has("responses"):
        responses = []
        for values, key in row.items("responses"):
            if values.get("text") is None:
                raise row.error(f"{key}.text", "is missing.")
            if not isinstance(values.get("scores") or {}, dict):
                raise row.error(f"{key}.scores", "must hold the ratings by dimension.")
            responses.append(values)
    elif isinstance(found := row.get("response"), list) and all(isinstance(t, str) for t in found):
        raise row.error("response", f"has {len(found)} turns; rate takes one response per prompt.")
    else:
        responses = [{"text": found}]
    items = [
        Item(
            f"{where}, response {i}",
            messages,
            Response(row.response(one["text"], f"responses[{i - 1}].text"), {}).text,
            row.values,
        )
        for i, one in enumerate(responses, start=1)
    ]
    return Answered(row.values, messages, responses, items)
