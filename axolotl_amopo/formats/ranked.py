"""`type: amopo.ranked`: responses and, for every dimension, their order instead of numbers.

    {"prompt": "...", "responses": ["...", "...", "..."],
     "rankings": {"helpfulness": [2, 0, 1], "safety": [[0, 1], [2]]}}

A ranking lists the responses' places in `responses`, counted from 0, from the best to the worst;
where some are equal, each step is a list. `messages` may stand in place of `prompt`. The best of a
ranking counts as 1, the worst as 0.
"""

from typing import Any

from axolotl_amopo.data.format import DatasetFormat
from axolotl_amopo.data.rows import RatedPrompt, Response, Row


class Ranked(DatasetFormat):
    scale = (0, 1)

    def read(self, row: Row) -> RatedPrompt:
        listed = row.items("responses", object)
        rankings, key = row.get("rankings"), row.key("rankings")
        if not isinstance(rankings, dict):
            raise row.error(key, "must hold an order of the responses for every dimension.")
        by_dimension = {
            name: self.ratings(row, ranking, len(listed), f"{key}.{name}")
            for name, ranking in rankings.items()
            if ranking is not None and name in map(row.key, row.source.dimensions)
        }
        responses = [
            Response(
                row.response(value, where),
                row.ratings({name: shares[i] for name, shares in by_dimension.items()}, key),
            )
            for i, (value, where) in enumerate(listed)
        ]
        messages = row.conversation("prompt", "messages")
        return RatedPrompt(messages, responses, [row.number], tools=row.tools())

    @staticmethod
    def ratings(row: Row, ranking: Any, count: int, key: str) -> list[float]:
        """The share of the ranking's steps that each response stands above its end."""
        steps = [
            step if isinstance(step, list) else [step]
            for step in (ranking if isinstance(ranking, list) else [])
        ]
        places = [place for step in steps for place in step]
        known = all(type(place) is int for place in places)
        if not known or sorted(places) != list(range(count)):
            raise row.error(
                key, f"must list each place from 0 to {count - 1} once, the best response's first."
            )
        below = max(1, len(steps) - 1)
        shares = {place: 1 - i / below for i, step in enumerate(steps) for place in step}
        return [shares[place] if len(steps) > 1 else 1.0 for place in range(count)]


load = Ranked
