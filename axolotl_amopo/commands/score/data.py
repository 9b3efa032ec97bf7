"""A config -> the rated pairs to score, as training would prepare them."""

import tempfile
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from axolotl.utils.data import prepare_datasets

from axolotl_amopo.commands.inspect.gather import gap, prompt_key, watched
from axolotl_amopo.data.examples import prepare_row
from axolotl_amopo.data.format import AMoPOStrategy, Preparation
from axolotl_amopo.data.pairing import Pair, PairRule
from axolotl_amopo.data.tokenizer import ChatTokenizer
from axolotl_amopo.errors import ConfigError

Split = Literal["test", "train"]
RatedPair = tuple[AMoPOStrategy, PairRule, Pair]


@dataclass
class RatedPairs:
    """N pairs under K prompts and a last one without any instruction, P = K + 1.

    "First" is the response that wins overall.
    """

    names: list[str]  # [K] overall and the dimensions
    rows: list[dict[str, Any]]  # [N] prepared rows with P prompts, those not wanted masked
    labels: np.ndarray  # [N, K] 1 where the rating prefers the first, -1 the second, 0 neither
    gaps: np.ndarray  # [N, K] by how much, on 0 to 1; NaN where a rating is missing
    lengths: np.ndarray  # [N, 2] tokens of the two responses
    prompts: np.ndarray  # [N] which prompt a pair belongs to
    where: list[str]  # [N] file and row
    source: str  # which data this is, for people
    total: int  # pairs before `limit`

    def token_ids(self) -> set[int]:
        """Every id in them."""
        return {
            token
            for row in self.rows
            for ids in (*row["prompt_ids"], *row["response_ids"])
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
    with tempfile.TemporaryDirectory() as folder, watched() as preparations:
        cfg.dataset_prepared_path = folder  # what is prepared already lacks the ratings
        train, held_out, *_ = prepare_datasets(cfg, tokenizer)
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
    strategies = {id(strategy): strategy for strategy, *_ in chosen}
    chats = {key: strategy.chat_tokenizer() for key, strategy in strategies.items()}
    rows = [row_of(*one, chats[id(one[0])], own=own, plain=plain) for one in chosen]
    numbers: dict[bytes, int] = {}
    return RatedPairs(
        names=chosen[0][0].config.prompt_names,
        rows=rows,
        labels=np.array([labels_of(*one) for one in chosen]),
        gaps=np.array([gaps_of(*one) for one in chosen]),
        lengths=np.array([[len(ids) for ids in row["response_ids"]] for row in rows]),
        prompts=np.array(
            [numbers.setdefault(prompt_key(pair.prompt), len(numbers)) for *_, pair in chosen]
        ),
        where=[strategy.where([pair]) for strategy, _, pair in chosen],
        source=source,
        total=total,
    )


def pairs_by_example(preparation: Preparation) -> dict[int, list[RatedPair]]:
    """By example id, the pairs of every row that was prepared: one, or all of a prompt's."""
    groups = (group for _, groups in preparation.prompts() for group in groups)
    ids = dict(zip(preparation.kept, preparation.prepared["example_id"], strict=True))
    return {
        ids[number]: [(preparation.strategy, preparation.rule, pair) for pair in group]
        for number, group in enumerate(groups)
        if number in ids
    }


def row_of(
    strategy: AMoPOStrategy,
    rule: PairRule,
    pair: Pair,
    chat: ChatTokenizer,
    *,
    own: bool,
    plain: bool,
) -> dict[str, Any]:
    """A pair's prepared row, with a prompt that has no instruction behind the others.

    That one is never longer than they are, so what is shortened is shortened as in training.
    """
    text = strategy.as_text([pair], rule.scales)
    sides = len(text["instructions"]) // len(pair.winners)
    text["instructions"] = [*text["instructions"], *[""] * sides]
    text["winners"] = [*text["winners"], 0]
    text["dimension_mask"] = [*(int(own and keep) for keep in pair.mask), int(plain)]
    return prepare_row(
        text,
        chat=chat,
        sequence_len=strategy.sequence_len,
        excess_length=strategy.excess_length(),
        drop_bad=False,
        place=strategy.config.instruction_place,
    )


def labels_of(strategy: AMoPOStrategy, rule: PairRule, pair: Pair) -> list[int]:
    """[K] which response each rating prefers.

    With `winner: per_dimension` as in training. With `winner: overall` training has the overall
    winner win under every prompt; here each dimension's own ratings count.
    """
    if strategy.config.winner == "per_dimension":
        return [(1 - 2 * w) * keep for w, keep in zip(pair.winners, pair.mask, strict=True)]
    own = [gap(rule, pair, name) for name in strategy.config.dimension_names]
    return [1] * strategy.config.overall + [int(np.sign(np.nan_to_num(value))) for value in own]


def gaps_of(strategy: AMoPOStrategy, rule: PairRule, pair: Pair) -> list[float]:
    """[K] by how much the first response's rating is the better one; overall, the mean of these."""
    own = [gap(rule, pair, name) for name in strategy.config.dimension_names]
    known = [value for value in own if not np.isnan(value)]
    overall = [float(np.mean(known)) if known else np.nan]
    return [*overall[: strategy.config.overall], *own]
