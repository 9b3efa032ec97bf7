"""Conversations -> token ids, through the model's own chat template."""

import os.path
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

from jinja2 import TemplateError

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

# The assistant's turns that a template may close differently, by the role that follows them.
CALL = {"type": "function", "function": {"name": "answer", "arguments": {}}}
TURNS: dict[str, Message] = {
    "user": {"role": "assistant", "content": "answer"},
    "tool": {"role": "assistant", "content": "", "tool_calls": [CALL]},
}

Tools = list[dict[str, Any]] | None
Turn = str | Message  # see `Response.turn`


@dataclass
class ChatTokenizer:
    """Renders conversations with the chat template and turns them into token ids.

    Token ids are those of `apply_chat_template(tokenize=True)`: a prompt has the BOS tokens that
    the template writes. A response ends where generation stops: at the first stop token that the
    template writes behind it, else at the added token that the template closes the turn with. Only
    where it writes none does one follow that it doesn't write.

    Args:
        eot_tokens: axolotl's key, tokens that close a turn.
        stops: the tokens at which the model's generation config stops, see `generation_stops`.

    Raises:
        AMoPOError: for a tokenizer without an EOS token, or a template that doesn't end a turn.
    """

    tokenizer: Any
    template: str
    template_kwargs: Mapping[str, Any]
    eot_tokens: tuple[str, ...] = ()
    stops: tuple[int, ...] = ()

    def __post_init__(self):
        self.tokenizer("a")  # ends the truncation and padding that a tokenizer's file may ask for
        self._eos = self.tokenizer.eos_token
        if self._eos is None:
            raise AMoPOError(
                f"The tokenizer of {self.tokenizer.name_or_path} has no EOS token, so a response "
                "could not end; name one under `special_tokens:`, e.g. eos_token: </s>."
            )
        known = [token for token in self.stops if token < len(self.tokenizer)]
        self._stop_ids = {self.tokenizer.eos_token_id, *known}
        self._stops = (self._eos, *self.eot_tokens, *self.tokenizer.convert_ids_to_tokens(known))
        longest_first = sorted(self._stops, key=len, reverse=True)
        self._stop = re.compile("|".join(map(re.escape, longest_first)))
        # Some tokenizers name few special tokens and mark the others in their vocabulary alone.
        added = self.tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special]
        self._special = (*self.tokenizer.all_special_tokens, *special)
        self._added = (*self._special, *(token.content for token in added))
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
        self._ends = {role: self._look_behind(turn, role) for role, turn in TURNS.items()}

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
        return self.ids(self.render(messages, tools, generation_prompt=True))

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
        text = self._ended(whole[len(prompt) :], turn)
        _check_rendered(turn, text)
        ids = self.ids_behind(prompt, text)
        if early := self._stop_ids.intersection(ids[:-1]):
            token = self.tokenizer.decode([min(early)])
            raise ValueError(f"its text contains the end-of-sequence token {token}")
        return ids

    def end_id(self) -> int:
        """Return the token that ends an answer."""
        return self.response_ids([{"role": "user", "content": "a"}], "a")[-1]

    def missed_end(self) -> str | None:
        """Return the token that ends an answer, if generation does not stop there.

        None where it does, or where no generation config says so.
        """
        try:
            end = self.end_id()
        except (TemplateError, ValueError):
            return None  # the rows say it, with their numbers
        missed = self.stops and end not in self._stop_ids
        return self.tokenizer.decode([end]) if missed else None

    def _ended(self, text: str, turn: Message) -> str:
        """Return the text of a turn up to the token at which generation stops, that one included.

        Args:
            text: what the template writes from the turn's beginning to the conversation's end.
        """
        content, calls = turn["content"], "tool_calls" in turn
        own = next((part for part in (content, content.strip()) if part and part in text), "")
        head, own, tail = text.partition(own) if own else ("", "", text)
        for found in self._stop.finditer(tail):
            # Among what is written here may be the turn's own: a call's arguments.
            if (own and not calls) or self._only_special(tail[found.end() :]):
                return head + own + tail[: found.end()]
        # Templates write a newline after the turn's end; the model stops before it.
        tail = tail.rstrip()
        # Behind a call, an added token that isn't special may be the call's own.
        if tail.endswith(self._special if calls else self._added):
            return head + own + tail
        if not tail and (ended := own.rstrip()).endswith(self._stops):
            return head + ended
        return head + own + tail + self._ends["tool" if calls else "user"]

    def _only_special(self, text: str) -> bool:
        return not self.tokenizer.decode(self.ids(text), skip_special_tokens=True).strip()

    def _look_behind(self, turn: Message, role: str) -> str:
        """Return the token that ends a turn which the template closes with none.

        It is the one that opens the next turn where generation stops at that, as GLM's does: its
        template writes `<|user|>` before a question and nothing behind an answer. It is EOS else.

        Args:
            turn: of the assistant.
            role: whose turn follows.

        Raises:
            AMoPOError: for a template that goes on behind an answer without having ended it.
        """
        talk = [{"role": "user", "content": "a"}, turn]
        try:
            last, followed = (
                self.render([*talk, *more], None, generation_prompt=False).rpartition("answer")[2]
                for more in ([], [{"role": role, "content": "c"}])
            )
        except Exception:  # it takes no such conversation, or fails in Python's ways
            return self._eos
        closing = last.rstrip()
        if self._stop.search(closing):
            return self._eos
        if followed.startswith(closing):
            opened = self._stop.match(followed[len(closing) :].lstrip())
            return opened[0] if opened else self._eos
        if role == "tool":
            return self._eos
        raise AMoPOError(
            f"The chat template writes {closing!r} behind an answer at the end of a conversation, "
            "and something else before the next question; no token at which the model stops is in "
            "it. Choose another `chat_template:`, or name the token that ends an answer under "
            "`eot_tokens:`."
        )


def generation_stops(model: str, revision: str | None = None) -> tuple[int, ...]:
    """Return the tokens at which a model's generation config stops.

    Empty where neither the model's folder nor the cache of the hub has such a config.
    """
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(
            model, revision=revision or "main", local_files_only=True
        )
    except OSError:
        return ()
    stops = config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    return tuple(token for token in stops if isinstance(token, int))


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
