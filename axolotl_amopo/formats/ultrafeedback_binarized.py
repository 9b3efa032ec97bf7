"""`type: amopo.ultrafeedback_binarized`: two conversations with a score each.

    {"prompt": "...", "chosen": [{"role": "user", ...}, {"role": "assistant", ...}],
     "rejected": [...], "score_chosen": 8.5, "score_rejected": 6.0}

The one dimension is `score`, from 1 to 10. Equal scores are a tie, whatever is called chosen. Other
names go under `fields:`, such as `score_chosen: chosen-rating`
(https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized).
"""

from typing import ClassVar

from axolotl_amopo.data.rows import RatedPrompt, Response, Row
from axolotl_amopo.formats.pairs import Pairs


class Binarized(Pairs):
    scale = (1, 10)
    scales: ClassVar = {}
    makes: ClassVar = ("score",)

    def read(self, row: Row) -> RatedPrompt:
        responses = []
        for side in ("chosen", "rejected"):
            score = f"score_{side}"
            ratings = row.ratings({row.key("score"): row.get(score)}, row.key(score))
            responses.append(Response(row.response(row.get(side), row.key(side)), ratings))
        return RatedPrompt(self.prompt(row), responses, [row.number], tools=row.tools())


load = Binarized
