"""From a pair (or a group of them) as text to a prepared row: what worker processes do.

A prepared row holds, beside `input_ids`, `labels` and `attention_mask` of the pair's longest
sequence (what axolotl's own length handling and statistics read):

    prompt_ids      [K] or [2K] lists of ids, see `PairTokens`
    response_ids    [2] lists of ids, overall winner first
    winners         [K] which response wins under each prompt
    dimension_mask  [K] 0 where a prompt weighs nothing for this pair
    example_id      64 bits of the ids' hash; seeds the pair's random draws

With `amopo.group_by_prompt` a row holds all pairs of a prompt, in each of these lists one pair
after the other.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from axolotl_amopo.data.tokenizer import (
    ChatTokenizer,
    PairTokens,
    Place,
    shorten,
    tokenize_pair,
    total,
)
from axolotl_amopo.errors import DataError

BAD_PAIR = "pairs that can't be tokenised (bad_rows: drop)"
TOO_LONG = "pairs longer than sequence_len"
SHORTENED = "pairs shortened to sequence_len"
ALIKE = "pairs whose responses the chat template writes alike"

_IDS, _FLAGS = List(Value("int32")), List(Value("int8"))
# A pair (or a group of them) as text.
PLAIN = Features(
    {
        "messages": Value("string"),
        "tools": Value("string"),
        "responses": List(Value("string")),
        "instructions": List(Value("string")),
        "winners": _FLAGS,
        "dimension_mask": _FLAGS,
        "where": Value("string"),
    }
)

# Stated, because `datasets` infers them from the first thousand rows, which may all be dropped.
FEATURES = Features(
    {
        "input_ids": _IDS,
        "labels": _IDS,
        "attention_mask": _FLAGS,
        "prompt_ids": List(_IDS),
        "response_ids": List(_IDS),
        "winners": _FLAGS,
        "dimension_mask": _FLAGS,
        "example_id": Value("int64"),
        "outcome": Value("string"),
    }
)


def prepare_rows(batch: Mapping[str, list], **settings: Any) -> dict[str, list]:
    """`prepare_row` for a batch, columns to columns."""
    rows = [prepare_row(row, **settings) for row in unpack(batch)]
    return {name: [row[name] for row in rows] for name in FEATURES}


def prepare_row(
    row: dict[str, Any],
    *,
    chat: ChatTokenizer,
    sequence_len: int,
    excess_length: str,
    drop_bad: bool,
    place: Place = "before",
) -> dict[str, Any]:
    """One pair's prepared row; `outcome` says why it is to be dropped, empty where it isn't."""
    where = row["where"]
    messages, tools = json.loads(row["messages"]), json.loads(row["tools"])
    responses = [json.loads(turn) for turn in row["responses"]]

    def tokenize(conversation: list[dict]) -> PairTokens:
        return tokenize_pair(
            chat,
            conversation,
            responses,
            row["instructions"],
            row["winners"],
            where,
            place,
            tools,
        )

    outcome = ""
    pair: PairTokens | None
    try:
        pair = tokenize(messages)
        if total(pair.longest()) > sequence_len:
            outcome = TOO_LONG
            if excess_length == "truncate":
                pair = shorten(tokenize, chat, messages, sequence_len)
                outcome = SHORTENED if pair else TOO_LONG
            elif excess_length == "drop":
                pair = None
    except DataError:
        if not drop_bad:
            raise
        pair, outcome = None, BAD_PAIR
    if pair and len(pair.responses) == 2 and pair.responses[0] == pair.responses[1]:
        pair, outcome = None, ALIKE
    if outcome == TOO_LONG and excess_length == "raise":
        prompt, response = map(len, pair.longest())
        raise DataError(
            f"{where}: a prompt of {prompt} tokens (with its instruction) and a response of "
            f"{response} are more than sequence_len, {sequence_len}; raise it, or write "
            "excess_length_strategy: drop."
        )
    if pair is None:
        pair = PairTokens([[]] * len(row["instructions"]), [[], []], row["winners"])

    prompt, response = pair.longest()
    return {
        "input_ids": prompt + response,
        "labels": [-100] * len(prompt) + response,
        "attention_mask": [1] * (len(prompt) + len(response)),
        "prompt_ids": pair.prompts,
        "response_ids": pair.responses,
        "winners": row["winners"],
        "dimension_mask": row["dimension_mask"],
        "example_id": _example_id(pair, row["dimension_mask"]),
        "outcome": outcome,
    }


def _example_id(pair: PairTokens, dimension_mask: list[int]) -> int:
    content = json.dumps([pair.prompts, pair.responses, pair.winners, dimension_mask])
    digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # fits a signed 64-bit column


def outcomes(prepared: Dataset) -> Iterator[tuple[str, int]]:
    """What came of every example, and how many responses it has.

    Read from the files a batch at a time: what is read through a dataset's memory mapping counts
    as this process's memory for as long as the dataset lives.
    """
    columns = ["outcome", "response_ids"]
    options = pa.ipc.IpcReadOptions(
        included_fields=[prepared.column_names.index(n) for n in columns]
    )
    for file in prepared.cache_files:
        with (
            pa.OSFile(file["filename"]) as source,
            pa.ipc.open_stream(source, options=options) as it,
        ):
            for batch in it:
                responses = pc.list_value_length(batch["response_ids"])
                yield from zip(batch["outcome"].to_pylist(), responses.to_pylist(), strict=True)


def unpack(batch: Mapping[str, list]) -> Iterator[dict[str, Any]]:
    """The rows of a batch of columns."""
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))
