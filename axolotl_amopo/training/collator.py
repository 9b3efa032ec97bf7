"""Prepared rows -> one batch."""

from dataclasses import dataclass
from typing import Any

from axolotl_amopo.example import Example
from axolotl_amopo.model.batch import make_batch


@dataclass
class AMoPOCollator:
    """Collects rows into a batch, see `make_batch`."""

    tokenizer: Any  # axolotl passes this and the two last ones to every collator
    pad_to_multiple_of: int | None = None
    padding: Any = True
    return_tensors: str = "pt"
    token_counts: bool = False  # see `make_batch`

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        examples = [Example.from_row(row) for row in rows]
        return make_batch(examples, self.pad_to_multiple_of or 1, token_counts=self.token_counts)
