"""MaPPO: Maximum a Posteriori Preference Optimization (Lan et al., 2025).

https://arxiv.org/abs/2507.21183, version 5. A rating gap d in 0 to 1 scales the rejected response's
term of another method's loss:

    dpo    eq. 8   L = -log sigmoid(beta h(winner) - d beta h(loser))
    simpo  eq. 12  L = -log sigmoid(beta m(winner) - d beta m(loser) - gamma)
    ipo    eq. 14  L = (h(winner) - d h(loser) - 1 / (2 beta))^2

with h(y) = log pi(y | x) - log pi_ref(y | x) and m(y) = log pi(y | x) / |y|. A pair
whose responses are rated nearly alike hardly pushes the rejected one down, which a plain pair loss
does as hard as for any other pair; with d = 1 this is the plain loss. The gap is data and carries
no gradient.

Each dimension has its own winner and gap. Ratings give small gaps, so training drifts to imitation
of the chosen responses: take `pairs: best_worst`, or raise `gap_scale`, which is ours:
d = min(1, gap_scale * gap). Negative gaps, outside the paper, count as 0; they come about with
`winner: overall`. A criterion without both ratings says nothing.

beta 0.1, gamma 1 (simpo), learning rate 5e-7 with full fine-tuning in the paper.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F

from axolotl_amopo.objectives import weights
from axolotl_amopo.objectives.base import (
    Draw,
    Outcome,
    Paper,
    Responses,
    hyperparameter,
    log_ratios,
    response_stats,
)
from axolotl_amopo.objectives.dpo import PER_DIMENSION

PAPER = Paper(
    "MaPPO",
    "https://arxiv.org/abs/2507.21183",
    """\
@misc{lan-etal-2025-mappo,
  title = {{MaPPO}: Maximum a Posteriori Preference Optimization with Prior Knowledge},
  author = {Lan, Guangchen and Zhang, Sipeng and Wang, Tianle and Zhang, Yuwei and Zhang, Daoan and
            Wei, Xinpeng and Pan, Xiaoman and Zhang, Hongming and Han, Dong-Jun and
            Brinton, Christopher G.},
  year = {2025},
  eprint = {2507.21183},
  archiveprefix = {arXiv},
  url = {https://arxiv.org/abs/2507.21183}
}""",
)


@dataclass(frozen=True)
class MaPPO:
    """MaPPO, see the head of this file."""

    paper: ClassVar[Paper] = PAPER
    defaults: ClassVar[Mapping[str, Any]] = PER_DIMENSION

    beta: float = hyperparameter(0.1, "Reward scale", above=0)
    form: Literal["dpo", "simpo", "ipo"] = hyperparameter(
        "dpo", "The loss whose rejected term is scaled: dpo, simpo (without a reference) or ipo"
    )
    length_normalised: bool = hyperparameter(
        False, "In the dpo and ipo forms, divide a response's log-probabilities by its tokens"
    )
    gamma: float = hyperparameter(
        1.0,
        "In the simpo form, target margin between the rewards; absolute",
        at_least=0,
        at_most=100,
    )
    gap_scale: float = hyperparameter(
        1.0, "Factor of the rating gap, which is then cut at 1; not of the paper", above=0
    )

    def __post_init__(self) -> None:
        if self.form == "simpo" and self.length_normalised:
            raise ValueError("length_normalised: form simpo always is; remove it")
        if self.form != "simpo" and self.gamma != MaPPO.gamma:
            raise ValueError(f"gamma: has no effect with form: {self.form}; remove it")

    @property
    def needs(self) -> frozenset[str]:
        """Return ratings and weights, and a reference but for the simpo form."""
        return frozenset(
            {"ratings", "weights"} | ({"reference"} if self.form != "simpo" else set())
        )

    @property
    def target_margin(self) -> float | None:
        """Return the margin between rewards at which the loss aims, where its form has one."""
        return {"simpo": self.gamma, "ipo": 0.5}.get(self.form)

    def __call__(self, responses: Responses, draw: Draw | None) -> Outcome:
        """Return the pair losses; nothing is drawn."""
        if self.form == "simpo":
            values = response_stats(responses.logps, responses.mask).avg_logp  # [B, K, N]
        else:
            values = log_ratios(responses, per_token=self.length_normalised)
        gaps = responses.rating_gaps().to(values)  # [P, C]
        scale = (self.gap_scale * gaps).nan_to_num().clamp(0.0, 1.0)
        chosen, rejected = responses.winner_first(values).unbind(-1)
        margins = chosen - scale * rejected
        if self.form == "ipo":
            losses = (margins - 1 / (2 * self.beta)).square()
        else:
            losses = -F.logsigmoid(self.beta * margins - (self.form == "simpo") * self.gamma)
        shares = weights.as_given(responses, losses.dtype) * ~gaps.isnan()
        return Outcome(losses, shares, self.beta * values, terms={})
