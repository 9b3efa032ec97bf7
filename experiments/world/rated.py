"""Rated answers of the base model: questions, answers that it draws, and their ratings.

A rating is the exact attribute rounded to a whole number from 1 to 5. A share of the ratings, the
noise, is replaced by any of the five numbers.
"""

import json
import math
import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import base_model
import language

from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.data.examples import as_text, prepare_row
from axolotl_amopo.data.pairing import PairRule
from axolotl_amopo.data.rows import RatedPrompt, Response
from axolotl_amopo.data.tokenizer import ChatTokenizer
from axolotl_amopo.example import Example

SCALE = (language.LOWEST, language.HIGHEST)
SEQUENCE_LEN = 64  # more than the longest instruction, question and answer together


@dataclass(frozen=True)
class DataSettings:
    """What preference data there is."""

    prompts: int = 256
    responses: int = 4
    noise: float = 0.0  # share of ratings that say nothing


class Answered(NamedTuple):
    """A question and what the base model answered."""

    question: str
    answers: list[str]


def drawn_seed(*parts: Any) -> int:
    """Return 63 bits that depend on all parts."""
    return random.Random(json.dumps(parts)).getrandbits(63)


def draw_questions(count: int, seed: int, *, held_out: bool) -> list[str]:
    """Return different questions; those held out are none of the seed's others.

    Which of all questions may be held out is a matter of the seed and the question alone.
    """
    numbers = random.Random(f"questions {seed} {held_out}")
    found: dict[str, None] = {}
    while len(found) < count:
        question = language.draw_question(numbers)
        if (random.Random(f"{seed} {question}").random() < 0.2) == held_out:
            found[question] = None
    return list(found)


def answered(
    model: Any, folder: Path, count: int, responses: int, seed: int, *, held_out: bool
) -> list[Answered]:
    """Return questions with so many answers of the base model each.

    Args:
        model: the base model.
        folder: of the base model; what it answered is kept beside it.
    """
    kept = answers_file(folder, count, responses, seed, held_out=held_out)
    if kept.is_file():
        return [Answered(*one) for one in json.loads(kept.read_text(encoding="utf-8"))]
    questions = draw_questions(count, seed, held_out=held_out)
    chat = base_model.chat()
    prompts = [chat.prompt_ids(messages(q)) for q in questions for _ in range(responses)]
    texts = [
        one.text
        for one in base_model.generate(model, prompts, drawn_seed("answers", seed, held_out))
    ]
    # A response needs a word: an empty one is replaced by what the grammar can't say either.
    texts = [text or language.EVERYTHING for text in texts]
    made = [
        Answered(question, texts[i * responses : (i + 1) * responses])
        for i, question in enumerate(questions)
    ]
    part = kept.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(made), encoding="utf-8")
    part.replace(kept)
    return made


def answers_file(folder: Path, count: int, responses: int, seed: int, *, held_out: bool) -> Path:
    """Return where the answers of a base model are kept."""
    kind = "heldout" if held_out else "train"
    return folder.parent / f"answers-{folder.name}-{kind}-{seed}-{count}x{responses}.json"


def messages(question: str) -> list[dict[str, Any]]:
    """Return the conversation that a question is."""
    return [{"role": "user", "content": question}]


def rate(value: float) -> float:
    """Return the rating of an exact attribute: the nearest whole number, a half the higher one."""
    return float(math.floor(value + 0.5))


def rated_prompts(
    known: list[Answered], dimensions: list[str], noise: float, seed: int
) -> list[RatedPrompt]:
    """Return the questions as the package takes rated data."""
    numbers = random.Random(f"noise {seed}")

    def ratings(question: str, answer: str) -> dict[str, float | None]:
        exact = language.attributes(question, answer)
        made: dict[str, float | None] = {}
        for name in dimensions:
            # Both are drawn always, so that more noise changes the same ratings and some more.
            replaced, other = numbers.random() < noise, float(numbers.randint(1, 5))
            made[name] = other if replaced else rate(exact[name])
        return made

    return [
        RatedPrompt(
            messages(one.question),
            [Response(answer, ratings(one.question, answer)) for answer in one.answers],
            [number],
        )
        for number, one in enumerate(known, start=1)
    ]


def examples(
    prompts: list[RatedPrompt], config: AMoPOConfig, chat: ChatTokenizer, seed: int
) -> list[Example]:
    """Return what is trained on, made as the package makes prepared rows.

    Raises:
        DataError: for a row that can't be tokenised.
    """
    scales = dict.fromkeys(config.dimension_names, SCALE)
    rule, made = PairRule(config, scales, frozenset(), seed), []
    for prompt in prompts:
        pairs = list(rule.pairs(prompt, Counter()))
        groups = ([pairs] if pairs else []) if config.group_by_prompt else [[p] for p in pairs]
        for group in groups:
            row = prepare_row(
                as_text(group, rule, f"the world, row {prompt.rows[0]}"),
                chat=chat,
                sequence_len=SEQUENCE_LEN,
                excess_length="raise",
                drop_bad=False,
                place=config.instruction_place,
                own=config.rating_in_prompt == "own",
            )
            if row["input_ids"]:  # else the two responses are alike
                made.append(Example.from_row(row))
    return made
