"""`type: amopo.helpsteer3`: HelpSteer3's preferences as published.

    {"context": [{"role": "user", "content": "..."}], "response1": "...", "response2": "...",
     "overall_preference": -2, ...}

The preference goes from -3 (response1 is much better) to 3 (response2 is). It is the one dimension
of this format, `preference`: a pair's two responses have it with opposite signs
(https://huggingface.co/datasets/nvidia/HelpSteer3).
"""

from typing import ClassVar

from axolotl_amopo.data.format import DatasetFormat
from axolotl_amopo.data.rows import RatedPrompt, Response, Row

MOST = 3


class HelpSteer3(DatasetFormat):
    scale = (-MOST, MOST)
    makes: ClassVar = ("preference",)

    def read(self, row: Row) -> RatedPrompt:
        preference = row.number_in("overall_preference", -MOST, MOST)
        responses = [
            Response(
                row.response(row.get(name), row.key(name)),
                row.ratings({"preference": sign * preference}, name),
                overall=(sign * preference + MOST) / (2 * MOST),
            )
            for name, sign in (("response1", -1), ("response2", 1))
        ]
        messages = row.conversation("context", "messages", "prompt")
        return RatedPrompt(messages, responses, [row.number], tools=row.tools())


load = HelpSteer3
