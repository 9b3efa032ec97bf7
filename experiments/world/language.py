"""A small language in which every quality of an answer can be counted.

A question names somebody and five facts, one of each kind, in this order:

    ann blue vast shy river smith

An answer names her again and tells some of the facts, in the same order, perhaps with hedges in
front of them, perhaps with courtesies around all:

    ann is blue
    hello dear ann looks perhaps vast shy maybe smith many thanks
    ann is green shy smith                                         (green is wrong)

    answer    = [opening] name verb item {item} [closing]
    opening   = "hello" | "hello dear"
    closing   = "thanks" | "many thanks"
    verb      = "is" | "looks"
    item      = [hedge] fact
    hedge     = "perhaps" | "maybe" | "possibly"

The kinds of facts keep their order, and facts and hedges together are at most six words. Five
attributes of an answer are exact, each on a scale of 1 to 5:

    detail      how many facts it tells, 1 to 5
    terse       5 for the shortest answer (3 words), 1 for the longest (12)
    caution     1 without a hedge, 5 with three
    courtesy    1 without a courtesy, one more for each of their words
    correct     1 + 4 * share of the facts that are those of the question

What can't be had together: every fact, hedge and courtesy is a word, so `terse` is against
`detail`, `caution` and `courtesy`; and six words hold no five facts and three hedges, so `caution`
is against `detail`. `correct` is against no other attribute, `courtesy` against `terse` alone. A
text that is no answer of the grammar is worth 1 in everything, so nothing is gained by breaking the
rules.

>>> question = "ann blue vast shy river smith"
>>> attributes(question, "ann is blue")
{'detail': 1.0, 'terse': 5.0, 'caution': 1.0, 'courtesy': 1.0, 'correct': 5.0}
>>> attributes(question, "hello dear ann looks perhaps green shy maybe smith many thanks")
{'detail': 3.0, 'terse': 1.4444444444444446, 'caution': 3.6666666666666665, 'courtesy': 5.0, \
'correct': 3.6666666666666665}
>>> attributes(question, "ann is blue red")["detail"]
1.0

A base model learns answers that `draw_answer` makes: their attributes are spread over the whole
scales, and a quarter of the facts are wrong.
"""

import itertools
import random
from typing import NamedTuple

NAMES = ("ann", "ben", "cid", "dora", "eve", "finn", "gus", "hana")
KINDS = (
    ("red", "blue", "green", "white", "black", "brown"),
    ("tiny", "small", "stout", "large", "huge", "vast"),
    ("calm", "glad", "sad", "proud", "shy", "bold"),
    ("hill", "river", "town", "forest", "island", "valley"),
    ("baker", "miller", "tailor", "smith", "sailor", "farmer"),
)
VERBS = ("is", "looks")
HEDGES = ("perhaps", "maybe", "possibly")
OPENINGS = ((), ("hello",), ("hello", "dear"))
CLOSINGS = ((), ("thanks",), ("many", "thanks"))
COURTESIES = ("hello", "dear", "thanks", "many")

#: The attributes, which are the dimensions that a run can be told to prefer.
ATTRIBUTES = ("detail", "terse", "caution", "courtesy", "correct")
LOWEST, HIGHEST = 1.0, 5.0

MOST_FACTS_AND_HEDGES = 6
MOST_HEDGES = 3
SHORTEST, LONGEST = 3, 12
RIGHT = 0.75  # share of right facts in what a base model learns

KIND_OF = {fact: kind for kind, facts in enumerate(KINDS) for fact in facts}

#: What instructions are made of, see `preference.py`.
EVERYTHING = "all"
WORDS = (
    *NAMES, *KIND_OF, *VERBS, *HEDGES, *COURTESIES,
    EVERYTHING, *ATTRIBUTES, *"12345", *(f"{i / 10:.1f}" for i in range(11)),
)  # fmt: skip


class Answer(NamedTuple):
    """An answer of the grammar."""

    name: str
    facts: tuple[str, ...]
    hedges: int
    courtesies: int
    words: int


