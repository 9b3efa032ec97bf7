"""Raters that count: what a text of WebNLG states."""

from axolotl_amopo.raters.base import Item


def coverage(item: Item) -> float:
    """Return the share of the prompt's triples whose subject and object both stand in the text.

    Letter by letter but for capitals; underscores count as spaces. A paraphrase counts as missing.
    """
    lines = item.messages[-1]["content"].partition("\n\n")[2].splitlines()
    triples = [[part.strip().casefold() for part in line.split(" | ")] for line in lines if line]
    folded = item.response.casefold()
    found = [subject in folded and thing in folded for subject, _, thing in triples]
    return sum(found) / len(found)


def fluency(item: Item) -> float:
    """Return 100 less what the grammar checker Harper (`harper-py`) finds per 100 words.

    Spelling is left out: it takes names for mistakes.
    """
    import harper

    linter = harper.Linter()
    linter.set_lint_config(linter.get_lint_config() | {"SpellCheck": False})
    found = linter.lint(item.response, language="plaintext")
    return 100 - min(100.0, 100 * len(found) / max(1, len(item.response.split())))
