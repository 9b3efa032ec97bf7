"""Formulas: what a well-kept library computes of a response, alone or beside a reference.

{formula: words, scale: [0, 200], direction: lower}
{formula: chrf, reference: gold}          `gold`: a text, or a list of texts, in each row
{formula: language, language: en}
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

from axolotl_amopo.data.rows import find
from axolotl_amopo.raters.base import Item, LocalRater, RatedDimension, Rating


def characters(text: str) -> float:
    """Return the number of characters."""
    return len(text)


def words(text: str) -> float:
    """Return the number of words: what white space separates."""
    return len(text.split())


def chrf(text: str, references: list[str]) -> float:
    """Return chrF2 (Popovic, 2015), 0 to 100: n-grams of characters that are the references'."""
    from sacrebleu.metrics import CHRF

    return CHRF().sentence_score(text, references).score


def bleu(text: str, references: list[str]) -> float:
    """Return a sentence's BLEU (Papineni et al., 2002), 0 to 100, with exponential smoothing."""
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True).sentence_score(text, references).score


def rouge_l(text: str, references: list[str]) -> float:
    """Return ROUGE-L's F1 (Lin, 2004), 0 to 1, of the best reference, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return max(scorer.score(one, text)["rougeL"].fmeasure for one in references)


def language(text: str, wanted: str) -> float:
    """Return the probability that a text is in a language, by its code: en, de, zh-cn, ..."""
    from langdetect import DetectorFactory, detect_langs

    DetectorFactory.seed = 0  # or it would draw anew each time
    return sum(found.prob for found in detect_langs(text) if found.lang == wanted)


class Formula(NamedTuple):
    """Say what a formula takes."""

    compute: Callable[..., float]
    scale: tuple[float, float] | None  # None: the user says what is the most
    library: str | None = None
    needs: str | None = None  # a key of the dimension


FORMULAS = {
    "characters": Formula(characters, None),
    "words": Formula(words, None),
    "chrf": Formula(chrf, (0, 100), "sacrebleu", "reference"),
    "bleu": Formula(bleu, (0, 100), "sacrebleu", "reference"),
    "rouge_l": Formula(rouge_l, (0, 1), "rouge-score", "reference"),
    "language": Formula(language, (0, 1), "langdetect", "language"),
}


@dataclass
class FormulaRater(LocalRater):
    """Rate by a formula.

    Args:
        argument: the key of the row that has the reference, or the language's code.
    """

    dimension: RatedDimension
    name: str
    argument: str | None = None
    clips = True

    def __post_init__(self) -> None:
        self.formula = FORMULAS[self.name]
        self.reads_row = self.formula.needs == "reference"

    def identity(self, dimension: str) -> dict[str, Any]:
        """Return the formula and its library's version."""
        facts: dict[str, Any] = {"rater": "formula", "formula": self.name}
        if self.formula.needs:
            facts[self.formula.needs] = self.argument
        if self.formula.library:
            facts["version"] = f"{self.formula.library} {version(self.formula.library)}"
        return facts

    provenance = identity

    def rating(self, item: Item) -> Rating:
        """Return the formula's value of a response."""
        arguments: list[Any] = []
        if self.formula.needs == "reference":
            found = find(item.row, str(self.argument))
            references = [found] if isinstance(found, str) else found
            if (
                not isinstance(references, list)
                or not references
                or not all(isinstance(one, str) for one in references)
            ):
                return Rating(None, f"its row has no text at the key '{self.argument}'")
            arguments = [references]
        elif self.formula.needs:
            arguments = [self.argument]
        return Rating(float(self.formula.compute(item.response, *arguments)))
