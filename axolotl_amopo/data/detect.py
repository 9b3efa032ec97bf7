"""Rows of unknown shape -> the formats that read them, best first.

Every format is tried on some of the rows: it fits where its own `read` takes them and finds
ratings, so a new format is found without a word about it here. Where none fits, other names of our
fields are tried under `fields:`; and what nothing reads is described for `amopo.user_defined`, as
far as the names and values of the fields tell.
"""

import importlib
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from axolotl.utils.dict import DictDefault

from axolotl_amopo.config.datasets import PREFIX, formats, module_of
from axolotl_amopo.config.through_axolotl import mark
from axolotl_amopo.data.rows import Row
from axolotl_amopo.errors import DataError, is_line

if TYPE_CHECKING:
    from axolotl_amopo.data.format import DatasetFormat

USER_DEFINED = f"{PREFIX}user_defined"
FILL_IN = "FILL_IN"
# A format or a dimension that can't be read in more of the rows than this does not fit.
ENOUGH = 0.8
# Other names of our fields, the likeliest first.
OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "input", "problem", "messages", "context"),
    "response": ("answer", "output", "completion", "reply", "generation", "text"),
    "responses": ("answers", "outputs", "completions", "candidates", "replies", "generations"),
    "chosen": ("preferred", "accepted", "better", "winner"),
    "rejected": ("dispreferred", "worse", "loser"),
    "text": ("response", "answer", "content", "output", "completion", "reply"),
    "scores": ("ratings", "annotations", "labels"),
}
# Words in the name of a number that is no rating.
NO_RATING = {"id", "idx", "index", "row", "seed", "count", "num", "n", "len", "length", "tokens"}
NO_RATING |= {"words", "chars", "turn", "turns", "time", "timestamp", "date", "year", "size"}
# Words that tell the responses of a row apart, beside numbers and single letters.
SIDES = {"chosen", "rejected", "left", "right", "first", "second", "better", "worse"}


@dataclass
class Fit:
    """How a format reads some rows."""

    type: str
    options: dict[str, Any]  # our keys of the entry: fields, template, responses
    dimensions: list[str]
    read: int  # how many of `rows` the format takes
    rows: int
    values: int = 0  # different ratings, over all dimensions
    fill_in: list[str] = field(default_factory=list)  # what the rows don't tell

    def __str__(self) -> str:
        """Return what speaks for it."""
        names = "".join(f" with {key}:" for key in self.options)
        rated = ", ".join(self.dimensions) or "nothing"
        return f"{self.type}{names} reads {self.read} of {self.rows} rows, rated on {rated}"


