"""`type: amopo.helpsteer`: HelpSteer and HelpSteer2 as published.

One rated response a row, several rows a prompt, ratings from 0 to 4 as numbers or strings:

    {"prompt": "...", "response": "...", "helpfulness": 3, "correctness": 4, "coherence": 4, ...}

HelpSteer2 writes earlier turns of a conversation into the prompt, each after a line with
`<extra_id_1>User` or `<extra_id_1>Assistant`; they become turns again here
(https://huggingface.co/datasets/nvidia/HelpSteer2).
"""

import re

from axolotl_amopo.data.rows import Message, RatedPrompt, Response, Row
from axolotl_amopo.data.strategy import AMoPOStrategy

TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


class HelpSteerStrategy(AMoPOStrategy):
    scale = (0, 4)
    one_response_a_row = True

    def read(self, row: Row) -> RatedPrompt:
        messages = row.conversation("prompt", "messages")
        if row.has("prompt") and isinstance(row.get("prompt"), str):
            messages = [*messages[:-1], *self.turns(messages[-1]["content"], row)]
        return RatedPrompt(messages, [Response(row.text("response"), row.ratings())], [row.number])

    @staticmethod
    def turns(prompt: str, row: Row) -> list[Message]:
        first, *rest = TURN.split(prompt)
        turns = [("User", first), *zip(rest[::2], rest[1::2], strict=True)]
        if turns[-1][0] != "User":
            raise row.error(row.key("prompt"), "ends with an assistant turn.")
        return [
            {"role": role.lower(), "content": row.check_text(text, row.key("prompt"))}
            for role, text in turns
        ]


def load(tokenizer, cfg, ds_cfg):
    return HelpSteerStrategy(tokenizer, cfg, ds_cfg)
