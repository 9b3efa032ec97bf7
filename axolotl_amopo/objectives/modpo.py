"""MODPO: Multi-Objective Direct Preference Optimization (Zhou et al., Findings of ACL 2024).

https://arxiv.org/abs/2310.03708, equation 8. The preferences of one dimension, 0, are the data; the
others come in as margins:

    r(y)   = beta * (log pi(y | x) - log pi_ref(y | x))           sums over tokens
    rho(y) = (r(y) - sum_{j > 0} w_j R_j(y)) / w_0
    L      = -log sigmoid(rho(winner_0) - rho(loser_0))           or max(0, 1 - difference)

If the policy's reward r is to be the weighted sum of all dimensions' rewards, rho is what is left
for dimension 0, and its preferences fit that. So a response that the other dimensions rate higher
must not earn its whole reward from dimension 0, and one run gives the policy of one weight vector.

The R are data and carry no gradient. In the paper they are rewards of a model per dimension; here
they are ratings in points of their scale times `margin_scale`. R is in units of a Bradley-Terry
reward, and one point is one unit, as in lambda-DPO (arXiv 2506.19780). A margin that asks for less
than DPO is no error: the other dimensions prefer the loser. A pair in which the dimension ties, or
in which a response lacks a rating of a dimension that has a weight, adds nothing. With all weight
on one dimension this is DPO.

beta: 0.1 in its code, weights 0.1 to 0.9, learning rate 1e-4 with LoRA. 1 / w_0 makes small weights
of the trained dimension unstable: below 0.05 they are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_amopo.objectives.base import (
    Draw,
    Outcome,
    Paper,
    Responses,
    hyperparameter,
    log_ratios,
)
from axolotl_amopo.objectives.dpo import PER_DIMENSION

PAPER = Paper(
    "MODPO",
    "https://arxiv.org/abs/2310.03708",
    """\
@inproceedings{zhou-etal-2024-modpo,
  title = {Beyond One-Preference-Fits-All Alignment: Multi-Objective Direct Preference
           Optimization},
  author = {Zhou, Zhanhui and Liu, Jie and Shao, Jing and Yue, Xiangyu and Yang, Chao and
            Ouyang, Wanli and Qiao, Yu},
  booktitle = {Findings of the Association for Computational Linguistics: ACL 2024},
  year = {2024},
  url = {https://arxiv.org/abs/2310.03708}
}""",
)


@dataclass(frozen=True)
class MODPO:
    """MODPO, see the head of this file."""

    paper: ClassVar[Paper] = PAPER
    defaults: ClassVar[Mapping[str, Any]] = PER_DIMENSION

    beta: float = hyperparameter(0.1, "Reward scale", above=0)
    train_on: int = hyperparameter(
        0, "The dimension whose preferences are trained on", at_least=0, least_weight=0.05
    )
    margin_scale: float = hyperparameter(
        1.0, "Reward of one rating point of the other dimensions", at_least=0
    )
    pair_loss: Literal["sigmoid", "hinge"] = hyperparameter(
        "sigmoid", "The loss of a pair: sigmoid or hinge"
    )

    @property
    def needs(self) -> frozenset[str]:
        """Return reference, weights, and ratings in points."""
        return frozenset({"reference", "weights", "ratings", "points"})

    def __call__(self, responses: Responses, draw: Draw | None) -> Outcome:
        """Return the pair losses of one criterion; nothing is drawn."""
        rewards = self.beta * log_ratios(responses, per_token=False)  # [B, K, N]
        remainders, known = self.remainders(responses, rewards)
        chosen, rejected = self._read(responses, remainders).unbind(-1)  # [P]
        margins = chosen - rejected
        hinge = self.pair_loss == "hinge"
        losses = (1 - margins).clamp(min=0) if hinge else -F.logsigmoid(margins)  # [P]
        trained = torch.arange(responses.signs.shape[1], device=losses.device) == self.train_on
        both = self._read(responses, known).all(-1, keepdim=True)  # [P, 1]
        shares = (trained & (responses.signs != 0) & both).to(losses.dtype)  # [P, C]
        return Outcome(losses.unsqueeze(-1) * trained, shares, rewards, terms={})

    def remainders(self, responses: Responses, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Return rho, which is what is left of the rewards for the trained dimension.

        Args:
            responses: with weights, ratings and points.
            rewards: [B, K, N].

        Returns:
            [B, K, N], and as many bool: whether every rating was there.
        """
        weights = responses.required("weights").detach().to(rewards)  # [B, C]
        own = weights[:, self.train_on, None, None]
        points = responses.required("ratings") * responses.required("points").unsqueeze(1)
        margins = self.margin_scale * weights.unsqueeze(1) * points.detach().to(rewards)
        counted = weights != 0
        counted[:, self.train_on] = False
        margins = margins.masked_fill(~counted.unsqueeze(1), 0.0).sum(-1).unsqueeze(1)  # [B, 1, N]
        known = ~margins.isnan()
        return (rewards - margins.nan_to_num()) / own, known.expand_as(rewards)

    def _read(self, responses: Responses, values: Tensor) -> Tensor:
        return responses.winner_first(values)[:, self.train_on]  # [P, 2]
