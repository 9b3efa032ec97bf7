"""Conversations -> token ids, through the model's own chat template."""

import os.path
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

from axolotl_amopo.data.rows import Message
from axolotl_amopo.errors import AMoPOError

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
        """Return token ids of a text; of the turns and words that it shares with earlier ones, from
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
        """Return token ids of a text as it stands behind a prompt.

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
        """Return token ids of a conversation up to where the response begins."""
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
        """Return token ids of a response: what the template writes after the generation prompt.

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
    """Return the text of a turn, and its thinking."""
    return {name: item for name, item in turn.items() if name != "role" and isinstance(item, str)}


def _check_rendered(turn: Message, text: str) -> None:
    """Raise ValueError where a template wrote less than the turn: some leave out thinking."""
    written = "".join(text.split())  # templates trim, and put thinking on lines of its own
    for name, item in _texts(turn).items():
        if "".join(item.split()) not in written:
            what = "text" if name == "content" else name
            raise ValueError(f"its {what} is not rendered by the chat template")
    for call in turn.get("tool_calls", ()):
        if str(call.get("function", call).get("name", "")) not in text:
            raise ValueError("its tool calls are not rendered by the chat template")


def _cuts(tokenizer: Any, template: str) -> re.Pattern:
    """Return where a text can be cut into turns whose ids, put together, are the text's.

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
    """Return whether no token spans two of `WORDS`.

    Then none is merged over their border either. Whether the tokenizer looks further than its
    tokens reach, such as for the end of a text, is for `PROBES` to show.
    """
    added = tokenizer.added_tokens_decoder.values()
    return not any(
        token.single_word or token.lstrip or token.rstrip or " " in token.content for token in added
    ) and not any(map(SPANNING.search, tokenizer.get_vocab()))


def _overlaps(other: str, token: str) -> bool:
    """Return whether `other` can begin before `token` in a text and end inside or behind it."""
    ends = (other[i:] for i in range(1, len(other)))
    return any(token.startswith(end) or end.startswith(token) for end in ends)
