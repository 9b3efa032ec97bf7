"""`type: amopo.ultrafeedback`: UltraFeedback as published, about four rated responses a prompt.

    {"instruction": "...", "completions": [{"response": "...", "overall_score": 7.5,
      "annotations": {"helpfulness": {"Rating": "4", ...}, "honesty": {"Rating": "N/A"}, ...}}]}

The dimensions are helpfulness, honesty, instruction_following and truthfulness, from 1 to 5; "N/A"
is a missing rating. `overall_score`, from 1 to 10, is read with `order_by: dataset` alone: about
2,000 of the published tens were ones (https://github.com/OpenBMB/UltraFeedback/issues/8).
"""

from collections.abc import Mapping

from axolotl_amopo.data.format import DatasetFormat
from axolotl_amopo.data.rows import RatedPrompt, Response, Row


class UltraFeedback(DatasetFormat):
    scale = (1, 5)

    def read(self, row: Row) -> RatedPrompt:
        responses = [self.response(row, *item) for item in row.items("completions")]
        messages = row.conversation("instruction", "prompt", "messages")
        return RatedPrompt(messages, responses, [row.number], tools=row.tools())

    def response(self, row: Row, completion: Mapping, key: str) -> Response:
        inner = row.key("response")
        turn = row.response(completion.get(inner), f"{key}.{inner}")
        name = row.key("annotations")
        annotations = completion.get(name)
        if not isinstance(annotations, Mapping):
            raise row.error(f"{key}.{name}", "must hold the annotations by dimension.")
        ratings = {
            dimension: value.get("Rating") if isinstance(value, Mapping) else value
            for dimension, value in annotations.items()
        }
        overall = None
        score = completion.get("overall_score")
        if score is not None and self.config.order_by == "dataset":
            overall = (row.check_number(score, f"{key}.overall_score", 1, 10) - 1) / 9
        return Response(turn, row.ratings(ratings, f"{key}.{name}"), overall)


load = UltraFeedback