class _Used(dict):
    """The names under `fields:`, and which of them were asked for."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked |= {name} & self.keys()
        return super().get(name, default)


def make_format(
    kind: str, path: str, dimensions: list[Any], options: Mapping[str, Any], **block: Any
) -> "DatasetFormat":
    """Return a format that reads rows, without a tokenizer; bad rows and ratings are left out.

    Args:
        path: names the rows in errors.
        dimensions: as in the `amopo:` block.
        options: our keys of the entry.
        block: other keys of the `amopo:` block.
    """
    entry = {"path": path, "type": kind}
    mark(entry, "read")
    block |= {"missing_ratings": "mask", "bad_rows": "drop", "dimensions": dimensions}
    block["datasets"] = {"read": {"options": dict(options)}}
    cfg = DictDefault(amopo=block, sequence_len=1, base_model="")
    return importlib.import_module(module_of(kind, "type")).load(None, cfg, DictDefault(entry))


def detect(rows: list[dict[str, Any]], path: str, kind: str | None = None) -> list[Fit]:
    """Return how rows can be read, the best way first; at the least with things to fill in.

    Args:
        rows: some of the dataset's.
        path: names them in errors.
        kind: the only `type:` to try.

    Raises:
        ConfigError: for a `type:` that is unknown.
        DataError: for one that does not read the rows.
    """
    kinds = [kind] if kind else formats()
    for options in ({}, {"fields": _other_names(rows)}):
        if fits := [fit for name in kinds if (fit := try_format(name, rows, path, options))]:
            return sorted(fits, key=_rank)
    if kind not in (None, USER_DEFINED):
        format = make_format(kind, path, ["rating"], {})
        format.prompt_of(Row(rows[0], 1, format.source))  # says what is wrong, or:
        raise DataError(f"{path}: {kind} finds no rating in most of these rows; try another type.")
    return [describe(rows, path)]


def _rank(fit: Fit) -> tuple:
    # That one response was preferred is known of rated ones too.
    least = fit.type == USER_DEFINED, fit.dimensions == ["preference"]
    return *least, -fit.read, -len(fit.dimensions), -fit.values, fit.type


def try_format(
    kind: str, rows: list[dict[str, Any]], path: str, options: Mapping[str, Any]
) -> Fit | None:
    """Return how a format reads rows; None where it finds no rating in most of them."""
    made = getattr(importlib.import_module(module_of(kind, "type")).load, "makes", ())
    named = [name for paths in options.get("responses", ()) for name in paths]
    names = [*made, *named, *options.get("fields", ()), *_keys(rows[:5])]
    dimensions, read, values, used = [], 0, 0, set()
    for name in dict.fromkeys(names):
        if "/" in name or name != name.strip() or name in ("overall", "text") or not is_line(name):
            continue
        format = make_format(kind, path, [name], options)
        format.source.scales = {name: None}  # the published one is not everybody's
        format.source.fields = fields = _Used(format.source.fields)
        taken, ratings = _read(format, rows, name)
        if taken >= ENOUGH * len(rows) and is_rating(name, ratings):
            dimensions.append(name)
            read, values, used = max(read, taken), values + len(set(ratings)), used | fields.asked
    if not dimensions:
        return None
    kept = {name: own for name, own in options.get("fields", {}).items() if name in used}
    options = {key: value for key, value in options.items() if key != "fields"}
    options = ({"fields": kept} if kept else {}) | options
    return Fit(kind, options, dimensions, read, len(rows), values)


def _read(format: "DatasetFormat", rows: list[dict], name: str) -> tuple[int, list[float]]:
    """Return how many rows a format takes, and their ratings on a dimension."""
    taken, ratings = 0, []
    for number, row in enumerate(rows, start=1):
        try:
            prompt = format.prompt_of(Row(row, number, format.source))
        except DataError:
            if number - taken > (1 - ENOUGH) * len(rows):
                break
            continue
        taken += 1
        ratings += [r.ratings[name] for r in prompt.responses if r.ratings[name] is not None]
    return taken, ratings


def is_rating(name: str, values: list[float]) -> bool:
    """Return whether numbers can be ratings: not by their name, nor if each is there once."""
    whole = all(value == int(value) for value in values)
    counts = whole and len(values) > 20 and len(set(values)) == len(values)
    return bool(values) and not counts and not NO_RATING & set(_words(name))


def _other_names(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return, for our fields that the rows lack, what they have instead."""
    have = set(rows[0])
    lists = [value for value in rows[0].values() if isinstance(value, list)]
    inner = {key for items in lists for item in items if isinstance(item, Mapping) for key in item}
    found = {}
    for name, others in OTHER_NAMES.items():
        keys = inner if name in ("text", "scores") else have
        if name not in keys and (other := next((o for o in others if o in keys), None)):
            found[name] = other
    return found


def _keys(value: Any) -> Iterator[str]:
    """Yield the keys of nested values."""
    for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        if isinstance(name, str):
            yield name
        if isinstance(item, Mapping | list):
            yield from _keys(item)


