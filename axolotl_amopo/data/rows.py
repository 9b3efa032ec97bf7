"""One row of a dataset, read field by field with errors that name file, row and key."""

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from axolotl_amopo.config.instructions import render
from axolotl_amopo.errors import DataError, did_you_mean

# What stands for no rating, beside nothing.
MISSING = ("", "n/a", "na", "none", "null")

Message = dict[str, Any]
Ratings = dict[str, float | None]


# What encloses thinking, and then an answer, in a turn's text: the marks that axolotl knows.
THINKING = (
    ("<think>", "</think>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
ANSWER = ("<|begin_of_solution|>", "<|end_of_solution|>")


@dataclass
class Response:
    """A response and its ratings; a rating is None where the data has none."""

    turn: str | Message  # its text, or the whole message of one that also thinks or calls tools
    ratings: Ratings
    # The dataset's own overall rating, brought to 0..1 with 1 the best.
    overall: float | None = None

    @property
    def text(self) -> str:
        """All that it says, thinking and calls included."""
        if isinstance(self.turn, str):
            return self.turn
        said = (item for name, item in self.turn.items() if name != "role" and item)
        return "\n".join(item if isinstance(item, str) else json.dumps(item) for item in said)


@dataclass
class RatedPrompt:
    """A prompt and its rated responses: what every dataset format becomes."""

    messages: list[Message]  # ends before the response; system and earlier turns included
    responses: list[Response]
    rows: list[int]  # the rows of the dataset it comes from, counted from 1
    # True where the data itself says that each response beats those after it.
    ordered: bool = False
    tools: list[dict[str, Any]] | None = None  # what the chat template is told of them
    weights: list[float] | None = None  # of the criteria, where rows have their own; they sum to 1

    def key(self) -> bytes:
        """Return 16 bytes that are equal for equal prompts.

        (Their texts would be gigabytes, for a million rows.)
        """
        text = json.dumps(self.messages, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


@dataclass
class Source:
    """Where rows come from and how they are to be read."""

    name: str  # the path in the YAML, for error texts
    dimensions: list[str]
    scales: dict[str, tuple[float, float] | None]
    ratings_required: bool = True
    fields: dict[str, str] = field(default_factory=dict)  # our field names -> the data's
    roles: dict[str, str] = field(default_factory=dict)  # the data's role names -> the template's
    # What else the template reads of a message -> what the data calls it.
    properties: dict[str, str] = field(default_factory=dict)
    thinking: str = "reasoning_content"  # what the template calls a turn's thinking
    split_thinking: bool = False  # whether to look for it in the turn's text
    drop_system: bool = False  # whether prompts go without their system message


class Row:
    """A row, with the field names of the YAML's `fields:` applied."""

    def __init__(self, values: Mapping[str, Any], number: int, source: Source):
        self.values = values
        self.number = number
        self.source = source

    def error(self, key: str, problem: str) -> DataError:
        return DataError(f"{self.source.name}, row {self.number}, key '{key}': {problem}")

    def key(self, name: str) -> str:
        """What the data calls our field `name`."""
        return self.source.fields.get(name, name)

    def has(self, name: str) -> bool:
        return find(self.values, self.key(name)) is not None

    def get(self, name: str) -> Any:
        """The value of a field that must be there.

        Raises:
            DataError: where it is missing, with the row's keys.
        """
        key = self.key(name)
        value = find(self.values, key)
        if value is None:
            known = [known for known, value in self.values.items() if value is not None]
            raise self.error(
                key,
                f"is missing; the row has {', '.join(known) or 'nothing'}."
                f"{did_you_mean(key, known)} Another name goes under the dataset's `fields:`, "
                f"e.g. fields: {{{name}: its_name}}.",
            )
        return value

    def find(self, name: str) -> Any:
        """The value of a field, None where there is none."""
        return find(self.values, self.key(name))

    def at(self, path: str, values: Any = None) -> Any:
        """What lies at a path of the row, or of a part of it; None where nothing does."""
        return find(self.values if values is None else values, path)

    def items(self, name: str, kind: type = dict) -> list[tuple[Any, str]]:
        """The items of a list that must be there, each with its key for error texts."""
        value, key = self.get(name), self.key(name)
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            what = {dict: "objects", str: "texts"}.get(kind, "responses")
            raise self.error(key, f"must be a list of {what}, got {_show(value)}.")
        return [(item, f"{key}[{i}]") for i, item in enumerate(value)]

    def number_in(self, name: str, low: float, high: float) -> float:
        """A number from `low` to `high` that must be there."""
        return self.check_number(self.get(name), self.key(name), low, high)

    def check_number(self, value: Any, key: str, low: float, high: float) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not low <= number <= high:
            raise self.error(key, f"must be a number from {low:g} to {high:g}, got {_show(value)}.")
        return number

    def rendered(self, template: str) -> list[Message]:
        """A Jinja template of the row's fields (and of `row`, with all of them) as a user turn."""
        try:
            text = render(template, {**self.values, "row": self.values})
        except Exception as error:  # a filter may raise whatever Python does
            raise self.error("template", f"can't be filled from this row: {error}.") from None
        return [{"role": "user", "content": self.check_text(text, "template")}]

    def text(self, name: str) -> str:
        return self.check_text(self.get(name), self.key(name))

    def check_text(self, value: Any, key: str) -> str:
        if not isinstance(value, str):
            raise self.error(key, f"must be text, got {_show(value)}.")
        if not value.strip():
            raise self.error(key, "is empty.")
        return value

    def conversation(self, *names: str) -> list[Message]:
        """The prompt as messages, from the first of the fields that the row has.

        A string is one user turn, after the `system` field's text where there is one.
        """
        name = next((name for name in names if self.has(name)), names[0])
        value = self.get(name)
        if isinstance(value, str):
            messages = [{"role": "user", "content": self.check_text(value, self.key(name))}]
        else:
            messages = self.check_messages(value, self.key(name))
        return self.check_prompt(messages, self.key(name))

    def check_prompt(self, messages: list[Message], key: str) -> list[Message]:
        """Messages that a response can follow, with the `system` field's text before them."""
        if self.has("system"):
            if messages and messages[0]["role"] == "system":
                raise self.error(self.key("system"), f"is there twice: {key} begins with one.")
            messages = [{"role": "system", "content": self.text("system")}, *messages]
        if self.source.drop_system and messages and messages[0]["role"] == "system":
            messages = messages[1:]
        if not any(message["role"] == "user" for message in messages):
            raise self.error(key, "has no user turn before the response.")
        if messages[-1]["role"] == "assistant":
            raise self.error(key, "ends with an assistant turn; that is the response's place.")
        return messages

    def check_messages(self, value: Any, key: str) -> list[Message]:
        if not isinstance(value, list) or not value:
            raise self.error(key, f"must be text or a list of messages, got {_show(value)}.")
        return [self.check_message(item, f"{key}[{i}]") for i, item in enumerate(value)]

    def check_message(self, value: Any, key: str) -> Message:
        if not isinstance(value, Mapping):
            raise self.error(key, f"must be a message with role and content, got {_show(value)}.")
        role_key, content_key = self.key("role"), self.key("content")
        properties = self.source.properties
        value = without_none(value)
        mapped = {name: value[known] for name, known in properties.items() if known in value}
        message = {
            name: item
            for name, item in value.items()
            if name not in (role_key, content_key, *properties.values())
        } | mapped
        role = self.check_text(value.get(role_key), f"{key}.{role_key}")
        message["role"] = self.source.roles.get(role, role)
        if "tool_calls" in message:
            message["tool_calls"] = self._tool_calls(message["tool_calls"], f"{key}.tool_calls")
        content = joined(value.get(content_key))
        if content in (None, "") and message.get("tool_calls"):
            message["content"] = ""  # a turn that only calls
            return message
        message["content"] = self.check_text(content, f"{key}.{content_key}")
        return self._split(message)

    def _split(self, message: Message) -> Message:
        """The message with its thinking apart from its text, where the config asks for it."""
        if self.source.split_thinking and message["role"] == "assistant":
            thought, answer = split_thinking(message["content"])
            if thought and answer:
                return {**message, self.source.thinking: thought, "content": answer}
        return message

    def _tool_calls(self, calls: Any, key: str) -> list[Any]:
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise self.error(key, f"must be a list of calls, got {_show(calls)}.")
        return [self._tool_call(call, f"{key}[{i}]") for i, call in enumerate(calls)]

    def _tool_call(self, call: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """A call with its arguments as the template writes them: APIs give them as JSON."""
        function = call.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
            return call
        try:
            arguments = json.loads(function["arguments"])
        except ValueError as error:
            raise self.error(f"{key}.function.arguments", f"is not JSON ({error}).") from None
        return {**call, "function": {**function, "arguments": arguments}}

    def tools(self) -> list[dict[str, Any]] | None:
        """The tools that the conversation may call: a list, or its JSON."""
        if not self.has("tools"):
            return None
        value, key = self.get("tools"), self.key("tools")
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise self.error(key, f"is not JSON ({error}).") from None
        if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
            raise self.error(key, f"must be a list of tools, got {_show(value)}.")
        return without_none(value) or None

    def response(self, value: Any, key: str) -> str | Message:
        """A response: text, one assistant message, or a conversation that ends with one.

        Returns:
            Its text, or the message where it has more than that: thinking, tool calls, or what
            `message_property_mappings` names.
        """
        if isinstance(value, list):
            messages = self.check_messages(value, key)
            if len(messages) > 1 and messages[0]["role"] in ("assistant", "tool"):
                raise self.error(
                    key,
                    f"has {len(messages)} turns; a response is one assistant turn, and what comes "
                    "before it belongs in the prompt.",
                )
            message, key = messages[-1], f"{key}[-1]"
        elif isinstance(value, Mapping):
            message = self.check_message(value, key)
        else:
            text = self.check_text(value, key)
            message = self._split({"role": "assistant", "content": text})
        if message["role"] != "assistant":
            raise self.error(key, f"must be an assistant turn, its role is {message['role']}.")
        kept = {"role", "content", "tool_calls", self.source.thinking, *self.source.properties}
        message = {name: item for name, item in message.items() if name in kept and item}
        if message.keys() == {"role", "content"}:
            return message["content"]
        return {"content": "", **message}

    def weights(self, criteria: list[str]) -> list[float]:
        """The row's weights of the criteria, scaled to sum to 1, from its field `weights`."""
        values, key = self.get("weights"), self.key("weights")
        if not isinstance(values, Mapping) or set(without_none(values)) != set(criteria):
            raise self.error(
                key,
                f"must have a weight per criterion, {', '.join(criteria)}; got {_show(values)}.",
            )
        weights = [
            self.check_number(values[name], f"{key}.{name}", 0, sys.float_info.max)
            for name in criteria
        ]
        if not sum(weights):
            raise self.error(key, "must not all be 0.")
        return [weight / sum(weights) for weight in weights]

    def ratings(self, values: Any = None, key: str = "") -> Ratings:
        """The configured dimensions' ratings, from the row itself or a block of it."""
        values = self.values if values is None else values
        if not isinstance(values, Mapping):
            raise self.error(key, f"must hold the ratings by dimension, got {_show(values)}.")
        prefix = f"{key}." if key else ""
        return {
            name: self._rating(values, name, prefix + self.key(name))
            for name in self.source.dimensions
        }

    def _rating(self, values: Mapping[str, Any], name: str, key: str) -> float | None:
        value = find(values, self.key(name))
        if value is None or (isinstance(value, str) and value.strip().lower() in MISSING):
            if not self.source.ratings_required:
                return None
            known = [name for name, value in values.items() if value is not None]
            raise self.error(
                key,
                f"the rating is missing; there are {', '.join(known) or 'no ratings'}."
                f"{did_you_mean(self.key(name), known)} To use rows without it, write "
                "amopo.missing_ratings: mask (the dimension weighs nothing there) or drop.",
            )
        scale = self.source.scales[name]
        try:
            # Yes and no are 1 and 0, and nothing else: on 1 to 5 they would be a mistake.
            if isinstance(value, bool) and scale not in (None, (0, 1)):
                raise ValueError
            rating = float(value)
            if not math.isfinite(rating):
                raise ValueError
        except (TypeError, ValueError):
            raise self.error(key, f"must be a number, got {_show(value)}.") from None
        if scale and not scale[0] <= rating <= scale[1]:
            raise self.error(
                key,
                f"{rating:g} is outside the scale {scale[0]:g} to {scale[1]:g}; mend the row, or "
                f"write the right scale, e.g. {{name: {name}, scale: [{min(rating, scale[0]):g}, "
                f"{max(rating, scale[1]):g}]}} under amopo.dimensions.",
            )
        return rating


def joined(content: Any) -> Any:
    """A message's content as one text, where it comes as parts that are all text."""
    if not isinstance(content, list) or not content:
        return content
    parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else content


def split_thinking(text: str) -> tuple[str | None, str]:
    """The thinking that a text begins with, None where it doesn't, and the text behind it."""
    for start, end in THINKING:
        thought, closed, answer = text.lstrip().partition(end)
        if closed and thought.startswith(start):
            answer = answer.strip()
            if answer.startswith(ANSWER[0]) and answer.endswith(ANSWER[1]):
                answer = answer.removeprefix(ANSWER[0]).removesuffix(ANSWER[1]).strip()
            return thought.removeprefix(start).strip(), answer
    return None, text


def without_none(value: Any) -> Any:
    """A nested value without the None that Arrow writes where another row has a key."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def find(values: Any, path: str) -> Any:
    """What lies at a path of keys and indices such as `scores.0.help`; None where nothing does.

    A key that has dots in it counts before the path that it could be.
    """
    if isinstance(values, Mapping):
        if path in values:
            return values[path]
        first, _, rest = path.partition(".")
        return find(values[first], rest) if rest and first in values else None
    if isinstance(values, list):
        first, _, rest = path.partition(".")
        if not first.isdecimal() or int(first) >= len(values):
            return None
        return find(values[int(first)], rest) if rest else values[int(first)]
    return None


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
