"""A config -> the rated pairs to score, as training would prepare them."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from axolotl_amopo.commands.kit.prepare import prepared_anew
from axolotl_amopo.data.examples import as_text, prepare_row
from axolotl_amopo.data.format import DatasetFormat
from axolotl_amopo.data.pairing import Pair, PairRule
from axolotl_amopo.data.pipeline import Preparation
from axolotl_amopo.data.tokenizer import ChatTokenizer
from axolotl_amopo.errors import ConfigError
from axolotl_amopo.example import Example

Split = Literal["test", "train"]
RatedPair = tuple[DatasetFormat, PairRule, Pair]


@dataclass
class RatedPairs:
    """N pairs under K prompts and a last one without any instruction, P = K + 1.

    "First" is the response that wins overall.
    """

    names: list[str]  # [K] overall and the dimensions
    examples: list[Example]  # [N] with P criteria, those not wanted without a say
    labels: np.ndarray  # [N, K] 1 where the rating prefers the first, -1 the second, 0 neither
    gaps: np.ndarray  # [N, K] by how much, on 0 to 1; NaN where a rating is missing
    lengths: np.ndarray  # [N, 2] tokens of the two responses
    prompts: np.ndarray  # [N] which prompt a pair belongs to
    where: list[str]  # [N] file and row
    source: str  # which data this is, for people
    total: int  # pairs before `limit`
    unusable: int = 0  # of those, that fit no sequence, or whose responses have the same tokens

    def token_ids(self) -> set[int]:
        """Every id in them."""
        return {
            token
            for example in self.examples
            for ids in (*example.prompts, *example.responses)
            for token in ids
        }


def rated_pairs(
    cfg: Any,
    tokenizer: Any,
    *,
    split: Split = "test",
    limit: int | None = None,
    seed: int = 0,
    own: bool = True,
    plain: bool = True,
) -> RatedPairs:
    """Prepare a config's data anew, and take what is to be scored.

    Args:
        cfg: as axolotl loads it; changed here.
        split: `test` is `test_datasets`, else what `val_set_size` holds out, else, for want of
            better, the training set; `train` is what is trained on.
        limit: at most so many pairs, drawn by the seed.
        own, plain: whether to keep the prompts with their instructions, and the one without.

    Raises:
        AMoPOError: for data that training would refuse too.
    """
    if split == "train":
        source = "the training set"
        cfg.test_datasets = None
    elif cfg.test_datasets:
        source = "test_datasets"
        # Alone: the training set may be a hundred times as large.
        cfg.datasets, cfg.test_datasets, cfg.val_set_size = cfg.test_datasets, None, 0
        cfg.sequence_len = cfg.eval_sequence_len or cfg.sequence_len
    elif cfg.val_set_size:
        source = "what val_set_size holds out"
    else:
        source = "the training set (there is neither test_datasets nor val_set_size)"
    with prepared_anew(cfg, tokenizer) as (train, held_out, preparations):
        wanted = held_out if held_out is not None and split == "test" else train
        found: dict[int, list[RatedPair]] = {}
        for preparation in preparations:
            found |= pairs_by_example(preparation)
        chosen = [one for example in wanted["example_id"] for one in found[example]]
    total = len(chosen)
    if limit is not None and limit < total:
        drawn = np.random.default_rng(seed).choice(total, limit, replace=False)
        chosen = [chosen[i] for i in sorted(drawn)]
    if not chosen:
        raise ConfigError(f"There is nothing to score: {source} has no pairs.")
    formats = {id(format): format for format, *_ in chosen}
    chats = {key: format.chat_tokenizer() for key, format in formats.items()}
    made = [(one, example_of(*one, chats[id(one[0])], own=own, plain=plain)) for one in chosen]
    chosen = [one for one, example in made if example]
    examples = [example for _, example in made if example]
    if not chosen:
        raise ConfigError(
            f"There is nothing to score: no pair of {source} fits sequence_len; raise it."
        )
    numbers: dict[bytes, int] = {}
    return RatedPairs(
        names=chosen[0][0].config.criteria,
        examples=examples,
        labels=np.array([labels_of(*one) for one in chosen]),
        gaps=np.array([gaps_of(*one) for one in chosen]),
        lengths=np.array([list(map(len, example.responses)) for example in examples]),
        prompts=np.array(
            [numbers.setdefault(pair.prompt.key(), len(numbers)) for *_, pair in chosen]
        ),
        where=[format.where([pair]) for format, _, pair in chosen],
        source=source,
        total=total,
        unusable=len(made) - len(chosen),
    )


def pairs_by_example(preparation: Preparation) -> dict[int, list[RatedPair]]:
    """By example id, the pairs of every row that was prepared: none, one, or all of a prompt's."""
    groups = (group for _, groups in preparation.prompts() for group in groups)
    ids = dict(zip(preparation.kept, preparation.prepared["example_id"], strict=True))
    return {
        ids[number]: [
            (preparation.format, preparation.rule, pair) for pair in group if not pair.alone
        ]
        for number, group in enumerate(groups)
        if number in ids
    }


def example_of(
    format: DatasetFormat,
    rule: PairRule,
    pair: Pair,
    chat: ChatTokenizer,
    *,
    own: bool,
    plain: bool,
) -> Example | None:
    """Return a pair's example, with a criterion behind the others whose prompt has no instruction.

    That one is never longer than they are, so what is shortened is shortened as in training. None
    for a pair that training has in a group with others, from which a response was left out.
    """
    # Where weights stand in the prompts, each dimension is read where it has all the weight.
    row = as_text([pair], replace(rule, grid=True), format.where([pair]))
    count = len(format.config.criteria)
    kept = range(0, count * count, count + 1) if format.config.draws_weights else range(count)
    for name in ("reads", "signs", "points"):
        row[name] = [row[name][c] for c in kept]
    prompts = len(row["follows"]) // 2
    row["instructions"] = [*row["instructions"], ""]
    row["follows"] = [*row["follows"], *[len(row["instructions"]) - 1] * 2]
    row["reads"] = [*row["reads"], prompts]
    row["signs"] = [*(sign * own for sign in row["signs"]), int(plain)]
    row["points"] = [*row["points"], math.nan]
    row["ratings"] = [math.nan] * (2 * len(row["points"]))  # not needed here, nor the next two
    row["weights"], row["fit"] = [], []
    prepared = prepare_row(row, chat=chat, **format.tokenizing() | {"drop_bad": False})
    return Example.from_row(prepared) if prepared["prompt_ids"] else None


def labels_of(format: DatasetFormat, rule: PairRule, pair: Pair) -> list[int]:
    """Return [K], which response each rating prefers.

    With `winner: overall` training has the overall winner win under every prompt; here each
    dimension's own ratings count. Else as in training, so with `winner: nearest` the response is
    preferred whose rating is nearer to the one that is asked for.
    """
    if format.config.winner != "overall":
        return pair.signs
    own = [rule.gap(pair, name) for name in format.config.dimension_names]
    return [1] * format.config.overall + [int(np.sign(np.nan_to_num(value))) for value in own]


def gaps_of(format: DatasetFormat, rule: PairRule, pair: Pair) -> list[float]:
    """Return [K], by how much the first response's rating is the better one.

    Overall, it is the mean of the dimensions'.
    """
    own = [rule.gap(pair, name) for name in format.config.dimension_names]
    known = [value for value in own if not np.isnan(value)]
    overall = [float(np.mean(known)) if known else np.nan]
    return [*overall[: format.config.overall], *own]
