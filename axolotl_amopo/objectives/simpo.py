"""SimPO: Simple Preference Optimization with a Reference-Free Reward (Meng et al., NeurIPS 2024).

https://arxiv.org/abs/2405.14734, equation 6:

    r(y) = beta / |y| * sum_t log pi(y_t | x, y_<t)
    L    = -log sigmoid(r(chosen) - r(rejected) - gamma)

The reward is what generation maximises, a mean over tokens, so length earns nothing by itself and
no reference model is needed. The prompt has no instruction. A comparison's criteria count alike:
with `winner: overall` they all name the same winner and this is SimPO to the digit; with
`winner: per_dimension` it is the mean of SimPO's losses over the dimensions.

beta: 2 to 10 in published runs. gamma: absolute here as in TRL's `simpo_gamma`; SimPO's own code
has the ratio gamma / beta, 0.1 to 0.8.
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
    response_stats,
)

PAPER = Paper(
    "SimPO",
    "https://arxiv.org/abs/2405.14734",
    """\
@inproceedings{meng-etal-2024-simpo,
  title = {{SimPO}: Simple Preference Optimization with a Reference-Free Reward},
  author = {Meng, Yu and Xia, Mengzhou and Chen, Danqi},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  url = {https://arxiv.org/abs/2405.14734}
}""",
)


@dataclass(frozen=True)
class SimPO:
    """SimPO, see the head of this file."""

    paper: ClassVar[Paper] = PAPER
    defaults: ClassVar[Mapping[str, Any]] = {"instruction": "", "overall_instruction": ""}

    beta: float = hyperparameter(2.0, "Reward scale", above=0)
    gamma: float = hyperparameter(
        0.5,
        "Target margin between the rewards; absolute, not a ratio to rl_beta",
        at_least=0,
        at_most=100,
    )

    @property
    def needs(self) -> frozenset[str]:
        """Return nothing: log-probabilities are enough."""
        return frozenset()

    @property
    def target_margin(self) -> float:
        """Return the margin between rewards at which the loss aims."""
        return self.gamma

    def __call__(self, responses: Responses, draw: Draw | None) -> Outcome:
        """Return the pair losses; nothing is drawn."""
        rewards = self.beta * response_stats(responses.logps, responses.mask).avg_logp  # [B, K, N]
        chosen, rejected = responses.winner_first(rewards).unbind(-1)  # [P, C]
        margins = chosen - rejected - self.gamma
        shares = weights.uniform(responses.signs != 0, margins.dtype)
        return Outcome(-F.logsigmoid(margins), shares, rewards.detach(), terms={}, margins=margins)
