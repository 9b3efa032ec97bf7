"""`type: amopo.ric`: rated responses for axolotl's own supervised fine-tuning.

    amopo: {dimensions: [helpfulness, honesty]}
    datasets:
      - path: rated.jsonl
        type: amopo.ric
        rows: amopo.rated      # the format of its rows, or a module of anybody's

There is no `rl:` in such a config. Every response is a row under the prompt that states its ratings
(RiC, see `objectives.ric`): the sequences and labels that `rl: amopo` trains on with `objective:
ric`, for axolotl's trainer, its sample packing and its kernels.
"""

import importlib
from collections.abc import Mapping
from itertools import cycle
from typing import Any

from axolotl.prompt_tokenizers import DatasetWrappingStrategy
from datasets import Dataset, Features, List, Value

from axolotl_amopo.config.block import read_block
from axolotl_amopo.config.datasets import ROWS, SUPERVISED
from axolotl_amopo.config.through_axolotl import mark_of
from axolotl_amopo.data.examples import unpack
from axolotl_amopo.data.format import DatasetFormat
from axolotl_amopo.data.pipeline import WRITE_BATCH, processes, temporary_file
from axolotl_amopo.errors import ConfigError

# As axolotl's own types have them: rows of several types in a run must be alike.
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int64")),
        "attention_mask": List(Value("int8")),
    }
)


class Supervised(DatasetWrappingStrategy):
    """Turns a dataset of rated responses into a row per response."""

    def __init__(self, rows: DatasetFormat):
        self.rows = rows

    def wrap_dataset(
        self, dataset: Dataset, process_count: int | None = None, **options: Any
    ) -> Dataset:
        """Return the rows of a whole loaded dataset: what axolotl calls, see `pipeline.prepare`."""
        prepared = self.rows.wrap_dataset(dataset, process_count, **options)
        return prepared.map(
            sequences,
            batched=True,
            batch_size=WRITE_BATCH,
            remove_columns=prepared.column_names,
            features=FEATURES,
            cache_file_name=temporary_file(),
            num_proc=processes(process_count, len(prepared)),
            desc=f"Writing responses of {self.rows.source.name}",
        )


def sequences(batch: Mapping[str, list]) -> dict[str, list[list[int]]]:
    """Return every response behind each prompt that it follows, of a batch of prepared rows."""
    made: dict[str, list[list[int]]] = {name: [] for name in FEATURES}
    for row in unpack(batch):
        # [K][N], flat: every response under the first prompt, then under the second.
        for text, response in zip(row["follows"], cycle(row["response_ids"]), strict=False):
            prompt = row["prompt_ids"][text]
            made["input_ids"].append(prompt + response)
            made["labels"].append([-100] * len(prompt) + response)
            made["attention_mask"].append([1] * (len(prompt) + len(response)))
    return made


def load(tokenizer: Any, cfg: Any, ds_cfg: Any) -> Supervised:
    """Return what axolotl calls for an entry.

    Raises:
        ConfigError: for an entry that the plugin did not prepare.
    """
    stored = read_block(cfg).datasets.get(mark_of(ds_cfg), {}) if cfg.amopo else {}
    if ROWS not in stored:
        raise ConfigError(
            f"{ds_cfg.path}: write type: {SUPERVISED}, and {ROWS}: with the type that reads them."
        )
    return Supervised(importlib.import_module(stored[ROWS]).load(tokenizer, cfg, ds_cfg))
