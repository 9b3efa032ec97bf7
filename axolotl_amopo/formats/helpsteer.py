"""`type: amopo.helpsteer`: HelpSteer and HelpSteer2 as published.

One rated response a row, several rows a prompt, ratings from 0 to 4 as numbers or strings:

    {"prompt": "...", "response": "...", "helpfulness": 3, "correctness": 4, "coherence": 4, ...}

HelpSteer2 writes earlier turns of a conversation into the prompt, each after a line with
`<extra_id_1>User` or `<extra_id_1>Assistant`; they become turns again here
(https://huggingface.co/datasets/nvidia/HelpSteer2).
"""

import re

from axolotl_amopo.data.format import DatasetFormat
from axolotl_amopo.data.rows import Message, RatedPrompt, Response, Row

TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def with_turns(messages: list[Message], row: Row) -> list[Message]:
    """HelpSteer2's earlier turns, out of the text of the last message."""
    *before, last = messages
    first, *rest = TURN.split(last["content"])
    turns = [("User", first), *zip(rest[::2], rest[1::2], strict=True)]
    key = row.key("prompt")
    if turns[-1][0] != "User":
        raise row.error(key, "ends with an assistant turn.")
    return [
        *before,
        *({"role": role.lower(), "content": row.check_text(text, key)} for role, text in turns),
    ]


class HelpSteer(DatasetFormat):
    scale = (0, 4)
    one_response_per_row = True

    def read(self, row: Row) -> RatedPrompt:
        messages = row.conversation("prompt", "messages")
        if isinstance(row.values.get(row.key("prompt")), str):
            messages = with_turns(messages, row)
        return RatedPrompt(messages, [Response(row.text("response"), row.ratings())], [row.number])


load = HelpSteer
