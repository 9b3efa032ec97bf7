"""A config -> what its data is, counted from exactly what training would get."""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from axolotl.cli.config import load_cfg
from axolotl.loaders import load_tokenizer

from axolotl_amopo.commands.kit.prepare import prepared_anew
from axolotl_amopo.data.examples import TOO_LONG
from axolotl_amopo.data.pairing import Pair
from axolotl_amopo.data.pipeline import Preparation
from axolotl_amopo.data.prompts import instruction_of
from axolotl_amopo.errors import ConfigError
from axolotl_amopo.example import Example
from axolotl_amopo.training.run_log import versions
from axolotl_amopo.training.sampler import pairs_in, row_items

# More different ratings than this are counted in so many steps of the scale.
MOST_VALUES = 10
LENGTH_STEPS = 12
# A share of pairs won by the longer response from which on people should know of it.
LONG_WINS = 0.65


@dataclass
class Text:
    """A piece of what the model sees."""

    kind: str  # special, text, instruction, response
    text: str


@dataclass
class Seen:
    """A pair under one of its prompts, as the model sees it."""

    prompt: str  # overall, or a dimension
    weighs: bool  # false where the dimension says nothing about this pair
    chosen: int  # which of the pair's two responses wins here
    pieces: list[Text]


@dataclass
class ShownExample:
    """A pair, as the model sees it."""

    where: str
    ratings: list[dict[str, float | None]]  # of each response
    seen: list[Seen]  # one a prompt
    responses: list[list[Text]]  # the overall winner, the other; or one that is in no pair


@dataclass
class Entry:
    """What one `datasets:` (or `test_datasets:`) entry gave. Shares are of 0 to 1."""

    name: str
    split: str  # train or test
    rows: int
    prompts: int
    responses: int
    pairs_made: int
    pairs_kept: int
    groups_kept: int | None  # training examples, with amopo.group_by_prompt
    prompts_per_example: float  # the different ones, with their instructions, on average
    dropped: dict[str, int]
    scales: dict[str, tuple[float, float]]
    lower_is_better: list[str]
    ratings: dict[str, list[tuple[str, int]]]  # by dimension: a rating, and how often it is there
    missing: dict[str, int]
    # By dimension and dimension: the share of pairs for which they name different winners, of those
    # for which both name one.
    disagreement: dict[str, dict[str, float | None]]
    correlation: dict[str, dict[str, float | None]]  # of the ratings, 1 being the better end
    longer_wins: dict[str, float | None]  # by prompt: share of pairs won by the longer text
    tokens: dict[str, int]  # of a pair's longest sequence
    token_counts: list[tuple[str, int]]
    too_long: int
    repeated_prompts: int  # prompts that stand in more than one row (of formats with all in a row)
    repeated_pairs: int
    examples: list[ShownExample] = field(default_factory=list)


@dataclass
class Report:
    """What `axolotl amopo inspect` shows."""

    config: str
    model: str
    sequence_len: int
    prompt_names: list[str]
    rating_levels: int | None  # to which the prompts' ratings are rounded
    entries: list[Entry]
    train_rows: int
    eval_rows: int
    shared_prompts: int  # of the evaluation's pairs, those whose prompt is trained on too
    versions: dict[str, str]
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def gather(path: str, rows: int = 3, find: str | None = None) -> Report:
    """Prepare a config's data anew, as `axolotl preprocess` would, and count what is in it.

    Args:
        rows: how many pairs of each entry to show.
        find: only pairs that have this text in their prompt or a response.

    Raises:
        AMoPOError: for a config or a row that training would refuse too.
    """
    cfg = load_cfg(path, is_preprocess=True)
    if not (cfg.amopo and cfg.amopo.enabled):
        raise ConfigError(f"{path}: has no `rl: amopo`; there is nothing to inspect.")
    tokenizer = load_tokenizer(cfg)
    with prepared_anew(cfg, tokenizer) as (train, test, preparations):
        train_ids, test_ids = (
            list(dataset["example_id"]) if dataset is not None else [] for dataset in (train, test)
        )
        entries, prompt_of = [], {}
        for preparation in preparations:
            entry, prompts = describe(preparation, rows, find)
            entries.append(entry)
            prompt_of |= prompts
    trained = {prompt_of.get(example) for example in train_ids}
    report = Report(
        config=str(path),
        model=str(cfg.base_model),
        sequence_len=cfg.sequence_len,
        prompt_names=preparations[0].format.config.criteria,
        rating_levels=preparations[0].format.config.rating_levels,
        entries=entries,
        train_rows=len(train_ids),
        eval_rows=len(test_ids),
        shared_prompts=sum(prompt_of.get(example) in trained for example in test_ids),
        versions=versions(),
    )
    pairs_split = bool(cfg.val_set_size) and not cfg.amopo.group_by_prompt
    report.warnings = list(warnings(report, pairs_split))
    return report


