"""A dataset -> what a config has to say of it: format, dimensions, conflicts, lengths, splits."""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from axolotl.utils.data.shared import get_dataset_type, load_dataset_with_config
from axolotl.utils.dict import DictDefault
from datasets import Dataset, DatasetDict, disable_progress_bars

from axolotl_amopo.config.loading import check_loads
from axolotl_amopo.data.detect import Fit, detect, leaves, make_format
from axolotl_amopo.data.pairing import normalised
from axolotl_amopo.data.pipeline import Survey, read_prompts, survey_rows
from axolotl_amopo.data.rows import Row
from axolotl_amopo.errors import ConfigError, DataError, did_you_mean

# On so many rows the formats are tried. The choice is looked at with all rows.
SAMPLE = 50
# Of a prompt's responses, so many are compared with each other.
COMPARED = 20
# The share of rows to hold out, and the most of them.
HELD_OUT, MOST_HELD_OUT = 0.1, 500
# The share of pairs about which dimensions disagree, from which on each names its own winner.
MUCH = 0.1
# Words in the name of a dimension in which less is better.
LOWER = {"severity", "toxicity", "toxic", "harm", "harmful", "error", "errors", "violation", "risk"}
CHARACTERS_PER_TOKEN = 4


@dataclass
class Dimension:
    """A dimension, as the data has it."""

    name: str
    span: tuple[float, float]  # lowest and highest rating
    scale: tuple[float, float]
    known: bool  # whether the format says the scale
    lower: bool  # whether lower ratings are better
    by_name: bool  # whether that is a guess from its name


@dataclass
class Look:
    """What `axolotl amopo init` finds in a dataset. Shares are of 0 to 1."""

    path: str
    name: str | None
    fit: Fit
    runners_up: list[str]
    split: str | None
    held_out: str | None  # split of the evaluation
    rows: int
    sample: list[str]  # fields of the first row, for what is to be filled in
    shared_prompts: int = 0  # prompts that are on both sides
    prompts: int = 0
    responses: int = 0
    pairs: int = 0  # of different texts, of one prompt
    dimensions: list[Dimension] = field(default_factory=list)
    constant: list[str] = field(default_factory=list)  # dimensions left out: all ratings are equal
    # Pairs of dimensions, with the share of pairs for which they name different winners, of those
    # for which both name one; the largest first.
    conflicts: list[tuple[str, str, float]] = field(default_factory=list)
    disagree: float = 0.0  # share of pairs for which any two dimensions do
    decided: int = 0  # pairs of which the mean of the ratings, or the data, names the winner
    missing: int = 0  # ratings
    bad: int = 0  # rows that the format can't read
    bad_row: str = ""  # what is wrong with the first of them
    tokens: dict[str, int] = field(default_factory=dict)  # of prompt and longest response
    counted: str = ""  # how the tokens were counted
    scattered: bool = False  # whether no cut between rows, or no cut at all, keeps prompts apart

    @property
    def winner(self) -> str:
        """Return `amopo.winner`: dimensions that disagree often each name their own."""
        each = len(self.dimensions) > 1 and (self.disagree >= MUCH or not self.decided)
        return "per_dimension" if each else "overall"


def look(
    data: str,
    *,
    kind: str | None = None,
    split: str | None = None,
    name: str | None = None,
    dimensions: Collection[str] = (),
    model: str | None = None,
) -> Look:
    """Read a dataset once or twice and return what was found.

    Args:
        data: a file, a folder or a hub name.
        kind: the `type:`, by default the one that fits best.
        split: to train on.
        name: of a hub dataset's configuration.
        dimensions: those to take, by default all that vary.
        model: whose tokenizer counts, if it is on this machine.

    Raises:
        AMoPOError: for data that can't be loaded, or names that it does not have.
    """
    loaded = load(data, name)
    split, held_out = _splits(data, loaded, split)
    saved = any((Path(data) / name).exists() for name in ("state.json", "dataset_dict.json"))
    train = loaded[split] if isinstance(loaded, DatasetDict) else loaded
    if not len(train):
        raise DataError(f"{data}: is empty: no rows to train on.")
    rows = list(train.select(range(min(SAMPLE, len(train)))))
    fit, *others = detect(rows, data, kind)
    shown = [f"{p}: {repr(v)[:60]}" for p, v in islice(leaves(rows[0]), 20)]
    found = Look(data, name, fit, list(map(str, others)), split, held_out, len(train), shown)
    if fit.fill_in:
        return found
    for asked in dimensions:
        if asked not in fit.dimensions:
            hint = did_you_mean(asked, fit.dimensions)
            raise ConfigError(
                f"--dimensions: {data} has no ratings of '{asked}'.{hint} It has "
                f"{', '.join(fit.dimensions)}."
            )
    format, survey = _survey(found, train, dimensions)
    spans = [survey.spans]
    if held_out:
        with contextlib.suppress(DataError):  # it need not have every dimension
            spans.append(_survey(found, loaded[held_out], dimensions)[1].spans)
    example = next(i for i in range(len(train)) if i not in survey.bad)
    _describe_dimensions(found, format, spans, train[example], keep=bool(dimensions))
    if survey.bad:
        found.bad, first = len(survey.bad), min(survey.bad)
        found.bad_row = _problem(format, train[first], first + 1)
    found.scattered = saved and not held_out  # axolotl takes no part of what `save_to_disk` wrote
    ranges = _measure(found, format, train, survey, model)
    if not held_out and not saved:
        _cut(found, ranges, format.one_response_per_row)
    return found


