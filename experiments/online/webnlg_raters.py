"""Raters that count: what a text of WebNLG states."""

from axolotl_amopo.raters.base import Item


def coverage(item: Item) -> float:
    """Return the share of the prompt's triples whose subject and object both stand in the text.

    Letter by letter but for capitals; underscores count as spaces. A paraphrase counts as missing.
    """
    triples = [[part.strip().casefold() for part in fact.split(" | ")] for fact in facts_of(item)]
    folded = item.response.casefold()
    found = [subject in folded and thing in folded for subject, _, thing in triples]
    return sum(found) / len(found)


def copied(item: Item) -> float:
    """Return the share of the prompt's triples that stand in the text as they are, " | " and all.

    Nobody would call that a text; `coverage` does not mind.
    """
    facts = facts_of(item)
    return sum(fact in item.response for fact in facts) / len(facts)


def facts_of(item: Item) -> list[str]:
    """Return the prompt's triples, each a line."""
    lines = item.messages[-1]["content"].partition("\n\n")[2].splitlines()
    return [line.strip() for line in lines if line.strip()]


def fluency(item: Item) -> float:
    """Return 100 less what the grammar checker Harper (`harper-py`) finds per 100 words.

    Spelling is left out: it takes names for mistakes.
    """
    import harper

    linter = harper.Linter()
    linter.set_lint_config(linter.get_lint_config() | {"SpellCheck": False})
    found = linter.lint(item.response, language="plaintext")
    return 100 - min(100.0, 100 * len(found) / max(1, len(item.response.split())))
