"""DPO: Direct Preference Optimization (Rafailov et al., NeurIPS 2023), per dimension.

https://arxiv.org/abs/2305.18290, equation 7, for each dimension k with its own winner:

    r(y) = beta * (log pi(y | x) - log pi_ref(y | x))     sums over tokens
    L_k  = -log sigmoid(r(winner_k) - r(loser_k))
    loss = mean over pairs of sum_k w_k L_k

The reward is by how much the policy has made a response likelier than the reference model, the
policy before training, has it. So a pair is learned by what changes, and the further the policy
goes, the less the pair pulls. The w are the user's weights. A dimension in which the two responses
tie adds nothing, and the other dimensions keep their weight, as in the experiments of RACO
(arXiv 2602.02495), where this is the baseline "DPO-LW". Where dimensions disagree on a pair, the
sum is DPO with a soft label: its optimum is a small margin, not a failure.

beta: 0.1 in the paper, 0.01 to 0.5 in published runs; 0.2 in RACO's. `length_normalised` divides
both sums by the response's tokens (TRL's `sigmoid_norm`): rewards are then per token and much
smaller, and beta wants to be 1 to 10.
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
    "DPO",
    "https://arxiv.org/abs/2305.18290",
    """\
@inproceedings{rafailov-etal-2023-dpo,
  title = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author = {Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Ermon, Stefano and
            Manning, Christopher D. and Finn, Chelsea},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  url = {https://arxiv.org/abs/2305.18290}
}""",
)

#: Defaults of losses per dimension: one prompt without an instruction, which all criteria read.
PER_DIMENSION = {
    "instruction": "",
    "overall_instruction": "",
    "overall": False,
    "winner": "per_dimension",
    "weights": "equal",
}


@dataclass(frozen=True)
class DPO:
    """DPO, see the head of this file."""

    paper: ClassVar[Paper] = PAPER
    defaults: ClassVar[Mapping[str, Any]] = PER_DIMENSION

    beta: float = hyperparameter(0.1, "Reward scale", above=0)
    length_normalised: bool = hyperparameter(
        False, "Divide a response's log-probabilities by its tokens"
    )

    @property
    def needs(self) -> frozenset[str]:
        """Return the reference model's log-probabilities, and the user's weights."""
        return frozenset({"reference", "weights"})

    def __call__(self, responses: Responses, draw: Draw | None) -> Outcome:
        """Return the pair losses; nothing is drawn."""
        rewards = self.beta * log_ratios(responses, per_token=self.length_normalised)  # [B, K, N]
        chosen, rejected = responses.winner_first(rewards).unbind(-1)  # [P, C]
        margins = chosen - rejected
        shares = weights.as_given(responses, margins.dtype)
        return Outcome(-F.logsigmoid(margins), shares, rewards, terms={}, margins=margins)
