"""MRPO: Multi-Reference Preference Optimization (Le et al., AAAI 2025).

https://arxiv.org/abs/2405.16388. DPO with two reference models that are merged into one, on
log-probabilities of whole responses, b of the policy's own start and o of another model:

    1 / p(y) = a / p_b(y) + (1 - a) / p_o(y)
    r(y)     = beta * (log pi(y | x) - log p(y))
    L        = -log sigmoid(r(winner) - r(loser))

This is the closed form of a Kullback-Leibler penalty towards both. o is first clipped to stay
within a share e of b, so that a model which finds the responses much less likely does not take
over: e = eta times the winner's or the loser's share of |b| + |o| over the pair, or |eta| where eta
is negative. A negative alpha sets a per pair, the share of o's |winner - loser| in that of both.

As published, and doubtful: the adaptive a grows with o's gap, but weighs 1 / p_b; and it reads the
pair's own label. A later study (arXiv 2512.10040) found six of seven single references better than
every combination. With equal references, or with one, this is DPO.

beta 0.1, eta 0.1, adaptive alpha in the authors' code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_amopo.objectives import weights
from axolotl_amopo.objectives.base import (
    Draw,
    Outcome,
    Paper,
    Responses,
    hyperparameter,
    log_ratios,
    reference_sums,
    response_sums,
)

PAPER = Paper(
    "MRPO",
    "https://arxiv.org/abs/2405.16388",
    """\
@inproceedings{le-etal-2025-mrpo,
  title = {Multi-Reference Preference Optimization for Large Language Models},
  author = {Le, Hung and Tran, Quan Hung and Nguyen, Dung and Do, Kien and Mittal, Saloni and
            Ogueji, Kelechi and Venkatesh, Svetha},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year = {2025},
  url = {https://arxiv.org/abs/2405.16388}
}""",
)


@dataclass(frozen=True)
class MRPO:
    """MRPO, see the head of this file."""

    paper: ClassVar[Paper] = PAPER
    defaults: ClassVar[Mapping[str, Any]] = {"instruction": "", "overall_instruction": ""}

    beta: float = hyperparameter(0.1, "Reward scale", above=0)
    alpha: float = hyperparameter(
        -1.0, "Weight of the first reference's 1 / p; below 0: set per pair", at_most=1
    )
    eta: float = hyperparameter(
        0.1,
        "How far the second reference may be from the first, as a share; below 0: |eta| for both "
        "responses",
        at_least=-1,
        at_most=1,
    )

    @property
    def needs(self) -> frozenset[str]:
        """Return the log-probabilities of two reference models."""
        return frozenset({"reference", "references"})

    def __call__(self, responses: Responses, draw: Draw | None) -> Outcome:
        """Return the pair losses; nothing is drawn.

        Raises:
            ValueError: for more than two references.
        """
        sums = response_sums(responses.logps, responses.mask)
        count = len(responses.required("reference"))
        if count > 2:
            raise ValueError(f"MRPO merges two references, got {count}")
        by_model = [
            responses.winner_first(reference_sums(responses, sums, number))
            for number in range(count)
        ]
        merged = self.merge(*by_model) if count == 2 else by_model[0]  # [P, C, 2]
        margins = (self.beta * (responses.winner_first(sums) - merged)).diff(dim=-1).neg()
        margins = margins.squeeze(-1)  # [P, C]
        shares = weights.uniform(responses.signs != 0, margins.dtype)
        rewards = self.beta * log_ratios(responses, per_token=False)
        return Outcome(-F.logsigmoid(margins), shares, rewards, terms={}, margins=margins)

    def merge(self, base: Tensor, other: Tensor) -> Tensor:
        """Return the log-probabilities of the merged reference.

        Args:
            base, other: [..., 2] log-probabilities of the winner and the loser, in nats.
        """
        gaps = [(values[..., :1] - values[..., 1:]).abs() for values in (other, base)]
        adaptive = gaps[0] / (gaps[0] + gaps[1] + 1e-6)
        alpha = adaptive if self.alpha < 0 else torch.full_like(adaptive, self.alpha)
        sizes = base.abs() + other.abs()
        total = sizes.sum(-1, keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny)
        room = self.eta * sizes / total if self.eta >= 0 else torch.full_like(sizes, -self.eta)
        other = other.clamp(min=base * (1 + room), max=base * (1 - room))
        return base + other - torch.logaddexp(alpha.log() + other, (1 - alpha).log() + base)
