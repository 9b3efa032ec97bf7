"""Pairs -> token ids, through the model's own chat template."""

import json
import os.path
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import batched, chain, pairwise
from typing import Any, Literal

from jinja2 import TemplateError

from axolotl_amopo.data.rows import Message
from axolotl_amopo.errors import AMoPOError, DataError

# Truncation leaves at least this much of the end of a long question (or all of a short one).
MIN_QUESTION_TOKENS = 32
# Pieces of text whose ids are remembered, and their characters: enough for a language's words and
# for all that a prompt's pairs share.
KNOWN_PIECES, KNOWN_CHARACTERS = 1 << 16, 1 << 22
KNOWN_TURNS = 1 << 10

NOWHERE, WHOLE = re.compile("(?!)"), re.compile("(?s:.+)")
# Words with what hangs on them: a text is cut before a space that has a letter behind it and
# anything in ASCII but white space before it.
WORDS = re.compile("(?s: ?(?:[^ ]++|(?<![!-~]) | (?![A-Za-z]))++)")
# A token that spans such a place; vocabularies write a space as one of these.
SPANNING = re.compile("[!-~][ Ġ▁][A-Za-z]")
# What a tokenizer must write alike in pieces and as a whole before it is cut at words.
PROBES = (
    "all these words of one plain line are written in small letters",
    "So, what's this for you'll ask, don't you? He'd say: it isn't mine.",
    "Your answer will be rated on honesty, from 0 to 4.\n\nIs it so?\n\n\n  or not at all \n",
    " a  text with   many    spaces\tand tabs \t in it\r\nand lines of ten or 10000 things  ",
    "mixed Case, CamelCase words and ALL of them; x = f(y) if not done else g[1:2] # why is it",
    "ein schöner Tag für die naïve Café señor mañana und so weiter 好的 это так 🙂 ok then so",
    "the end of it all-in-one 'quoted words here' \"and also those\" (in here) [as there] {is so}",
)

Place = Literal["before", "after", "system"]
Tools = list[dict[str, Any]] | None
Turn = str | Message  # see `Response.turn`


