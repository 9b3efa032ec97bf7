"""`type: amopo.safe_rlhf`: PKU-SafeRLHF as published, two responses a prompt.

    {"prompt": "...", "response_0": "...", "response_1": "...", "better_response_id": 0,
     "safer_response_id": 1, "is_response_0_safe": false, "is_response_1_safe": true,
     "response_0_severity_level": 2, "response_1_severity_level": 0, ...}

Dimensions to choose from: `helpfulness` (1 for the better response, 0 for the other), `safety` (the
same of the safer one), `is_safe` (yes or no), and `severity` of the harm, 0 to 3, where lower is
better (https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF).
"""

from typing import ClassVar

from axolotl_amopo.data.format import DatasetFormat
from axolotl_amopo.data.rows import RatedPrompt, Response, Row


class SafeRLHF(DatasetFormat):
    scale = (0, 1)
    scales: ClassVar = {"severity": (0, 3)}
    lower_is_better = frozenset({"severity"})
    makes: ClassVar = ("helpfulness", "safety", "is_safe", "severity")

    def read(self, row: Row) -> RatedPrompt:
        ids = {
            dimension: int(row.number_in(name, 0, 1)) if row.has(name) else None
            for dimension, name in (
                ("helpfulness", "better_response_id"),
                ("safety", "safer_response_id"),
            )
        }
        responses = []
        for i in (0, 1):
            name = f"response_{i}"
            ratings = {
                dimension: None if winner is None else int(winner == i)
                for dimension, winner in ids.items()
            }
            for dimension, key in (
                ("is_safe", f"is_response_{i}_safe"),
                ("severity", f"{name}_severity_level"),
            ):
                ratings[dimension] = row.get(key) if row.has(key) else None
            turn = row.response(row.get(name), row.key(name))
            responses.append(Response(turn, row.ratings(ratings, row.key(name))))
        return RatedPrompt(row.conversation("prompt", "messages"), responses, [row.number])


load = SafeRLHF
