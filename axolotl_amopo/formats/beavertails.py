"""`type: amopo.beavertails`: BeaverTails as published, one response a row, several rows a prompt.

    {"prompt": "...", "response": "...", "is_safe": false,
     "category": {"privacy_violation": true, "violence,aiding_and_abetting,incitement": false, ...}}

Dimensions to choose from: `is_safe`, where yes is better, and each category by its name, where no
is (https://huggingface.co/datasets/PKU-Alignment/BeaverTails). Where a prompt has several rows of
one response, rated by several people, each is a response of its own, and equal texts make no pair.
"""

from collections.abc import Mapping

from axolotl_amopo.data.format import DatasetFormat
from axolotl_amopo.data.rows import RatedPrompt, Response, Row


class BeaverTails(DatasetFormat):
    scale = (0, 1)
    one_response_per_row = True

    def __init__(self, tokenizer, cfg, ds_cfg):
        super().__init__(tokenizer, cfg, ds_cfg)
        self.lower_is_better = frozenset(self.config.dimension_names) - {"is_safe"}

    def read(self, row: Row) -> RatedPrompt:
        categories = row.get("category") if row.has("category") else {}
        if not isinstance(categories, Mapping):
            raise row.error(row.key("category"), "must hold yes or no by category.")
        ratings = row.ratings({**categories, row.key("is_safe"): row.get("is_safe")})
        messages = row.conversation("prompt", "messages")
        return RatedPrompt(messages, [Response(row.text("response"), ratings)], [row.number])


load = BeaverTails
