"""COS-DPO: Conditioned One-Shot multi-objective fine-tuning (Ren et al., UAI 2025).

https://arxiv.org/abs/2410.08316, its Weight-COS-DPO. Weights are drawn and written into the prompt,
and the same weights mix the losses of the dimensions:

    w    ~ Dirichlet                                               M vectors per example
    L_k  = -log sigmoid(r(winner_k | x, w) - r(loser_k | x, w)),   r as in DPO, under that prompt
    loss = mean over pairs and their M prompts of sum_k w_k L_k

So one model learns every compromise, and at inference the weights in the prompt choose one. Here a
criterion is a dimension under one of the M prompts, and `weights` are those of its prompt. At a
corner of the simplex this is the DPO of one dimension, under the prompt that names it. The policy
and the reference see the same prompt.

beta: 0.1 as for DPO.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F

from axolotl_amopo.objectives import weights
from axolotl_amopo.objectives.base import (
    Draw,
    Outcome,
    Paper,
    Responses,
    hyperparameter,
    log_ratios,
)

PAPER = Paper(
    "COS-DPO",
    "https://arxiv.org/abs/2410.08316",
    """\
@inproceedings{ren-etal-2025-cos-dpo,
  title = {{COS-DPO}: Conditioned One-Shot Multi-Objective Fine-Tuning Framework},
  author = {Ren, Yinuo and Xiao, Tesi and Shavlovsky, Michael and Ying, Lexing and
            Rahmanian, Holakou},
  booktitle = {Conference on Uncertainty in Artificial Intelligence},
  year = {2025},
  url = {https://arxiv.org/abs/2410.08316}
}""",
)


@dataclass(frozen=True)
class COSDPO:
    """COS-DPO, see the head of this file."""

    paper: ClassVar[Paper] = PAPER
    #: The instruction stands after the question, so that the M prompts share it.
    defaults: ClassVar[Mapping[str, Any]] = {
        "overall": False,
        "winner": "per_dimension",
        "prompts": "one",
        "instruction_place": "after",
        "rating_in_prompt": "none",
        "weight_draws": 4,
        "weight_concentration": 1.0,
    }

    beta: float = hyperparameter(0.1, "Reward scale", above=0)
    length_normalised: bool = hyperparameter(
        False, "Divide a response's log-probabilities by its tokens"
    )

    @property
    def needs(self) -> frozenset[str]:
        """Return the reference model's log-probabilities, and weights that stand in prompts."""
        return frozenset({"reference", "drawn_weights"})

    def __call__(self, responses: Responses, draw: Draw | None) -> Outcome:
        """Return the pair losses; the weights were drawn when the data was prepared."""
        responses.required("weights")
        rewards = self.beta * log_ratios(responses, per_token=self.length_normalised)  # [B, K, N]
        chosen, rejected = responses.winner_first(rewards).unbind(-1)  # [P, C]
        margins = chosen - rejected
        changes = responses.reads.sort(-1).values.diff(dim=-1) != 0
        prompts = 1 + changes.sum(-1, keepdim=True)  # [P, 1] how many a comparison is read under
        shares = weights.as_given(responses, margins.dtype) / prompts
        return Outcome(-F.logsigmoid(margins), shares, rewards, terms={}, margins=margins)