@dataclass
class ChatTokenizer:
    """Renders conversations with the chat template and turns them into token ids.

    A prompt begins with one BOS token if the tokenizer adds one by itself, and a response ends
    with one EOS token, or with one of the config's `eot_tokens` where the template closes a turn
    with that.
    """

    tokenizer: Any
    template: str
    template_kwargs: Mapping[str, Any]
    eot_tokens: tuple[str, ...] = ()

    def __post_init__(self):
        # A first call also ends the truncation and padding that a tokenizer's file may ask for.
        first, bos = self.tokenizer("a").input_ids[:1], self.tokenizer.bos_token_id
        self._bos = bos if first == [bos] else None
        self._eos = self.tokenizer.eos_token
        # Some tokenizers name few special tokens and mark the others in their vocabulary alone.
        added = self.tokenizer.added_tokens_decoder.values()
        marked = [token.content for token in added if token.special]
        self._special = (*self.tokenizer.all_special_tokens, *marked)
        if self._eos is None:
            raise AMoPOError(
                f"The tokenizer of {self.tokenizer.name_or_path} has no EOS token, so a response "
                "could not end; name one under `special_tokens:`, e.g. eos_token: </s>."
            )
        self._direct = self.tokenizer.is_fast and not self.tokenizer.split_special_tokens
        self._known: dict[str, list[int]] = {}
        self._known_turns: dict[str, list[int]] = {}
        self._characters = 0
        self._cuts, self._words = NOWHERE, WHOLE
        if self._direct:
            self._cuts = _cuts(self.tokenizer, self.template)
            if _has_words(self.tokenizer):
                self._words = WORDS
                if any(self.ids(text) != self._encode([text])[0] for text in PROBES):
                    self._words = WHOLE
                self._known.clear()
                self._known_turns.clear()

    def render(self, messages: list[Message], tools: Tools, *, generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self.template,
            add_generation_prompt=generation_prompt,
            tokenize=False,
            **self.template_kwargs,
        )

    def ids(self, text: str) -> list[int]:
        """Token ids of a text; of the turns and words that it shares with earlier ones, from
        memory."""
        return list(chain.from_iterable(map(self._turn_ids, self._turns(text))))

    def _turn_ids(self, turn: str) -> list[int]:
        known = self._known_turns
        ids = known.get(turn)
        if ids is None:
            if len(known) == KNOWN_TURNS:
                known.clear()
            ids = known[turn] = self._word_ids(turn)
        return ids

    def _word_ids(self, turn: str) -> list[int]:
        known = self._known
        pieces = self._words.findall(turn)
        if new := [piece for piece in dict.fromkeys(pieces) if piece not in known]:
            self._characters += sum(map(len, new))
            if len(known) + len(new) > KNOWN_PIECES or self._characters > KNOWN_CHARACTERS:
                known.clear()
                new = list(dict.fromkeys(pieces))
                self._characters = sum(map(len, new))
            known.update(zip(new, self._encode(new), strict=True))
        return list(chain.from_iterable([known[piece] for piece in pieces]))

    def ids_behind(self, prompt: str, text: str) -> list[int]:
        """Token ids of a text as it stands behind a prompt.

        Some tokenizers write a text's beginning in another way than what follows. The prompt's last
        piece is enough to see it.
        """
        *_, end = self._turns(prompt)
        head, ids = self.ids(end), self.ids(end + text)
        return ids[len(head) :] if ids[: len(head)] == head else self.ids(text)

    def _turns(self, text: str) -> list[str]:
        cuts = [0, *(match.start() for match in self._cuts.finditer(text)), len(text)]
        return [text[start:end] for start, end in pairwise(cuts)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if self._direct:  # what the tokenizer's own call would do, in two thirds of the time
            backend = self.tokenizer.backend_tokenizer
            return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
        return self.tokenizer(texts, add_special_tokens=False).input_ids

    def prompt_ids(self, messages: list[Message], tools: Tools = None) -> list[int]:
        """Token ids of a conversation up to where the response begins."""
        ids = self.ids(self.render(messages, tools, generation_prompt=True))
        if self._bos is not None:
            while ids[:2] == [self._bos, self._bos]:
                ids = ids[1:]
            if ids[:1] != [self._bos]:
                ids = [self._bos, *ids]
        return ids

    def response_ids(
        self, messages: list[Message], response: Turn, tools: Tools = None, prompt: str = ""
    ) -> list[int]:
        """Token ids of a response: what the template writes after the generation prompt.

        Args:
            prompt: the rendered conversation, where it is known already.

        Raises:
            ValueError: where the template leaves out some of it, or its text has the EOS token.
        """
        prompt = prompt or self.render(messages, tools, generation_prompt=True)
        turn = {"role": "assistant", "content": response} if isinstance(response, str) else response
        whole = self.render([*messages, turn], tools, generation_prompt=False)
        if not whole.startswith(prompt):
            # A generation prompt that the template doesn't write into a whole conversation, such
            # as an opened <think>: the response starts where another one would differ.
            texts = {name: item for name, item in _texts(turn).items() if item}
            other = {"role": turn["role"], "content": "\0"} | dict.fromkeys(texts, "\0")
            start = self.render([*messages, other], tools, generation_prompt=False)
            begun, prompt = prompt, os.path.commonprefix([whole, start])  # noqa: RUF071
            if len(texts) > 1 and (ended := begun[len(prompt) :].strip()):
                raise ValueError(f"it thinks, but the generation prompt ends with {ended!r}")
            begins = any(whole.startswith(item.strip(), len(prompt)) for item in texts.values())
            if not begins and "tool_calls" not in turn:
                raise ValueError("its text is not rendered by the chat template")
        text = whole[len(prompt) :]
        _check_rendered(turn, text)
        ids = self.ids_behind(prompt, self._close(text, turn["content"]))
        if self.tokenizer.eos_token_id in ids[:-1]:
            raise ValueError(f"its text contains the end-of-sequence token {self._eos}")
        return ids

    def _close(self, text: str, response: str) -> str:
        # Templates write a newline after the turn's end; the model stops before it.
        stripped = text.rstrip()
        if stripped.endswith((self._eos, *self.eot_tokens)):
            return stripped
        if stripped.endswith(self._special):
            return stripped + self._eos
        if response and text.startswith(response) and not text[len(response) :].strip():
            text = response  # no end of turn in the template, but white space
        return text + self._eos


def _texts(turn: Message) -> dict[str, str]:
    """The text of a turn, and its thinking."""
    return {name: item for name, item in turn.items() if name != "role" and isinstance(item, str)}


def _check_rendered(turn: Message, text: str) -> None:
    """Raises ValueError where a template wrote less than the turn: some leave out thinking."""
    written = "".join(text.split())  # templates trim, and put thinking on lines of its own
    for name, item in _texts(turn).items():
        if "".join(item.split()) not in written:
            what = "text" if name == "content" else name
            raise ValueError(f"its {what} is not rendered by the chat template")
    for call in turn.get("tool_calls", ()):
        if str(call.get("function", call).get("name", "")) not in text:
            raise ValueError("its tool calls are not rendered by the chat template")


def _cuts(tokenizer: Any, template: str) -> re.Pattern:
    """Where a text can be cut into turns whose ids, put together, are the text's.

    A fast tokenizer splits a text at its added tokens before anything else, and normalises and
    tokenises what stands between two of them by itself. So a turn can begin at any of them that
    the template writes, except those that are found in normalised text only, that take white space
    before them along, or that may be overlapped by another added token.
    """
    added = tokenizer.added_tokens_decoder.values()
    if any(token.single_word for token in added):  # found or not by what stands beside them
        return NOWHERE
    cuts = [
        re.escape(text)
        for text in (token.content for token in added if not token.normalized)
        if (text in template or text in (tokenizer.bos_token, tokenizer.eos_token))
        and not any(other.lstrip for other in added if other.content.startswith(text))
        and not any(_overlaps(other.content, text) for other in added)
    ]
    return re.compile("|".join(cuts)) if cuts else NOWHERE


def _has_words(tokenizer: Any) -> bool:
    """Whether no token spans two of `WORDS`.

    Then none is merged over their border either. Whether the tokenizer looks further than its
    tokens reach, such as for the end of a text, is for `PROBES` to show.
    """
    added = tokenizer.added_tokens_decoder.values()
    return not any(
        token.single_word or token.lstrip or token.rstrip or " " in token.content for token in added
    ) and not any(map(SPANNING.search, tokenizer.get_vocab()))


def _overlaps(other: str, token: str) -> bool:
    """Whether `other` can begin before `token` in a text and end inside or behind it."""
    ends = (other[i:] for i in range(1, len(other)))
    return any(token.startswith(end) or end.startswith(token) for end in ends)


def instructed(messages: list[Message], instruction: str, place: Place = "before") -> list[Message]:
    """The conversation with the instruction in the turn of its last question, or in the system
    message."""
    if not instruction:
        return messages
    if place == "system":
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": instruction}, *messages]
        return [_joined(messages[0], messages[0]["content"], instruction), *messages[1:]]
    index = last_user_turn(messages)
    parts = [instruction, messages[index]["content"]]
    if place == "after":
        parts.reverse()
    return [*messages[:index], _joined(messages[index], *parts), *messages[index + 1 :]]


def _joined(message: Message, *parts: str) -> Message:
    return {**message, "content": "\n\n".join(parts)}


def last_user_turn(messages: list[Message]) -> int:
    return max(i for i, message in enumerate(messages) if message["role"] == "user")


@dataclass
class PairTokens:
    """Token ids of one pair under K prompts, or of the P pairs of a group, one after the other."""

    prompts: list[list[int]]  # [PK] or [2PK]: with two a dimension, winner's then loser's prompt
    responses: list[list[int]]  # [2P] overall winner, overall loser
    winners: list[int]  # [PK] which response wins under each prompt

    def sequences(self) -> list[tuple[list[int], list[int]]]:
        """(prompt, response) PK times two: for every prompt its winner, then its loser."""
        return [
            (pair.prompts[k * sides + side % sides], pair.responses[winner ^ side])
            for pair in self.pairs()
            for sides in [len(pair.prompts) // len(pair.winners)]
            for k, winner in enumerate(pair.winners)
            for side in (0, 1)
        ]

    def pairs(self) -> list["PairTokens"]:
        """Every pair by itself."""
        count = len(self.responses) // 2
        if count == 1:
            return [self]
        parts = (
            map(list, batched(part, len(part) // count))
            for part in (self.prompts, self.responses, self.winners)
        )
        return [PairTokens(*lists) for lists in zip(*parts, strict=True)]

    def longest(self) -> tuple[list[int], list[int]]:
        """The sequence with the most tokens."""
        return max(self.sequences(), key=total)


def total(sequence: tuple[list[int], list[int]]) -> int:
    """Tokens of a (prompt, response) sequence."""
    return len(sequence[0]) + len(sequence[1])


def tokenize_pair(
    chat: ChatTokenizer,
    messages: list[Message],
    responses: list[Turn],
    instructions: list[str],
    winners: list[int],
    where: str,
    place: Place = "before",
    tools: Tools = None,
) -> PairTokens:
    """Tokenise a pair or a group: every prompt once per instruction, every response once.

    Args:
        instructions: texts in the order of `PairTokens.prompts`.
        where: file and row, for the error's text.
        place: of the instruction, before or after the question or in the system message.
        tools: that the conversation may call.

    Raises:
        DataError: where the chat template refuses the conversation, or a response's text can't
            stand in it.
    """
    try:
        prompts = {
            text: chat.prompt_ids(instructed(messages, text, place), tools)
            for text in dict.fromkeys(instructions)
        }
        plain = chat.render(messages, tools, generation_prompt=True)
        keys = [turn if isinstance(turn, str) else json.dumps(turn) for turn in responses]
        ids = {
            key: chat.response_ids(messages, turn, tools, plain)
            for key, turn in dict(zip(keys, responses, strict=True)).items()
        }
    except TemplateError as error:
        raise DataError(
            f"{where}: the chat template refuses this conversation ({error}); mend the row, or "
            "choose another `chat_template:`."
        ) from None
    except ValueError as error:
        raise DataError(f"{where}: the response can't be used: {error}.") from None
    return PairTokens([prompts[t] for t in instructions], [ids[key] for key in keys], winners)


def shorten(
    tokenize: Callable[[list[Message]], PairTokens],
    chat: ChatTokenizer,
    messages: list[Message],
    sequence_len: int,
) -> PairTokens | None:
    """Make a pair fit `sequence_len` without losing the question's end, the instruction or the
    template.

    Earlier turns go first, oldest first (a system message stays), then the beginning of the
    question, the same for every prompt, and last the responses' ends (which then have no EOS).

    Returns:
        None where not even that leaves a token of both responses.
    """
    pair = tokenize(messages)
    while total(pair.longest()) > sequence_len:
        first = 1 if messages[0]["role"] == "system" else 0
        turn = last_user_turn(messages)
        if turn <= first:
            break
        following = range(first + 1, turn + 1)
        cut = next(i for i in following if messages[i]["role"] == "user")
        messages = [*messages[:first], *messages[cut:]]
        pair = tokenize(messages)

    turn = last_user_turn(messages)
    while (excess := total(pair.longest()) - sequence_len) > 0:
        question = messages[turn]["content"].rstrip()
        offsets = chat.tokenizer(
            question, add_special_tokens=False, return_offsets_mapping=True
        ).offset_mapping
        room = len(offsets) - MIN_QUESTION_TOKENS
        if room <= 0:
            break
        start = offsets[min(excess, room)][0] or 1
        shorter = {**messages[turn], "content": question[start:].lstrip()}
        messages = [*messages[:turn], shorter, *messages[turn + 1 :]]
        pair = tokenize(messages)

    room = sequence_len - max(map(len, pair.prompts))
    if room < 1:
        return None
    pair.responses = [ids[:room] for ids in pair.responses]
    alike = any(one.responses[0] == one.responses[1] for one in pair.pairs())
    return None if alike else pair
