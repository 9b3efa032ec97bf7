"""Dimension-aware prompts: which instruction a criterion's prompt has, and where it stands."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from axolotl_amopo.config.instructions import (
    Asked,
    instruction,
    overall_instruction,
)
from axolotl_amopo.data.pairing import Asks, Pair, Scales, at_levels
from axolotl_amopo.data.rows import Message, Ratings
from axolotl_amopo.example import flat

if TYPE_CHECKING:  # imports torch
    from axolotl_amopo.config.block import AMoPOConfig

Place = Literal["before", "after", "system"]


@dataclass(frozen=True)
class Prompted:
    """The prompts of an example as text: N responses of a prompt, and how P pairs read them."""

    instructions: list[str]  # [X] the different ones
    used: list[int]  # [N] which of the prompt's responses are in a pair, or alone
    follows: list[list[int]]  # as in `Example`, and so are the rest
    comparisons: list[tuple[int, int]]
    reads: list[list[int]]
    signs: list[list[int]]
    asks: list[Asks]  # [K]


def prompted(
    pairs: list[Pair],
    config: "AMoPOConfig",
    scales: Scales,
    vectors: Sequence[Sequence[float]] = (),
) -> Prompted:
    """Return which responses stand behind which instructions, each prompt and response once.

    A prompt asks for the rating of its winner, of the response itself, of the pair's target, or for
    none (`rating_in_prompt`). Criteria whose prompts have the same texts share one prompt.

    Args:
        pairs: all of one prompt.
        vectors: [M] weights of the dimensions. Each has a prompt of its own, and every dimension is
            a criterion under each of them: the first vector's D criteria, then the second's.
    """
    responses = pairs[0].prompt.responses
    used = {index: n for n, index in enumerate(dict.fromkeys(flat(p.responses for p in pairs)))}
    texts: dict[str, int] = {}
    # By the weights' number, and the text that each response follows.
    prompts: dict[tuple[int, tuple[int, ...]], int] = {}
    asks: list[Asks] = []

    def text(criterion: int, ratings: Ratings, weights: Sequence[float]) -> int:
        made = instruction_of(config, scales, criterion, ratings, weights)
        return texts.setdefault(made, len(texts))

    def prompt(pair: Pair, criterion: int, vector: int) -> int:
        weights = vectors[vector] if vectors else ()
        winner = pair.winner(criterion)
        rated = pair.target or responses[pair.responses[winner]].ratings
        if config.rating_in_prompt == "own":
            first = [pair.responses[winner], pair.responses[1 - winner]]
            for index in first:  # numbers the texts in the order of the pairs
                text(criterion, responses[index].ratings, weights)
            follows = tuple(text(criterion, responses[index].ratings, weights) for index in used)
        else:
            follows = (text(criterion, rated, weights),) * len(used)
        if (vector, follows) not in prompts:
            common = config.rating_in_prompt != "own" and list(texts)[follows[0]] != ""
            asked = at_levels(rated, scales, config.rating_levels)
            asked = None if config.rating_in_prompt == "none" else asked
            asks.append(Asks(dimensions_of(config, criterion) if common else [], asked, weights))
        return prompts.setdefault((vector, follows), len(prompts))

    criteria, numbers = range(len(pairs[0].signs)), range(max(1, len(vectors)))
    reads = [[prompt(pair, c, number) for number in numbers for c in criteria] for pair in pairs]
    return Prompted(
        instructions=list(texts),
        used=list(used),
        follows=[list(follows) for _, follows in prompts],
        comparisons=[(used[pair.responses[0]], used[pair.responses[1]]) for pair in pairs],
        reads=reads,
        signs=[pair.signs * len(numbers) for pair in pairs],
        asks=asks,
    )


def dimensions_of(config: "AMoPOConfig", criterion: int) -> list[str]:
    """Return the dimensions that a criterion's prompt names."""
    names = config.dimension_names
    if config.prompts == "one" or (config.overall and criterion == 0):
        return names
    return [names[criterion - config.overall]]


def instruction_of(
    config: "AMoPOConfig",
    scales: Scales,
    criterion: int,
    ratings: Ratings,
    weights: Sequence[float] = (),
) -> str:
    """Return the instruction of a criterion's prompt that asks for these ratings; "" for none.

    Args:
        config: the block.
        scales: of the dimensions.
        criterion: counted from 0, of those that one set of weights has.
        ratings: of the response whose ratings are asked for.
        weights: [D], where the prompt states them.
    """
    ratings = at_levels(ratings, scales, config.rating_levels)
    asked: tuple[Asked, ...] = tuple(
        (
            dimension.name,
            dimension.description,
            tuple(scales[dimension.name]),
            None if config.rating_in_prompt == "none" else ratings[dimension.name],
        )
        for dimension in config.dimensions
    )
    if weights:
        asked = tuple((*one, weight) for one, weight in zip(asked, weights, strict=True))
    if config.prompts == "one":
        known = (one for one in asked if one[3] is not None or config.rating_in_prompt == "none")
        return overall_instruction(config.overall_instruction, tuple(known))
    if config.overall and criterion == 0:
        return overall_instruction(config.overall_instruction, asked)
    return instruction(config.instruction, asked[criterion - config.overall])


def instructed(messages: list[Message], text: str, place: Place = "before") -> list[Message]:
    """Return the conversation with an instruction.

    It stands in the turn of the last question, or in the system message.
    """
    if not text:
        return messages
    if place == "system":
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": text}, *messages]
        return [_joined(messages[0], messages[0]["content"], text), *messages[1:]]
    index = last_user_turn(messages)
    parts = [text, messages[index]["content"]]
    if place == "after":
        parts.reverse()
    return [*messages[:index], _joined(messages[index], *parts), *messages[index + 1 :]]


def _joined(message: Message, *parts: str) -> Message:
    return {**message, "content": "\n\n".join(parts)}


def last_user_turn(messages: list[Message]) -> int:
    """Return the place of the last question."""
    return max(i for i, message in enumerate(messages) if message["role"] == "user")
