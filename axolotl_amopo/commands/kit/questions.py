"""Read the file of questions that a model is to answer."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axolotl_amopo.data.rows import Message, Row, Source
from axolotl_amopo.errors import DataError, did_you_mean

FIELDS = ("messages", "prompt", "instruction", "turns")
ROLES = {"human": "user", "gpt": "assistant"}


@dataclass
class Prompt:
    """Hold one conversation to answer, and the questions that follow its first answer."""

    where: str  # file and row, for error messages
    messages: list[Message]  # up to the first question
    later: list[str] = field(default_factory=list)  # questions after the first answer
    row: dict[str, Any] = field(default_factory=dict)  # as it stands in the file
    tools: Any = None

    @property
    def questions(self) -> int:
        """Return the number of questions."""
        return 1 + len(self.later)

    def conversation(self, answers: list[str]) -> list[Message]:
        """Return the messages before the next answer, the earlier answers among them."""
        messages = list(self.messages)
        for answer, question in zip(answers, self.later, strict=False):
            messages += [
                {"role": "assistant", "content": answer},
                {"role": "user", "content": question},
            ]
        return messages


def text_prompt(text: str) -> Prompt:
    """Return the prompt of a single question."""
    messages = [{"role": "user", "content": text}]
    return Prompt("--prompt", messages, row={"prompt": text})


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a file: lines of text, JSON lines, or a JSON list.

    A row has `messages`, `prompt` or `instruction` (text, or messages), or `turns`, a list of
    questions.

    Raises:
        DataError: naming file, row and key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as UTF-8 text: {error}.") from None
    if path.suffix == ".txt":
        rows = ((i, {"prompt": line}) for i, line in _lines(text))
    elif path.suffix in (".jsonl", ".json"):
        rows = _objects(path, text)
    else:
        raise DataError(f"{path}: must be a .jsonl, .json or .txt file.")
    prompts = [
        _prompt(Row(row, number, Source(str(path), [], {}, roles=ROLES))) for number, row in rows
    ]
    if not prompts:
        raise DataError(f"{path}: is empty: no prompt to answer.")
    return prompts


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return ((i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip())


def _objects(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    def parse(piece: str, where: str) -> Any:
        try:
            return json.loads(piece)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: is not JSON ({error}).") from None

    if path.suffix == ".json":
        listed = parse(text, str(path)) if text.strip() else []
        if not isinstance(listed, list):
            raise DataError(f"{path}: must be a list of objects; write .jsonl for one a line.")
        rows = list(enumerate(listed, start=1))
    else:
        rows = [(i, parse(line, f"{path}, row {i}")) for i, line in _lines(text)]
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: must be an object, got {str(row)[:60]!r}.")
        yield number, row


def _prompt(row: Row) -> Prompt:
    where = f"{row.source.name}, row {row.number}"
    key = next((key for key in FIELDS if row.has(key)), None)
    if key is None:
        known = [name for name, value in row.values.items() if value is not None]
        raise DataError(
            f"{where}, key 'prompt': is missing; a row needs one of {', '.join(FIELDS)}, and has "
            f"{', '.join(known) or 'nothing'}.{did_you_mean('prompt', known)}"
        )
    if key != "turns":
        return Prompt(where, row.conversation(key), row=row.values, tools=row.tools())
    turns = [row.check_text(turn, at) for turn, at in row.items(key, str)]
    if not turns:
        raise row.error(key, "is empty.")
    first = row.check_prompt([{"role": "user", "content": turns[0]}], key)
    return Prompt(where, first, turns[1:], row.values)