def load(data: str, name: str | None) -> Dataset | DatasetDict:
    """Return a dataset as axolotl will load it.

    Raises:
        AMoPOError: saying why it can't be loaded.
    """
    entry = {"path": data, "name": name}
    kind = get_dataset_type(DictDefault(entry))
    if Path(data).is_file() and kind == "text":
        raise DataError(f"{data}: is text, not JSONL, JSON, Parquet or CSV.")
    disable_progress_bars()
    try:
        check_loads(entry, data)
    except DataError as error:
        if Path(data).suffix in (".jsonl", ".json", ".csv", ".parquet", ".arrow"):
            raise
        raise DataError(f"{data}: is no JSONL, JSON, Parquet or CSV file ({error})") from None
    try:
        return load_dataset_with_config(DictDefault(entry), None)
    except Exception as error:  # by kind of damage, `datasets` raises a dozen different ones
        why = str(error).strip().partition("\n")[0]
        what = "can't be loaded" if Path(data).exists() else "no file or folder, nor a hub dataset"
        raise DataError(f"{data}: {what}: {why}") from None


def _splits(data: str, loaded: Any, asked: str | None) -> tuple[str | None, str | None]:
    """Return the splits to train on and to hold out."""
    if not isinstance(loaded, DatasetDict):
        if asked not in (None, "train"):
            raise ConfigError(f"--split {asked}: {data} has no splits; leave it out.")
        return ("train" if Path(data).is_file() else None), None
    names = list(loaded)
    split = asked or next((s for s in ("train", *names) if s in names and "train" in s), names[0])
    if split not in names:
        raise ConfigError(f"--split {split}: {data} has {', '.join(names)}.")
    held_out = (split.replace("train", o) for o in ("validation", "val", "dev", "eval", "test"))
    return split, next((other for other in held_out if other in names and other != split), None)


def _survey(found: Look, dataset: Dataset, dimensions: Collection[str]) -> tuple[Any, Survey]:
    """Return a format that takes every number for a rating, and what it says of all rows."""
    names = [n for n in found.fit.dimensions if not dimensions or n in dimensions]
    format = make_format(found.fit.type, found.path, names, found.fit.options)
    format.published, format.source.scales = format.source.scales, dict.fromkeys(names)
    return format, survey_rows(format, dataset, Counter())