def describe(rows: list[dict[str, Any]], path: str) -> Fit:
    """Return an entry of `amopo.user_defined`, and what is to be filled in by hand."""
    options, used = _listed(rows) or _beside(rows) or ({}, ())
    fill_in = []
    if (prompt := _prompt(rows[0], used)) is None:
        fill_in.append("template: the prompt, of the row's fields")
        prompt = {"template": f"{{{{ {FILL_IN} }}}}"}
    fields = prompt.get("fields", {}) | options.get("fields", {})
    options = prompt | options | ({"fields": fields} if fields else {})
    if not used:
        fill_in.append("responses: the path of each response's text, and of its ratings")
        options["responses"] = [{"text": FILL_IN, "rating": FILL_IN} for _ in "ab"]
    elif fit := try_format(USER_DEFINED, rows, path, options):
        return fit
    else:
        fill_in.append("a path for each response's ratings: the rows seem to have none")
    return Fit(USER_DEFINED, options, [], 0, len(rows), 0, fill_in)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the texts and numbers of a row, each with its path as `user_defined` takes it."""
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, item in items:
            yield from leaves(item, f"{path}.{name}" if path else str(name))
    elif value is not None:
        yield path, value


def _listed(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], list[str]] | None:
    """Return the entry's keys, and the row's that they use, for responses in a list of objects."""
    for key in rows[0]:
        lists = [row[key] for row in rows if isinstance(row.get(key), list)]
        items = [item for found in lists for item in found if isinstance(item, Mapping)]
        texts, numbers = _texts_and_numbers(items)
        if len(items) <= len(rows) or not texts or "role" in items[0]:
            continue
        fields = {"responses": key, "text": max(texts, key=texts.get)}
        fields |= {name: path for path, name in _names({p: _words(p) for p in numbers}).items()}
        return {"fields": {name: path for name, path in fields.items() if name != path}}, [key]
    return None


def _beside(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], list[str]] | None:
    """Return the same for rows with a field per response: answer_a, votes.1.help."""
    texts, numbers = _texts_and_numbers(rows)
    if not (families := _families(texts)):
        return None
    sides = max(families, key=lambda paths: sum(texts[path] for path in paths))
    rated = [paths for paths in _families(numbers) if len(paths) == len(sides)]
    # A dimension's name has neither what tells sides apart nor what the texts have too.
    words = {p[0]: [w for w in _words(p[0]) if w in _words(p[1])] for p in rated}
    names = _names({p: [w for w in own if w not in _words(sides[0])] for p, own in words.items()})
    responses = [
        {"text": text} | {names[paths[0]]: paths[i] for paths in rated}
        for i, text in enumerate(sides)
    ]
    used = [path.partition(".")[0] for paths in (sides, *rated) for path in paths]
    return {"responses": responses}, used


def _texts_and_numbers(values: list[Any]) -> tuple[dict[str, int], list[str]]:
    """Return the paths of texts, with their characters, and those of what can be ratings."""
    texts: dict[str, int] = defaultdict(int)
    numbers: dict[str, list[float]] = defaultdict(list)
    for path, leaf in (item for value in values for item in leaves(value)):
        try:
            numbers[path].append(int(float(leaf) * 1e6) / 1e6)
        except (ValueError, TypeError, OverflowError):  # OverflowError: of "inf"
            texts[path] += len(str(leaf))
    return texts, [p for p, found in numbers.items() if p not in texts and is_rating(p, found)]


def _families(paths: Collection[str]) -> list[list[str]]:
    """Return paths that differ in one word which tells sides apart, in the order of that word."""
    found: dict[tuple, dict[str, str]] = defaultdict(dict)
    for path in paths:
        for i, word in enumerate(words := _words(path)):
            if len(word) == 1 or word.isdecimal() or word in SIDES:
                found[(i, *words[:i], *words[i + 1 :])][word.zfill(9)] = path
    return [[sides[word] for word in sorted(sides)] for sides in found.values() if len(sides) > 1]


def _names(words: dict[str, list[str]]) -> dict[str, str]:
    """Return a name by path: its words, without those that all of them have."""
    if len(words) == 1:
        return {path: (own or ["rating"])[-1] for path, own in words.items()}
    shared = set.intersection(*map(set, words.values())) if words else set()
    return {p: "_".join(w for w in own if w not in shared) or "rating" for p, own in words.items()}


def _words(path: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Za-z]+|\d+", path)]


def _prompt(row: dict[str, Any], used: Collection[str]) -> dict[str, Any] | None:
    """Return the entry's keys that say where the prompt is; None where no text is left for it."""
    texts = [key for key, value in row.items() if key not in used and isinstance(value, str)]
    known = [key for key in texts if key in ("prompt", *OTHER_NAMES["prompt"])]
    if len(known) > 1:
        return {"template": "\n\n".join(f"{{{{ {key} }}}}" for key in known)}
    if "messages" in row or known == ["prompt"]:
        return {}
    longest = max(texts, key=lambda key: len(row[key]), default=None)
    return {"fields": {"prompt": (known or [longest])[0]}} if texts else None
