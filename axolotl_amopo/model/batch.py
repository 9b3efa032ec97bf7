"""Examples -> one batch of tensors, nothing padded.

Which layout the model can take is chosen later (`choose`), so a batch holds the forest's tokens
once each, and what the objectives read.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from axolotl_amopo.example import Example
from axolotl_amopo.model.forest import Forest
from axolotl_amopo.objectives.base import Responses


def make_batch(
    examples: Sequence[Example], pad_to_multiple_of: int = 1, *, token_counts: bool = False
) -> dict[str, Any]:
    """Return the batch of B examples.

    Args:
        examples: of the same criteria.
        pad_to_multiple_of: for layouts that need padding.
        token_counts: whether an example counts by its response tokens, under all prompts that they
            run under, instead of by 1.

    It holds:
        example_ids     [B]; first, because transformers takes the number of examples from a
                        batch's first tensor
        comparisons     [P, 3] example, and the places of its two responses
        reads           [P, C] the prompt under which a criterion reads a comparison
        signs           [P, C] +1, -1 or 0
        ratings         [B, N, C] float32, NaN where missing or padded
        points          [B, C] float32
        weights         [B, C] float32, where the examples have weights of their own
        fit             [B, K, N] float32, NaN where padded, where the examples have it
        counts          [B] 1, or tokens; the trainer puts 0 where an example only pads a pass
        input_ids       [1, tokens] of the forest
        position_ids    [1, tokens] counted from each segment's root
        labels          [1, tokens] the token's id at response tokens, else -100; for token counts
        forest          a `Forest`
        pad_to_multiple_of  int, for layouts that need padding
    """
    forest, tokens = Forest.of(examples)
    input_ids = torch.tensor([tokens])
    ratings = torch.full((len(examples), forest.responses, examples[0].criteria), torch.nan)
    for b, example in enumerate(examples):
        ratings[b, : len(example.responses)] = torch.tensor(example.ratings)
    others: dict[str, Tensor] = {}
    if examples[0].weights:
        others["weights"] = torch.tensor([example.weights for example in examples])
    if examples[0].fit:
        fit = torch.full((len(examples), forest.prompts, forest.responses), torch.nan)
        for b, example in enumerate(examples):
            fit[b, : len(example.follows), : len(example.responses)] = torch.tensor(example.fit)
        others["fit"] = fit
    return {
        "example_ids": torch.tensor([example.id for example in examples]),
        "comparisons": torch.tensor(
            [(b, *places) for b, example in enumerate(examples) for places in example.comparisons]
        ),
        "reads": torch.tensor([row for example in examples for row in example.reads]),
        "signs": torch.tensor([row for example in examples for row in example.signs]),
        "ratings": ratings,
        "points": torch.tensor([example.points for example in examples], dtype=torch.float32),
        **others,
        "counts": _tokens(forest) if token_counts else torch.ones(len(examples)),
        "input_ids": input_ids,
        "position_ids": _positions(forest),
        "labels": input_ids.masked_fill(~_is_response(forest), -100),
        "forest": forest,
        "pad_to_multiple_of": pad_to_multiple_of,
    }


def responses(batch: dict[str, Any], logps: Tensor, mask: Tensor, **others: Any) -> Responses:
    """Return what an objective is given: a batch and its log-probabilities.

    Args:
        batch: as `make_batch` makes it, on the device of `logps`.
        logps, mask: [B, K, N, T], of `response_logps`.
        others: fields of `Responses` that the batch does not hold, such as `reference`; `weights`
            stand in for those that it lacks.
    """
    others |= {name: batch[name] for name in ("weights", "fit") if name in batch}
    return Responses(
        logps,
        mask,
        batch["comparisons"],
        batch["reads"],
        batch["signs"],
        ratings=batch["ratings"],
        points=batch["points"],
        counts=batch["counts"],
        ids=batch["example_ids"],
        **others,
    )


def _tokens(forest: Forest) -> Tensor:
    tokens = torch.zeros(forest.examples)
    for leaf in forest.leaves:
        tokens[leaf.example] += forest.lengths[leaf.segment] * len(leaf.prompts)
    return tokens


def _positions(forest: Forest) -> Tensor:
    ends = [0] * len(forest.parents)
    positions = []
    for segment, (parent, length) in enumerate(zip(forest.parents, forest.lengths, strict=True)):
        begin = ends[parent] if parent >= 0 else 0
        ends[segment] = begin + length
        positions.append(torch.arange(begin, begin + length))
    return torch.cat(positions).unsqueeze(0)


def _is_response(forest: Forest) -> Tensor:
    is_response = torch.zeros(len(forest.parents), dtype=torch.bool)
    is_response[[leaf.segment for leaf in forest.leaves]] = True
    return is_response.repeat_interleave(torch.tensor(forest.lengths))
