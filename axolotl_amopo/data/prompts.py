"""Dimension-aware prompts: which instruction a criterion's prompt has, and where it stands."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from axolotl_amopo.config.instructions import instruction, overall_instruction
from axolotl_amopo.data.pairing import Pair, Scales
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


def prompted(pairs: list[Pair], config: "AMoPOConfig", scales: Scales) -> Prompted:
    """Return which responses stand behind which instructions, each prompt and response once.

    A prompt asks for the rating of its winner, of the response itself, or for none
    (`rating_in_prompt`). Criteria whose prompts have the same texts share one prompt.

    Args:
        pairs: all of one prompt.
    """
    responses = pairs[0].prompt.responses
    used = {index: n for n, index in enumerate(dict.fromkeys(flat(p.responses for p in pairs)))}
    texts: dict[str, int] = {}
    prompts: dict[tuple[int, ...], int] = {}  # by the text that each response follows

    def text(criterion: int, ratings: Ratings) -> int:
        return texts.setdefault(instruction_of(config, scales, criterion, ratings), len(texts))

    def prompt(pair: Pair, criterion: int) -> int:
        if config.rating_in_prompt == "own":
            winner = pair.winner(criterion)
            first = [pair.responses[winner], pair.responses[1 - winner]]
            for index in first:  # numbers the texts in the order of the pairs
                text(criterion, responses[index].ratings)
            follows = tuple(text(criterion, responses[index].ratings) for index in used)
        else:
            rated = responses[pair.responses[pair.winner(criterion)]].ratings
            follows = (text(criterion, rated),) * len(used)
        return prompts.setdefault(follows, len(prompts))

    criteria = range(len(pairs[0].signs))
    reads = [[prompt(pair, c) for c in criteria] for pair in pairs]
    return Prompted(
        instructions=list(texts),
        used=list(used),
        follows=[list(follows) for follows in prompts],
        comparisons=[(used[pair.responses[0]], used[pair.responses[1]]) for pair in pairs],
        reads=reads,
        signs=[pair.signs for pair in pairs],
    )


def instruction_of(config: "AMoPOConfig", scales: Scales, criterion: int, ratings: Ratings) -> str:
    """Return the instruction of a criterion's prompt that asks for these ratings; "" for none."""
    asked = tuple(
        (
            dimension.name,
            dimension.description,
            tuple(scales[dimension.name]),
            None if config.rating_in_prompt == "none" else ratings[dimension.name],
        )
        for dimension in config.dimensions
    )
    if config.prompts == "one":
        known = (one for one in asked if one[-1] is not None or config.rating_in_prompt == "none")
        return overall_instruction(config.overall_instruction, tuple(known))
    if config.overall and criterion == 0:
        return overall_instruction(config.overall_instruction, asked)
    return instruction(config.instruction, asked[criterion - config.overall])


def count_prompts(config: "AMoPOConfig") -> int:
    """Return how many different prompts a pair has: criteria without an instruction share one."""
    if config.prompts == "one":
        return 1
    own = len(config.dimensions) if config.instruction != "" else 1
    alike = config.instruction == config.overall_instruction == ""
    return own + (config.overall and not alike)


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
