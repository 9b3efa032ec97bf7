"""`type: amopo.rated`: a prompt and a list of responses with scores.

    {"prompt": "...", "responses": [{"text": "...", "scores": {"coherence": 4.3, ...}}, ...]}

`messages` may stand in place of `prompt`, and `system` beside it.
"""

from axolotl_amopo.data.format import DatasetFormat
from axolotl_amopo.data.rows import RatedPrompt, Response, Row


class Rated(DatasetFormat):
    def read(self, row: Row) -> RatedPrompt:
        key = row.key("responses")
        listed = row.get("responses")
        if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
            raise row.error(key, 'must be a list of {"text": ..., "scores": {...}}.')
        text, scores = row.key("text"), row.key("scores")
        responses = []
        for i, item in enumerate(listed):
            for name in (text, scores):
                if item.get(name) is None:
                    raise row.error(f"{key}[{i}].{name}", "is missing.")
            responses.append(
                Response(
                    row.response(item[text], f"{key}[{i}].{text}"),
                    row.ratings(item[scores], f"{key}[{i}].{scores}"),
                )
            )
        return RatedPrompt(
            row.conversation("prompt", "messages"), responses, [row.number], tools=row.tools()
        )


load = Rated
