"""The journal of ratings: JSON lines, appended as they come, so that none is paid for twice.

    {"journal": "axolotl-amopo ratings", "version": 1}
    {"key": "<rater, conversation, response and draw, hashed>", "value": 4.0, ...}

A line without a value is an answer that was paid for and held no rating.
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.raters.base import Rating

HEAD = {"journal": "axolotl-amopo ratings", "version": 1}


class Journal:
    """Know the ratings of a file, and add to them; without a file, of this process alone."""

    def __init__(self, path: Path | None, file: IO[str] | None, known: dict[str, float]):
        self.path = path
        self.file = file
        self.known = known

    def add(self, key: str, dimension: str, rating: Rating) -> None:
        """Write what a rater gave.

        Raises:
            AMoPOError: where the disk takes no more.
        """
        line: dict[str, Any] = {"key": key, "dimension": dimension, "value": rating.value}
        if rating.prompt_tokens:
            line["tokens"] = [rating.prompt_tokens, rating.completion_tokens]
        if rating.problem:
            line["problem"] = rating.problem
        self._write(line)
        if rating.value is not None:
            self.known[key] = rating.value

    def _write(self, line: dict[str, Any]) -> None:
        if self.file is None:
            return
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # closing writes once more what did not fit
                self.file.close()
            raise AMoPOError(f"{self.path}: can't be written ({error.strerror}).") from None


def read_journal(path: Path | None) -> dict[str, float]:
    """Return the ratings of a journal by key; none where there is no such file.

    Lines that a kill or a full disk has cut are left out: what they would say is rated again.

    Raises:
        AMoPOError: for a file that is something else.
    """
    if path is None or not path.exists():
        return {}
    known = {}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = list(filter(None, map(_parsed, file)))
    except OSError as error:
        raise AMoPOError(f"{path}: can't be read ({error.strerror}).") from None
    if path.stat().st_size and lines[:1] != [HEAD]:
        raise AMoPOError(f"{path}: is no journal of ratings; move it away, or name another output.")
    for line in lines[1:]:
        if line.get("value") is not None:
            known[line["key"]] = line["value"]
    return known


@contextlib.contextmanager
def open_journal(path: Path | None) -> Iterator[Journal]:
    """Give the journal in a file, which is made where there is none; None: one in memory.

    Raises:
        AMoPOError: where the file is something else, can't be written, or is in use.
    """
    known = read_journal(path)
    if path is None:
        yield Journal(None, None, known)
        return
    try:
        file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
    except OSError as error:
        raise AMoPOError(f"{path}: can't be written ({error.strerror}).") from None
    with contextlib.closing(file):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AMoPOError(f"{path}: another process is rating into it.") from None
        journal = Journal(path, file, known)
        if not file.tell():
            journal._write(HEAD)
        else:
            file.seek(file.tell() - 1)
            if file.read(1) != "\n":  # a kill cut the last line
                file.write("\n")
        yield journal


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
