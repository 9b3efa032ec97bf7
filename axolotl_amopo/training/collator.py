"""Prepared rows -> one batch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from axolotl_amopo.data.tokenizer import PairTokens
from axolotl_amopo.model.layout import plant


@dataclass
class AMoPOCollator:
    """Collects B examples, a pair or a group of pairs each, under K prompts into one forest of
    segments, see `layout`.

    Nothing is padded here: which layout the model can take is the trainer's to find out.

    The batch holds:
        example_ids     [B]; first, because transformers takes the number of examples from a
                        batch's first tensor
        dimension_mask  [P, K] bool, of P pairs
        groups          [P] the example of each pair
        places          [P, K, 2], only where an example has several pairs: see `Forest.pairs`
        input_ids       [1, N] the forest's tokens, each shared one once
        position_ids    [1, N] counted from each segment's root
        labels          [1, N] the token's id at response tokens, else -100; for token counts
        forest          a `Forest`
        pad_to_multiple_of  int, for layouts that need padding
    """

    tokenizer: Any  # axolotl passes this and the two below to every collator
    pad_to_multiple_of: int | None = None
    padding: Any = True
    return_tensors: str = "pt"

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        groups, pairs, masks = [], [], []
        for i, row in enumerate(rows):
            tokens = PairTokens(row["prompt_ids"], row["response_ids"], row["winners"])
            of_row = tokens.pairs()
            groups += [i] * len(of_row)
            pairs += of_row
            masks += np.split(np.array(row["dimension_mask"], dtype=bool), len(of_row))
        dimension_mask = torch.from_numpy(np.stack(masks))
        forest, tokens = plant(pairs, dimension_mask.tolist(), groups)
        input_ids = torch.tensor([tokens])
        ends = [0] * len(forest.parents)
        positions = []
        for segment, (parent, length) in enumerate(
            zip(forest.parents, forest.lengths, strict=True)
        ):
            begin = ends[parent] if parent >= 0 else 0
            ends[segment] = begin + length
            positions.append(torch.arange(begin, begin + length))
        is_response = torch.zeros(len(forest.parents), dtype=torch.bool)
        is_response[[leaf.segment for leaf in forest.leaves]] = True
        is_response = is_response.repeat_interleave(torch.tensor(forest.lengths))
        batch = {
            "example_ids": torch.tensor([row["example_id"] for row in rows]),
            "dimension_mask": dimension_mask,
            "groups": torch.tensor(groups),
            "input_ids": input_ids,
            "position_ids": torch.cat(positions).unsqueeze(0),
            "labels": input_ids.masked_fill(~is_response, -100),
            "forest": forest,
            "pad_to_multiple_of": self.pad_to_multiple_of or 1,
        }
        if forest.pairs is not None:
            batch["places"] = torch.tensor(forest.pairs)
        return batch
