"""A config -> what its data is, counted from exactly what training would get."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from axolotl.cli.config import load_cfg
from axolotl.loaders import load_tokenizer
from axolotl.utils.data import prepare_datasets

from axolotl_amopo.data.pairs import Pair, PairRule, normalised
from axolotl_amopo.data.rows import RatedPrompt
from axolotl_amopo.data.strategy import TOO_LONG, AMoPOStrategy, Preparation
from axolotl_amopo.data.tokens import PairTokens, total
from axolotl_amopo.errors import ConfigError

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
class Example:
    """A pair, as the model sees it."""

    where: str
    ratings: list[dict[str, float | None]]  # of the overall winner, and of the other response
    seen: list[Seen]  # one a prompt
    responses: list[list[Text]]


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
    examples: list[Example] = field(default_factory=list)


@dataclass
class Report:
    """What `axolotl amopo inspect` shows."""

    config: str
    model: str
    sequence_len: int
    prompt_names: list[str]
    entries: list[Entry]
    train_rows: int
    eval_rows: int
    shared_prompts: int  # of the evaluation's pairs, those whose prompt is trained on too
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def watched() -> Iterator[list[Preparation]]:
    """The preparations that happen inside, in order."""
    seen: list[Preparation] = []
    AMoPOStrategy.observer = seen.append
    try:
        yield seen
    finally:
        AMoPOStrategy.observer = None


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
    with tempfile.TemporaryDirectory() as folder, watched() as preparations:
        cfg.dataset_prepared_path = folder  # what is prepared already says nothing of its making
        train, test, *_ = prepare_datasets(cfg, tokenizer)
        train_ids, test_ids = (
            list(dataset["example_id"]) if dataset is not None else [] for dataset in (train, test)
        )
        entries, prompt_of = [], {}
        for preparation in preparations:
            pairs = pairs_of(preparation)
            kept = [pairs[i] for i in preparation.kept]
            ids = preparation.prepared["example_id"]
            prompt_of |= {
                example: prompt_key(pair.prompt) for example, pair in zip(ids, kept, strict=True)
            }
            entry = describe(preparation, pairs)
            entry.examples = examples(preparation, kept, rows, find)
            entries.append(entry)
    trained = {prompt_of.get(example) for example in train_ids}
    report = Report(
        config=str(path),
        model=str(cfg.base_model),
        sequence_len=cfg.sequence_len,
        prompt_names=preparations[0].strategy.config.prompt_names,
        entries=entries,
        train_rows=len(train_ids),
        eval_rows=len(test_ids),
        shared_prompts=sum(prompt_of.get(example) in trained for example in test_ids),
    )
    report.warnings = list(warnings(report, bool(cfg.val_set_size)))
    return report


def pairs_of(preparation: Preparation) -> list[Pair]:
    """The pairs that were made, once more."""
    again: Counter = Counter()
    return [
        pair for prompt in preparation.prompts for pair in preparation.rule.pairs(prompt, again)
    ]


def prompt_key(prompt: RatedPrompt) -> str:
    return json.dumps(prompt.messages, sort_keys=True)


def describe(preparation: Preparation, pairs: list[Pair]) -> Entry:
    """The numbers of one entry."""
    strategy, rule, prompts = preparation.strategy, preparation.rule, preparation.prompts
    names = strategy.config.dimension_names
    responses = [response for prompt in prompts for response in prompt.responses]
    # NaN where a rating is missing.
    rated = np.array([[r.ratings[n] for n in names] for r in responses], dtype=float)  # [N, D]
    # By how much the overall winner is the better one; NaN where a rating is missing.
    gaps = np.array([[gap(rule, pair, n) for n in names] for pair in pairs])  # [P, D]
    lengths = np.array([[len(response_of(pair, side).text) for side in (0, 1)] for pair in pairs])
    longer = np.sign(lengths[:, 0] - lengths[:, 1])  # [P] 1 where the winner is the longer one
    ties = [strategy.config.overall and not pair.mask[0] for pair in pairs]
    tokens = [
        total(PairTokens(row["prompt_ids"], row["response_ids"], row["winners"]).longest())
        for row in preparation.prepared.select_columns(["prompt_ids", "response_ids", "winners"])
    ]
    sign = np.where([name in rule.lower for name in names], -1.0, 1.0)
    seen = Counter(map(prompt_key, prompts))
    texts = Counter(
        (prompt_key(pair.prompt), *sorted(response_of(pair, side).text for side in (0, 1)))
        for pair in pairs
    )
    return Entry(
        name=strategy.source.name,
        split="test" if strategy.eval_split else "train",
        rows=preparation.rows,
        prompts=len(prompts),
        responses=len(responses),
        pairs_made=len(pairs),
        pairs_kept=len(preparation.kept),
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
        | {"longest": max(tokens)},
        token_counts=steps(np.array(tokens), 0, strategy.sequence_len, LENGTH_STEPS),
        too_long=preparation.dropped[TOO_LONG],
        repeated_prompts=sum(count - 1 for count in seen.values()),
        repeated_pairs=sum(count - 1 for count in texts.values()),
    )


def response_of(pair: Pair, side: int) -> Any:
    return pair.prompt.responses[pair.responses[side]]


def gap(rule: PairRule, pair: Pair, name: str) -> float:
    winner, loser = (response_of(pair, side).ratings[name] for side in (0, 1))
    if winner is None or loser is None:
        return np.nan
    scale, lower = rule.scales[name], name in rule.lower
    return round(normalised(winner, scale, lower) - normalised(loser, scale, lower), 9)


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


def examples(
    preparation: Preparation, kept: list[Pair], rows: int, find: str | None
) -> list[Example]:
    """The first pairs (with a text in them), decoded from their token ids."""
    strategy = preparation.strategy
    made: list[Example] = []
    for i, pair in enumerate(kept):
        if len(made) == rows:
            break
        responses = [response_of(pair, side) for side in (0, 1)]
        if find is not None and not any(
            find in text
            for text in (
                *(message["content"] for message in pair.prompt.messages),
                *(response.text for response in responses),
            )
        ):
            continue
        row = preparation.prepared[i]
        texts = strategy.instructions(pair, preparation.rule.scales)
        sides = len(row["prompt_ids"]) // len(pair.winners)
        made.append(
            Example(
                where=strategy.where(pair),
                ratings=[response.ratings for response in responses],
                seen=[
                    Seen(
                        prompt=name,
                        weighs=bool(pair.mask[k]),
                        chosen=pair.winners[k],
                        pieces=pieces(
                            strategy.tokenizer,
                            row["prompt_ids"][k * sides],
                            "text",
                            texts[k * sides],
                        ),
                    )
                    for k, name in enumerate(strategy.config.prompt_names)
                ],
                responses=[
                    pieces(strategy.tokenizer, ids, "response") for ids in row["response_ids"]
                ],
            )
        )
    return made


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


def warnings(report: Report, split_off: bool) -> Iterator[str]:
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
            "val_set_size splits pairs, not prompts; use test_datasets."
            if split_off
            else "the two sets have prompts in common."
        )
        yield (
            f"{report.shared_prompts} of {report.eval_rows} pairs of the evaluation have a prompt "
            f"that is trained on: {how}"
        )
