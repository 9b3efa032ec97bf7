"""Prepared rows -> one batch."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from axolotl_amopo.data.tokens import PairTokens


@dataclass
class AMoPOCollator:
    """Lays a batch of B pairs under K prompts out as B * K * 2 sequences.

    Rows go example by example, prompt by prompt, chosen before rejected. Sequences are padded on
    the left, so that all responses end in the last column and the model's own `logits_to_keep`
    limits the logits to the response positions.

    The batch holds:
        dimension_mask  [B, K] bool; first, because transformers takes the number of examples
                        from a batch's first tensor
        example_ids     [B]
        input_ids, attention_mask, position_ids, labels  [B * K * 2, L]; labels are -100 but at
                        response tokens
        response_len    int, T: no response is longer
    """

    tokenizer: Any
    pad_to_multiple_of: int | None = None
    padding: Any = True  # axolotl passes these two to every collator
    return_tensors: str = "pt"

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        sequences = [
            sequence
            for row in rows
            for sequence in PairTokens(
                row["prompt_ids"], row["response_ids"], row["winners"]
            ).sequences()
        ]
        longest = max(len(prompt) + len(response) for prompt, response in sequences)
        multiple = self.pad_to_multiple_of or 1
        length = math.ceil(longest / multiple) * multiple
        pad = self.tokenizer.pad_token_id

        shape = (len(sequences), length)
        input_ids = torch.full(shape, pad)
        labels = torch.full(shape, -100)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for i, (prompt, response) in enumerate(sequences):
            start = length - len(prompt) - len(response)
            input_ids[i, start:] = torch.tensor(prompt + response)
            labels[i, length - len(response) :] = torch.tensor(response)
            attention_mask[i, start:] = 1
        position_ids: Tensor = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return {
            "dimension_mask": torch.tensor([row["dimension_mask"] for row in rows]).bool(),
            "example_ids": torch.tensor([row["example_id"] for row in rows]),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "labels": labels,
            "response_len": max(len(response) for _, response in sequences),
        }
