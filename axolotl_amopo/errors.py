"""Errors for people: what is wrong, where, and what to write instead."""

import difflib
from collections.abc import Iterable


class AMoPOError(ValueError):
    """Anything the user can mend; the text is one sentence that says how."""


class ConfigError(AMoPOError):
    """The YAML asks for something that can't be."""


class DataError(AMoPOError):
    """A row, a file or a whole dataset can't be trained on."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for a near miss, else nothing."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