def _describe_dimensions(
    found: Look, format: Any, spans: list[dict], example: dict[str, Any], *, keep: bool
) -> None:
    """Set the dimensions that vary; all of them where the user named them, or none does."""
    lower = format.lower()
    for name in format.source.dimensions:
        ends = [end for span in spans if name in span for end in span[name]]
        low, high = min(ends), max(ends)
        scale = format.published[name]
        known = scale is not None and scale[0] <= low and high <= scale[1]
        if known:  # but yes and no are on a scale of 0 to 1
            format.source.scales[name] = scale
            known = not _problem(format, example, 1)
            format.source.scales[name] = None
        if not known:
            scale = (low // 1, max(-(-high // 1), low // 1 + 1))
        guess = name not in lower and bool(LOWER & set(re.findall("[a-z]+", name.lower())))
        found.dimensions.append(
            Dimension(name, (low, high), scale, known, guess or name in lower, guess)
        )
    for dimension in found.dimensions:  # those that end alike begin alike
        alike = [d for d in found.dimensions if not d.known and d.scale[1] == dimension.scale[1]]
        if dimension in alike:
            dimension.scale = (min(d.scale[0] for d in alike), dimension.scale[1])
    varied = [d for d in found.dimensions if d.span[0] < d.span[1]]
    if varied and not keep:
        found.constant = [d.name for d in found.dimensions if d not in varied]
        found.dimensions = varied


def _problem(format: Any, values: dict[str, Any], number: int) -> str:
    try:
        format.prompt_of(Row(values, number, format.source))
    except DataError as error:
        return str(error)
    return ""


def _measure(
    found: Look, format: Any, dataset: Dataset, survey: Survey, model: str | None
) -> list[tuple[int, int, bool]]:
    """Set the counts of prompts, pairs, conflicts and lengths.

    Returns:
        Of every prompt the first and the last row, from 0, and whether a pair of it has a winner.
    """
    size = len(found.dimensions)
    opposed, both = np.zeros((size, size)), np.zeros((size, size))
    ranges: dict[bytes, list[int]] = {}
    lengths, texts, differ = [], [], 0
    for prompt in read_prompts(format, dataset, survey):
        found.responses += len(prompt.responses)
        different = list({str(r.turn): r for r in prompt.responses}.values())[:COMPARED]
        shares = [[_share(r.ratings[d.name], d) for d in found.dimensions] for r in different]
        rated = np.array(shares, dtype=float)  # [N, D]
        found.missing += int(np.isnan(rated).sum())
        first, second = np.triu_indices(len(different), 1)
        gaps = np.nan_to_num(rated[first] - rated[second]).round(9)  # [P, D]
        products = gaps[:, :, None] * gaps[:, None, :]  # [P, D, D]
        opposed += (products < 0).sum(0)
        both += (products != 0).sum(0)
        found.pairs += len(gaps)
        differ += int((products < 0).any((1, 2)).sum())
        means = gaps.mean(1).round(9)
        decided = len(gaps) if prompt.ordered else int((means != 0).sum())
        found.decided += decided
        places = ranges.setdefault(prompt.key(), [min(prompt.rows) - 1, 0, 0, 0])
        places[1] = max(prompt.rows) - 1
        places[2] += decided
        places[3] += int(gaps.any(1).sum())
        question = "\n".join(str(message["content"]) for message in prompt.messages)
        answer = max((r.text for r in prompt.responses), key=len)
        lengths.append(len(question) + len(answer))
        texts += [question, answer] if len(texts) < 4 * SAMPLE else []
    found.prompts, found.disagree = len(ranges), differ / max(1, found.pairs)
    names = [d.name for d in found.dimensions]
    with np.errstate(invalid="ignore"):
        shares = np.nan_to_num(opposed / both)
    found.conflicts = sorted(
        ((names[i], names[j], float(shares[i, j])) for i in range(size) for j in range(i)),
        key=lambda item: -item[2],
    )
    per_token, found.counted = characters_per_token(texts, model)
    found.tokens = {
        name: int(np.percentile(lengths, share) / per_token) + 1
        for name, share in (("50%", 50), ("99%", 99), ("longest", 100))
    }
    which = 2 if found.winner == "overall" else 3
    return [(places[0], places[1], places[which] > 0) for places in ranges.values()]


def _share(rating: float | None, dimension: Dimension) -> float:
    """Return a rating on 0..1 with 1 the better end, NaN where it is missing."""
    if rating is None:
        return math.nan
    return normalised(rating, dimension.scale, dimension.lower)


def _cut(found: Look, ranges: list[tuple[int, int, bool]], one_response_per_row: bool) -> None:
    """Set the splits to parts of the rows that share no prompt, or as few as can be."""
    wanted = int(min(found.rows * HELD_OUT, MOST_HELD_OUT))
    if not wanted:
        return
    steps = np.zeros(found.rows + 2, dtype=int)
    for first, last, _ in ranges:
        steps[first + 1] += 1
        steps[last + 1] -= 1
    crossing = steps.cumsum()  # by where rows are cut: how many prompts are on both sides
    places = range(found.rows - 2 * wanted, found.rows - wanted // 2)
    cut = min(places, key=lambda row: (crossing[row], abs(row - found.rows + wanted)))
    if crossing[cut] and one_response_per_row:
        found.scattered = True
        return
    decided = [(first, last) for first, last, has in ranges if has]
    if not any(last < cut for _, last in decided) or not any(first >= cut for first, _ in decided):
        return
    found.shared_prompts = int(crossing[cut])
    whole = found.split or "train"
    found.split, found.held_out = f"{whole}[:{cut}]", f"{whole}[{cut}:]"


def characters_per_token(texts: list[str], model: str | None) -> tuple[float, str]:
    """Return the mean of some texts, and how it was found: by the tokenizer if it is here."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    file = Path(str(model)) / "tokenizer.json"
    if model and not file.is_file():
        with contextlib.suppress(HFValidationError):
            file = try_to_load_from_cache(model, "tokenizer.json")
    if not model or not isinstance(file, str | Path) or not Path(file).is_file():
        return CHARACTERS_PER_TOKEN, f"estimated, {CHARACTERS_PER_TOKEN} characters per token"
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(file)).encode_batch_fast(texts, add_special_tokens=False)
    tokens = sum(len(encoding.ids) for encoding in made)
    return sum(map(len, texts)) / max(1, tokens), "by the model's tokenizer, on some of the rows"
