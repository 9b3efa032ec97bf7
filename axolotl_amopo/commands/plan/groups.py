"""The examples that a plan simulates: pairs, and groups of rated responses (`group_by_prompt`).

What an example costs depends on which of its responses share which prompts: on the pairs, and with
a rating or weights in the prompt on how many different ones there are. Where the config's data is
prepared, its own groups say that. Else an example is made up by the code that makes real ones.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_from_disk

from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.data.examples import as_text
from axolotl_amopo.data.pairing import PairRule
from axolotl_amopo.data.rows import RatedPrompt, Response
from axolotl_amopo.errors import ConfigError
from axolotl_amopo.example import Example
from axolotl_amopo.model.forest import Forest
from axolotl_amopo.training.sampler import row_items, row_lengths

# Of these, the longest by `row_lengths`, which counts every response under every prompt, the
# tokens are counted exactly.
LONGEST_ROWS = 32


def made_up_example(amopo: AMoPOConfig, responses: int) -> Example:
    """Return an example, without tokens, of which all dimensions rate no two responses alike.

    So it has the most prompts that so many responses may have.
    """
    scales = {d.name: d.scale or (0.0, 1.0) for d in amopo.dimensions}
    rated = []
    for n in range(responses):
        share = n / max(1, responses - 1)
        ratings = {name: low + share * (high - low) for name, (low, high) in scales.items()}
        rated.append(Response(str(n), dict(ratings), overall=share))
    prompt = RatedPrompt([{"role": "user", "content": ""}], rated, rows=[1])
    rule = PairRule(amopo, scales)
    made = as_text(list(rule.pairs(prompt, Counter())), rule, "")
    made["prompt_ids"] = [[] for _ in made["instructions"]]
    made["response_ids"] = [[] for _ in made["responses"]]
    example = Example.from_row(made | {"example_id": 0})
    if not amopo.draws_weights:
        return example
    # Of the weights that were drawn, two may be alike as they are written.
    return replace(
        example,
        prompts=[[] for _ in example.follows],
        follows=[[k for _ in texts] for k, texts in enumerate(example.follows)],
    )


def prepared_folder(cfg: Any, name: str) -> Path:
    """Return where axolotl keeps prepared rows of a name."""
    # Here and below: a plan of pairs, of which none are looked for, is seconds sooner without.
    from axolotl.utils.data.shared import get_prepared_dataset_path

    return get_prepared_dataset_path(cfg, name)


def prepared_rows(cfg: Any, amopo: AMoPOConfig) -> Dataset | None:
    """Return the rows that training would use again; None where there are none.

    Args:
        cfg: axolotl's validated config.
        amopo: its block, with `datasets` where the data was found.
    """
    if not amopo.datasets:
        return None
    from axolotl.utils.data.shared import generate_dataset_hash_from_config

    from axolotl_amopo.data.cache import unfinished

    # As axolotl names it (utils/data/sft.py), which asks the tokenizer where it came from.
    tokenizer = cfg.tokenizer_config or cfg.base_model_config or cfg.base_model
    name = generate_dataset_hash_from_config(cfg, cfg.datasets, str(tokenizer))
    folder = prepared_folder(cfg, name)
    return None if unfinished(folder) else load_from_disk(str(folder))


def usual_row(rows: Dataset) -> Example:
    """Return the example of median length."""
    lengths = row_lengths(rows)
    return Example.from_row(rows[int(np.argsort(lengths)[len(lengths) // 2])])


def largest_row(rows: Dataset, sequence_len: int) -> Example:
    """Return the example with the most tokens.

    Raises:
        ConfigError: where each is longer than `sequence_len`.
    """
    lengths = row_lengths(rows)
    (fitting,) = np.nonzero(row_items(rows, "input_ids") <= sequence_len)
    if not len(fitting):
        raise ConfigError(f"sequence_len: {sequence_len} is less than every example has.")
    longest = fitting[np.argsort(lengths[fitting])[-LONGEST_ROWS:]]
    return max((Example.from_row(rows[int(row)]) for row in longest), key=tokens)


def tokens(example: Example) -> int:
    """Return how many tokens an example runs, shared ones once."""
    forest, _ = Forest.of([example])
    return sum(forest.lengths)


def pairs_in(example: Example) -> int:
    """Return how many pairs an example has; a response with itself is none."""
    return sum(first != second for first, second in example.comparisons)