def digest(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def describe(
    preparation: Preparation, rows: int = 0, find: str | None = None
) -> tuple[Entry, dict[int, bytes]]:
    """The numbers of one entry, its first `rows` examples (with a text in them), and by example id
    the prompt of each row of training."""
    format, rule, prepared = preparation.format, preparation.rule, preparation.prepared
    names = format.config.dimension_names
    row_of = {number: row for row, number in enumerate(preparation.kept)}
    ids = prepared["example_id"][:]
    # Flat: of every response its ratings; of every pair by how much the overall winner is the
    # better one in each dimension, and the two lengths. NaN where a rating is missing.
    rated, gaps, lengths, ties = array("d"), array("d"), array("d"), []
    seen: Counter[bytes] = Counter()
    texts: Counter[bytes] = Counter()
    examples: list[ShownExample] = []
    prompt_of: dict[int, bytes] = {}
    number = responses = 0
    for prompt, groups in preparation.prompts():
        key = prompt.key()
        seen[key] += 1
        responses += len(prompt.responses)
        for response in prompt.responses:
            values = (response.ratings[name] for name in names)
            rated.extend(np.nan if value is None else value for value in values)
        for pairs in groups:
            for pair in pairs:
                if pair.alone:
                    continue
                gaps.extend(rule.gap(pair, name) for name in names)
                both = [response_of(pair, side).text for side in (0, 1)]
                lengths.extend(map(len, both))
                ties.append(format.config.overall and not pair.signs[0])
                texts[key + digest(sorted(both))] += 1
            row = row_of.get(number)
            number += 1
            if row is None:
                continue
            prompt_of[ids[row]] = key
            if len(examples) < rows and (find is None or has_text(pairs, find)):
                examples.append(example(preparation, pairs, prepared[row]))

    rated, gaps = (np.array(flat).reshape(-1, len(names)) for flat in (rated, gaps))  # [N or P, D]
    lengths = np.array(lengths).reshape(-1, 2)
    longer = np.sign(lengths[:, 0] - lengths[:, 1])  # [P] 1 where the winner is the longer one
    tokens = row_items(prepared, "input_ids")
    sign = np.where([name in rule.lower for name in names], -1.0, 1.0)
    entry = Entry(
        name=format.source.name,
        split="test" if format.eval_split else "train",
        rows=len(preparation.dataset),
        prompts=preparation.survey.prompts,
        responses=responses,
        pairs_made=len(ties),
        pairs_kept=pairs_in(prepared),
        groups_kept=len(prepared) if format.config.group_by_prompt else None,
        prompts_per_example=float(row_items(prepared, "prompt_ids").mean()),
        dropped=dict(preparation.dropped),
        scales=dict(rule.scales),
        lower_is_better=sorted(rule.lower & set(names)),
        ratings={n: histogram(rated[:, d], rule.scales[n]) for d, n in enumerate(names)},
        missing={n: int(np.isnan(rated[:, d]).sum()) for d, n in enumerate(names)},
        disagreement=matrix(names, lambda a, b: agree(gaps[:, a], -gaps[:, b])),
        correlation=matrix(
            names, lambda a, b: correlate(rated[:, a], rated[:, b], sign[a] * sign[b])
        ),
        longer_wins={"overall": agree(longer, np.where(ties, 0.0, 1.0))}
        | {n: agree(longer, gaps[:, d]) for d, n in enumerate(names)},
        tokens={f"{p}%": int(np.percentile(tokens, p)) for p in (5, 50, 95)}
        | {"longest": int(max(tokens))},
        token_counts=steps(tokens, 0, format.sequence_len, LENGTH_STEPS),
        too_long=preparation.dropped[TOO_LONG]
        + preparation.dropped[TOO_LONG.replace("pairs", "prompts")],
        repeated_prompts=sum(count - 1 for count in seen.values()),
        repeated_pairs=sum(count - 1 for count in texts.values()),
        examples=examples,
    )
    return entry, prompt_of


def response_of(pair: Pair, side: int) -> Any:
    return pair.prompt.responses[pair.responses[side]]


def matrix(names: list[str], value: Any) -> dict[str, dict[str, float | None]]:
    return {a: {b: value(i, j) for j, b in enumerate(names)} for i, a in enumerate(names)}


def agree(first: np.ndarray, second: np.ndarray) -> float | None:
    """Share of the pairs for which two signs are the same, of those for which both are known."""
    product = np.nan_to_num(first * second)
    return float((product > 0).sum() / (product != 0).sum()) if product.any() else None


def correlate(first: np.ndarray, second: np.ndarray, sign: float) -> float | None:
    both = ~(np.isnan(first) | np.isnan(second))
    first, second = first[both], second[both]
    if len(first) < 2 or not (first.std() and second.std()):
        return None
    return float(sign * np.corrcoef(first, second)[0, 1])


def histogram(values: np.ndarray, scale: tuple[float, float]) -> list[tuple[str, int]]:
    """How often each rating is there; of many different ones, how often each step of the scale."""
    values = values[~np.isnan(values)]
    found, counts = np.unique(values, return_counts=True)
    if len(found) > MOST_VALUES:
        return steps(values, *scale, MOST_VALUES)
    return [(f"{value:g}", int(count)) for value, count in zip(found, counts, strict=True)]


def steps(values: np.ndarray, low: float, high: float, count: int) -> list[tuple[str, int]]:
    counts, edges = np.histogram(values, bins=count, range=(low, high))
    return [
        (f"{a:.4g} to {b:.4g}", int(n)) for (a, b), n in zip(pairwise(edges), counts, strict=True)
    ]


def has_text(pairs: list[Pair], find: str) -> bool:
    prompt = pairs[0].prompt
    used = {i for pair in pairs for i in pair.responses}
    return any(find in str(message["content"]) for message in prompt.messages) or any(
        find in prompt.responses[i].text for i in used
    )


def example(preparation: Preparation, pairs: list[Pair], row: dict[str, Any]) -> ShownExample:
    """Return a prepared row, decoded from its token ids; of a group, its first pair."""
    format, rule, pair = preparation.format, preparation.rule, pairs[0]
    made = Example.from_row(row)
    count = sum(not one.alone for one in pairs)
    sides = (0,) if pair.alone else (0, 1)
    seen = []
    for c, name in enumerate(format.config.criteria):
        ratings = pair.target or response_of(pair, pair.winner(c)).ratings
        weights = made.weights[: len(rule.scales)]  # of the first prompt
        text = instruction_of(format.config, rule.scales, c, ratings, weights)
        ids = made.prompts[made.winner_first(0, c)[0][0]]
        seen.append(
            Seen(
                prompt=name,
                weighs=bool(pair.signs[c]),
                chosen=pair.winner(c),
                pieces=pieces(format.tokenizer, ids, "text", text),
            )
        )
    return ShownExample(
        where=format.where(pairs) + (f" (1 of {count} pairs)" if count > 1 else ""),
        ratings=[response_of(pair, side).ratings for side in sides],
        seen=seen,
        responses=[
            pieces(format.tokenizer, made.responses[made.comparisons[0][side]], "response")
            for side in sides
        ],
    )


def pieces(tokenizer: Any, ids: list[int], kind: str, instruction: str = "") -> list[Text]:
    """Token ids as text, special tokens and the instruction set apart."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    runs: list[tuple[bool, list[int]]] = []
    for token in ids:
        if token in special or not runs or runs[-1][0]:
            runs.append((token in special, [token]))
        else:
            runs[-1][1].append(token)
    made: list[Text] = []
    for is_special, run in runs:
        text = tokenizer.decode(run, skip_special_tokens=False)
        before, found, after = text.partition(instruction) if instruction else (text, "", "")
        if is_special:
            made.append(Text("special", text))
        else:
            parts = [(kind, before), ("instruction", found), (kind, after)]
            made += [Text(name, part) for name, part in parts if part]
    return made


def warnings(report: Report, pairs_split: bool) -> Iterator[str]:
    """What people should know before they train on it."""
    for entry in report.entries:
        for name, value in entry.longer_wins.items():
            if value is not None and value >= LONG_WINS:
                yield (
                    f"{entry.name}: by {name}, the longer response wins {value:.0%} of the pairs; "
                    "the model may learn length."
                )
        for name, counts in entry.ratings.items():
            if counts and max(count for _, count in counts) > 0.9 * sum(n for _, n in counts):
                top = max(counts, key=lambda item: item[1])[0]
                yield f"{entry.name}: nine of ten ratings of {name} are {top}; it says little."
        if entry.too_long > 0.05 * entry.pairs_made:
            yield (
                f"{entry.name}: {entry.too_long} of {entry.pairs_made} pairs are longer than "
                f"sequence_len, {report.sequence_len}."
            )
        if entry.repeated_pairs:
            yield f"{entry.name}: {entry.repeated_pairs} pairs stand there more than once."
    if report.shared_prompts:
        how = (
            "val_set_size splits pairs, not prompts; use test_datasets, or "
            "amopo.group_by_prompt: true."
            if pairs_split
            else "the two sets have prompts in common."
        )
        yield (
            f"{report.shared_prompts} of {report.eval_rows} pairs of the evaluation have a prompt "
            f"that is trained on: {how}"
        )
