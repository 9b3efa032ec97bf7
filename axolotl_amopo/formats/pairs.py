"""`type: amopo.pairs`: a prompt, a chosen and a rejected response, and the ratings of each.

The published AMoPO training file, ratings inside the responses:

    {"prompt": "...", "chosen": {"response": "...", "helpfulness": "4", ...}, "rejected": {...}}

or text (or messages) with the ratings beside it:

    {"prompt": "...", "chosen": "...", "rejected": "...",
     "chosen_ratings": {"helpfulness": 4, ...}, "rejected_ratings": {...}}

Where a row has no ratings, it says one thing, `preference`: 1 for the chosen response, 0 for the
other. Beside it, dimensions of other datasets are missing ratings.

`messages` may stand in place of `prompt`. Without either, `chosen` and `rejected` are whole
conversations that share all but their last turn.
"""

from collections.abc import Mapping
from typing import ClassVar

from axolotl_amopo.data.format import DatasetFormat
from axolotl_amopo.data.rows import Message, RatedPrompt, Response, Row
from axolotl_amopo.formats.helpsteer import with_turns

PREFERENCE = "preference"


class Pairs(DatasetFormat):
    scales: ClassVar = {PREFERENCE: (0, 1)}
    makes: ClassVar = (PREFERENCE,)

    def read(self, row: Row) -> RatedPrompt:
        responses = [self.response(row, side) for side in ("chosen", "rejected")]
        if responses[0].turn == responses[1].turn:
            raise row.error(row.key("rejected"), "is the same text as the chosen response.")
        return RatedPrompt(self.prompt(row), responses, [row.number], True, row.tools())

    @staticmethod
    def response(row: Row, side: str) -> Response:
        value, key = row.get(side), row.key(side)
        inner = row.key("response")
        if isinstance(value, Mapping) and value.get(inner) is not None:
            turn = row.response(value[inner], f"{key}.{inner}")
            if not row.has(f"{side}_ratings"):
                return Response(turn, row.ratings(value, key))
        elif isinstance(value, Mapping) and row.key("content") not in value:
            raise row.error(f"{key}.{inner}", "is missing.")
        else:
            turn = row.response(value, key)
        name = f"{side}_ratings"
        if PREFERENCE in row.source.dimensions and not row.has(name):
            return Response(turn, row.ratings({row.key(PREFERENCE): float(side == "chosen")}))
        return Response(turn, row.ratings(row.get(name), row.key(name)))

    @staticmethod
    def prompt(row: Row) -> list[Message]:
        if isinstance(row.values.get(row.key("prompt")), str):  # the published file is HelpSteer2's
            return with_turns(row.conversation("prompt"), row)
        if row.has("prompt") or row.has("messages") or not isinstance(row.get("chosen"), list):
            return row.conversation("prompt", "messages")
        chosen, rejected = (
            row.check_messages(row.get(side), row.key(side))[:-1] for side in ("chosen", "rejected")
        )
        if chosen != rejected:
            raise row.error(
                row.key("rejected"), "and chosen must share all turns but the last, the prompt."
            )
        return row.check_prompt(chosen, row.key("chosen"))


load = Pairs
