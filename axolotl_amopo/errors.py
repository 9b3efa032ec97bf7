"""Errors for people: what is wrong, where, and what to write instead."""

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable
from types import TracebackType

# Set in the environment, this variable brings the traceback of an error of ours back.
TRACEBACK = "AXOLOTL_AMOPO_TRACEBACK"

# All of C0 and C1 but tab and the ends of lines.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")


def visible(text: str) -> str:
    """Return text with its control characters written out: a terminal would obey them.

    >>> visible("\x1b[2Jgone")
    '\\\\x1b[2Jgone'
    """
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def is_line(text: str) -> bool:
    """Return whether a text is one line without control characters."""
    return text.splitlines() == [text] and visible(text) == text


class AMoPOError(ValueError):
    """Anything the user can mend; the text is one sentence that says how."""

    def __str__(self) -> str:
        """Return the sentence; what it quotes of a row can't command a terminal."""
        return visible(super().__str__())


class ConfigError(AMoPOError):
    """The YAML asks for something that can't be."""


class DataError(AMoPOError):
    """A row, a file or a whole dataset can't be trained on."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for a near miss, else nothing."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def wants_traceback() -> bool:
    """Return whether the environment asks for tracebacks of errors of ours."""
    return os.environ.get(TRACEBACK, "0") not in ("", "0")


def print_sentences() -> None:
    """Let an error of ours that ends this process print its sentence alone; exit code 1 stays.

    Every other exception goes on to the hook that was there.
    """
    if not isinstance(sys.excepthook, _SentenceHook):
        sys.excepthook = _SentenceHook(sys.excepthook)


class _SentenceHook:
    """Stand in for `sys.excepthook`."""

    def __init__(self, before: Callable[..., object]):
        self.before = before

    def __call__(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if not issubclass(kind, AMoPOError) or wants_traceback():
            self.before(kind, error, trace)
            return
        with contextlib.suppress(OSError, ValueError):  # a pipe or file that is closed
            sys.stdout.flush()  # or what was logged before would follow, where both go to one place
        print(f"Error: {error}", file=sys.stderr)