def draw_question(numbers: random.Random) -> str:
    """Return a question, all alike likely."""
    return " ".join([numbers.choice(NAMES), *map(numbers.choice, KINDS)])


def draw_answer(question: str, numbers: random.Random, right: float = RIGHT) -> str:
    """Return an answer as the base model shall give them, with this share of right facts."""
    name, *truth = question.split()
    kinds = sorted(numbers.sample(range(len(KINDS)), numbers.randint(1, len(KINDS))))
    most = min(len(kinds), MOST_HEDGES, MOST_FACTS_AND_HEDGES - len(kinds))
    hedges = numbers.randint(1, most) if numbers.random() < 0.5 else 0
    hedged = set(numbers.sample(kinds, hedges))
    words = [*_courtesy(OPENINGS, numbers), name, numbers.choice(VERBS)]
    for kind in kinds:
        if kind in hedged:
            words.append(numbers.choice(HEDGES))
        others = [fact for fact in KINDS[kind] if fact != truth[kind]]
        words.append(truth[kind] if numbers.random() < right else numbers.choice(others))
    return " ".join([*words, *_courtesy(CLOSINGS, numbers)])


def _courtesy(choices: tuple[tuple[str, ...], ...], numbers: random.Random) -> tuple[str, ...]:
    return numbers.choice(choices[1:]) if numbers.random() < 0.5 else choices[0]


def parse(answer: str) -> Answer | None:
    """Return what an answer says; None for a text that is none of the grammar."""
    words = answer.split()
    opening = next((o for o in reversed(OPENINGS) if words[: len(o)] == list(o)), ())
    rest = words[len(opening) :]
    closing = next((c for c in reversed(CLOSINGS) if c and rest[-len(c) :] == list(c)), ())
    items = rest[2 : len(rest) - len(closing)]
    if len(rest) < 2 or rest[0] not in NAMES or rest[1] not in VERBS:
        return None
    if not items or items[-1] in HEDGES or len(items) > MOST_FACTS_AND_HEDGES:
        return None
    if any(one in HEDGES and other in HEDGES for one, other in itertools.pairwise(items)):
        return None
    facts = tuple(word for word in items if word not in HEDGES)
    kinds = [KIND_OF.get(fact, -1) for fact in facts]
    if -1 in kinds or any(one >= other for one, other in itertools.pairwise(kinds)):
        return None
    hedges = len(items) - len(facts)
    return Answer(rest[0], facts, hedges, len(opening) + len(closing), len(words))


def attributes(question: str, answer: str) -> dict[str, float]:
    """Return an answer's exact attributes, each on 1 to 5; 1 of a text that is no answer."""
    parsed = parse(answer)
    if parsed is None:
        return dict.fromkeys(ATTRIBUTES, LOWEST)
    name, *truth = question.split()
    right = sum(fact in truth for fact in parsed.facts) * (parsed.name == name)
    return _attributes(parsed, right)


def _attributes(answer: Answer, right: int) -> dict[str, float]:
    facts = len(answer.facts)
    return {
        "detail": float(facts),
        "terse": 5 - 4 * (answer.words - SHORTEST) / (LONGEST - SHORTEST),
        "caution": 1 + 4 * answer.hedges / MOST_HEDGES,
        "courtesy": 1.0 + answer.courtesies,
        "correct": 1 + 4 * right / facts,
    }


def repetition(answer: str) -> float:
    """Return the share of a text's words that stood in it before."""
    words = answer.split()
    return 1 - len(set(words)) / len(words) if words else 0.0


def possible() -> list[dict[str, float]]:
    """Return the attributes of every kind of answer that is right, each kind once.

    What the best possible model writes is among them.
    """
    found = []
    for opening, closing in itertools.product(OPENINGS, CLOSINGS):
        for facts in range(1, len(KINDS) + 1):
            for hedges in range(min(facts, MOST_HEDGES, MOST_FACTS_AND_HEDGES - facts) + 1):
                courtesies = len(opening) + len(closing)
                words = 2 + facts + hedges + courtesies
                answer = Answer("", ("",) * facts, hedges, courtesies, words)
                found.append(_attributes(answer, right=facts))
    return found
