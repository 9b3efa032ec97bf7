"""IPO: Identity Preference Optimization (Azar et al., AISTATS 2024), per dimension.

https://arxiv.org/abs/2310.12036, equation 17 (its tau is our beta), for each dimension k with its
own winner:

    h(y) = (log pi(y | x) - log pi_ref(y | x)) / |y|
    L_k  = (h(winner_k) - h(loser_k) - 1 / (2 beta))^2
    loss = mean over pairs of sum_k w_k L_k

DPO's loss falls for ever as the margin grows, so a pair that is never contradicted is overfitted.
A square has a minimum: the margin stops at 1 / (2 beta). The paper writes sums over tokens, but
its results are of means, as its authors told TRL; means are the default here, as in TRL 1.14.
Ties add nothing, and the other dimensions keep their weight.

beta: it sets the margin to reach, so it means something else than in DPO. At 0.1 that is 5 nats:
little for sums, far for means. 0.1 to 1 in published runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from axolotl_amopo.objectives import weights
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
    "IPO",
    "https://arxiv.org/abs/2310.12036",
    """\
@inproceedings{azar-etal-2024-ipo,
  title = {A General Theoretical Paradigm to Understand Learning from Human Preferences},
  author = {Azar, Mohammad Gheshlaghi and Guo, Zhaohan Daniel and Piot, Bilal and Munos, R{\\'e}mi
            and Rowland, Mark and Valko, Michal and Calandriello, Daniele},
  booktitle = {International Conference on Artificial Intelligence and Statistics},
  year = {2024},
  url = {https://arxiv.org/abs/2310.12036}
}""",
)


@dataclass(frozen=True)
class IPO:
    """IPO, see the head of this file."""

    paper: ClassVar[Paper] = PAPER
    defaults: ClassVar[Mapping[str, Any]] = PER_DIMENSION

    beta: float = hyperparameter(0.1, "The margin to reach is 1 / (2 beta)", above=0)
    length_normalised: bool = hyperparameter(
        True, "Divide a response's log-probabilities by its tokens"
    )

    @property
    def needs(self) -> frozenset[str]:
        """Return the reference model's log-probabilities, and the user's weights."""
        return frozenset({"reference", "weights"})

    @property
    def target_margin(self) -> float:
        """Return the margin between rewards at which the loss aims: beta times 1 / (2 beta)."""
        return 0.5

    def __call__(self, responses: Responses, draw: Draw | None) -> Outcome:
        """Return the pair losses; nothing is drawn."""
        ratios = log_ratios(responses, per_token=self.length_normalised)  # [B, K, N]
        chosen, rejected = responses.winner_first(ratios).unbind(-1)  # [P, C]
        losses = (chosen - rejected - 1 / (2 * self.beta)).square()
        shares = weights.as_given(responses, losses.dtype)
        return Outcome(losses, shares, self.beta * ratios, terms={})
