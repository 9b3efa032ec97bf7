"""An example as text -> a prepared row: what the preparing processes do.

A prepared row is an `Example` (`Example.to_row`) with the conversation as text, and a column that
says what came of it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from jinja2 import TemplateError

from axolotl_amopo.data.pairing import Pair, PairRule
from axolotl_amopo.data.prompts import Place, instructed, last_user_turn, prompted
from axolotl_amopo.data.rows import Message
from axolotl_amopo.data.tokenizer import ChatTokenizer
from axolotl_amopo.errors import DataError
from axolotl_amopo.example import Example, flat

BAD_PAIR = "pairs that can't be tokenised (bad_rows: drop)"
TOO_LONG = "pairs longer than sequence_len"
SHORTENED = "pairs shortened to sequence_len"
LEFT_OUT = "pairs without a response, longer than sequence_len"
ALIKE = "pairs whose responses the chat template writes alike"

# Truncation leaves at least this much of the end of a long question (or all of a short one).
MIN_QUESTION_TOKENS = 32

_IDS, _SIGNS = List(Value("int32")), List(Value("int8"))
_ARRANGED = {
    "follows": _IDS,
    "comparisons": _IDS,
    "reads": _IDS,
    "signs": _SIGNS,
    "ratings": List(Value("float32")),
    "points": List(Value("float32")),
    "weights": List(Value("float32")),
    "fit": List(Value("float32")),
}
# An example as text.
PLAIN = Features(
    {
        "messages": Value("string"),
        "tools": Value("string"),
        "responses": List(Value("string")),
        "instructions": List(Value("string")),
        "where": Value("string"),
    }
    | _ARRANGED
)
# Stated, because `datasets` infers them from the first thousand rows, which may all be dropped.
FEATURES = Features(
    {
        "input_ids": _IDS,
        "labels": _IDS,
        "attention_mask": _SIGNS,
        "prompt_ids": List(_IDS),
        "response_ids": List(_IDS),
    }
    | _ARRANGED
    | {"example_id": Value("int64"), "outcome": Value("string")}
    # The conversation without an instruction and its tools, as JSON: what else can be asked of it.
    | {name: PLAIN[name] for name in ("messages", "tools")}
)


def as_text(pairs: list[Pair], rule: PairRule, where: str) -> dict[str, Any]:
    """Return the row of `PLAIN` that has all pairs of an example."""
    prompt = pairs[0].prompt
    vectors = rule.weight_vectors(pairs)
    made = prompted(pairs, rule.config, rule.scales, vectors)
    times = max(1, len(vectors))  # every criterion is there once per vector
    return {
        "messages": json.dumps(prompt.messages),
        "tools": json.dumps(prompt.tools),
        "responses": [json.dumps(prompt.responses[index].turn) for index in made.used],
        "instructions": made.instructions,
        "where": where,
        "follows": flat(made.follows),
        "comparisons": flat(made.comparisons),
        "reads": flat(made.reads),
        "signs": flat(made.signs),
        "ratings": flat(rule.ratings(prompt, index) * times for index in made.used),
        "points": rule.points() * times,
        "weights": flat(vectors) or prompt.weights or [],
        "fit": [rule.fit(prompt, index, asks) for asks in made.asks for index in made.used],
    }


def prepare_rows(batch: Mapping[str, list], **settings: Any) -> dict[str, list]:
    """Return `prepare_row` of a batch, columns to columns."""
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
    own: bool = False,
    least: int = 2,
) -> dict[str, Any]:
    """Return an example's prepared row.

    Its `outcome` says why it is to be dropped, or that it was shortened; it is empty otherwise.
    `messages` and `tools` are those of `row`, also of an example that was shortened.

    Args:
        row: of `PLAIN`.
        chat: renders and tokenises.
        sequence_len: the most tokens of a prompt and a response.
        excess_length: `drop`, `truncate` or `raise`.
        drop_bad: whether what can't be tokenised is dropped instead of raised.
        place: of the instruction.
        own: whether a prompt states each response's own rating (`rating_in_prompt: own`).
        least: how few responses are worth keeping of an example that has all of its prompt's, where
            the others are too long.

    Raises:
        DataError: naming file and row.
    """
    where, messages = row["where"], json.loads(row["messages"])
    asked = {name: row[name] for name in ("messages", "tools")}

    def tokenize(conversation: list[Message]) -> Example:
        return tokenize_example(chat, row, conversation, place)

    outcome = ""
    example: Example | None
    try:
        example = tokenize(messages)
        if _tokens(example) > sequence_len:
            outcome = TOO_LONG
            if excess_length == "truncate":
                example = shorten(tokenize, chat, messages, sequence_len)
                outcome = SHORTENED if example else TOO_LONG
            elif excess_length == "drop":
                example = _fitting(example, sequence_len, least)
                outcome = LEFT_OUT if example else TOO_LONG
    except DataError:
        if not drop_bad:
            raise
        example, outcome = None, BAD_PAIR
    if example and len(example.comparisons) == 1 and _has_alike(example):
        example, outcome = None, ALIKE
    if outcome == TOO_LONG and excess_length == "raise":
        prompt, response = map(len, example.longest())
        raise DataError(
            f"{where}: a prompt of {prompt} tokens (with its instruction) and a response of "
            f"{response} are more than sequence_len, {sequence_len}; raise it, or write "
            "excess_length_strategy: drop."
        )
    if example is None:
        nothing = {name: [] for name in FEATURES}
        counted = {"comparisons": row["comparisons"], "outcome": outcome}
        return nothing | {"example_id": 0} | counted | asked
    example.id = example_id(example, own)
    return example.to_row() | {"outcome": outcome} | asked


def tokenize_example(
    chat: ChatTokenizer, row: Mapping[str, Any], messages: list[Message], place: Place
) -> Example:
    """Return the example of a row of `PLAIN`: every prompt and every response tokenised once.

    Args:
        messages: in place of the row's own.

    Raises:
        DataError: where the chat template refuses the conversation, or a response's text can't
            stand in it.
    """
    where, tools = row["where"], json.loads(row["tools"])
    try:
        prompts = [
            chat.prompt_ids(instructed(messages, text, place), tools)
            for text in row["instructions"]
        ]
        plain = chat.render(messages, tools, generation_prompt=True)
        ids = {
            turn: chat.response_ids(messages, json.loads(turn), tools, plain)
            for turn in dict.fromkeys(row["responses"])
        }
    except TemplateError as error:
        raise DataError(
            f"{where}: the chat template refuses this conversation ({error}); mend the row, or "
            "choose another `chat_template:`."
        ) from None
    except ValueError as error:
        raise DataError(f"{where}: the response can't be used: {error}.") from None
    responses = [ids[turn] for turn in row["responses"]]
    return Example.from_row(
        {"prompt_ids": prompts, "response_ids": responses, "example_id": 0}
        | {name: row[name] for name in _ARRANGED}
    )


def shorten(
    tokenize: Callable[[list[Message]], Example],
    chat: ChatTokenizer,
    messages: list[Message],
    sequence_len: int,
) -> Example | None:
    """Make an example fit `sequence_len` without losing the question's end, the instruction or the
    template.

    Earlier turns go first, oldest first (a system message stays), then the beginning of the
    question, the same for every prompt, and last the responses' ends (which then have no EOS).

    Returns:
        None where not even that leaves a token of every response, or two of a pair become alike.
    """
    example = tokenize(messages)
    while _tokens(example) > sequence_len:
        first = 1 if messages[0]["role"] == "system" else 0
        turn = last_user_turn(messages)
        if turn <= first:
            break
        following = range(first + 1, turn + 1)
        cut = next(i for i in following if messages[i]["role"] == "user")
        messages = [*messages[:first], *messages[cut:]]
        example = tokenize(messages)

    turn = last_user_turn(messages)
    while (excess := _tokens(example) - sequence_len) > 0:
        question = messages[turn]["content"].rstrip()
        offsets = chat.tokenizer(
            question, add_special_tokens=False, return_offsets_mapping=True
        ).offset_mapping
        spare = len(offsets) - MIN_QUESTION_TOKENS
        if spare <= 0:
            break
        start = offsets[min(excess, spare)][0] or 1
        shorter = {**messages[turn], "content": question[start:].lstrip()}
        messages = [*messages[:turn], shorter, *messages[turn + 1 :]]
        example = tokenize(messages)

    longest = sequence_len - max(map(len, example.prompts))
    if longest < 1:
        return None
    example.responses = [ids[:longest] for ids in example.responses]
    return None if _has_alike(example) else example


def _fitting(example: Example, sequence_len: int, least: int) -> Example | None:
    """Return an example of all responses of a prompt without those that are too long.

    None for an example of pairs, and where fewer than `least` responses are left.
    """
    if all(a != b for a, b in example.comparisons):
        return None
    long = {
        n
        for text, n in example.places(silent=True)
        if len(example.prompts[text]) + len(example.responses[n]) > sequence_len
    }
    kept = [n for n in range(len(example.responses)) if n not in long]
    return example.only(kept) if len(kept) >= least else None


def _has_alike(example: Example) -> bool:
    pairs = ((a, b) for a, b in example.comparisons if a != b)
    return any(example.responses[a] == example.responses[b] for a, b in pairs)


def _tokens(example: Example) -> int:
    """Return the tokens of the longest sequence."""
    return sum(map(len, example.longest()))


def example_id(example: Example, own: bool) -> int:
    """Return 63 bits of the example's content, which seed its random draws.

    The content is written as version 0.1 wrote pairs, so that a run that was begun then goes on
    with the same draws.
    """
    prompts: list[list[int]] = []
    for p in range(len(example.comparisons)):
        for c in range(example.criteria):
            places = example.winner_first(p, c)
            prompts += [example.prompts[text] for text, _ in places[: 1 + own]]
    signs = flat(example.signs)
    content = json.dumps(
        [
            prompts,
            [example.responses[n] for n in flat(example.comparisons)],
            [int(sign < 0) for sign in signs],
            [int(sign != 0) for sign in signs],
        ]
    )
    digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # fits a signed 64-bit column


def outcomes(prepared: Dataset) -> Iterator[tuple[str, int]]:
    """Yield what came of every example, and how many pairs it has; 0 if all responses are alone.

    Read from the files a batch at a time: what is read through a dataset's memory mapping counts
    as this process's memory for as long as the dataset lives.
    """
    columns = ["outcome", "comparisons"]
    options = pa.ipc.IpcReadOptions(
        included_fields=[prepared.column_names.index(n) for n in columns]
    )
    for file in prepared.cache_files:
        with (
            pa.OSFile(file["filename"]) as source,
            pa.ipc.open_stream(source, options=options) as it,
        ):
            for batch in it:
                counts = pairs_of(batch["comparisons"])
                yield from zip(batch["outcome"].to_pylist(), counts.tolist(), strict=True)


def pairs_of(comparisons: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Return how many pairs each row of the column has; a response with itself is none."""
    first, second = pc.list_flatten(comparisons).to_numpy().reshape(-1, 2).T
    ends = pc.list_value_length(comparisons).to_numpy().cumsum() // 2
    pairs = np.concatenate([[0], np.cumsum(first != second)])
    return np.diff(pairs[ends], prepend=0)


def unpack(batch: Mapping[str, list]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch of columns."""
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))
