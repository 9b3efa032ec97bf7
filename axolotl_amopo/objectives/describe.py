"""Say what an objective's numbers mean, for those who read them: found by calling it.

    >>> describe(DPO()).reference, describe(SimPO(gamma=0.5)).target_margin
    (True, 0.5)

So a new objective is described without a word of its own, and no description can be wrong. What a
call can't tell, the margin that a loss aims at, is an objective's property `target_margin`; one
that has none aims at no margin.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from axolotl_amopo.objectives.base import Objective, Responses, response_sums

# A difference between the ratings of two responses, on 0 to 1: nearly the same rating.
GAP = 0.05


class Description(NamedTuple):
    """Say what an objective's rewards, losses and weights are."""

    reference: bool  # rewards are relative to a reference: 0 where the policy is the reference
    per_token: bool | None  # rewards are means over tokens, or sums; None where they are neither
    per: Literal["comparison", "example", "response"]  # what a loss is of, see `Outcome`
    target_margin: float | None  # between rewards, at which the loss aims; None: more is better
    # How hard the rejected response is pushed down, as a share of how hard the chosen one is pushed
    # up, where their ratings are nearly the same: 1 for losses of the margin alone, below 0 where
    # it is pushed up as well.
    pushes_down: float
    adaptive: bool  # the weights of criteria depend on the policy


def describe(objective: Objective) -> Description:
    """Return what an objective's numbers mean."""
    rewards = objective(_pair([1, 3], torch.full((1, 2, 2, 3), -1.0)), None).rewards[0, 0].tolist()
    per_token = None
    if abs(rewards[0]) > 0:
        per_token = {1.0: True, 3.0: False}.get(round(rewards[1] / rewards[0], 6))
    # The rejected response ahead, or a loss may have nothing left to push.
    alike = torch.tensor([-1.5, -1.0]).view(1, 1, 2, 1).expand(1, 2, 2, 3)
    # One prompt's tokens are sure, the other's are not.
    apart = torch.tensor([-0.1, -3.0]).view(1, 2, 1, 1).expand(1, 2, 2, 3)
    given = _pair([3, 3], alike)
    outcome = objective(given, None)
    (outcome.weights * outcome.losses).sum().backward()
    assert given.logps.grad is not None
    chosen, rejected = given.logps.grad.sum((0, 1, 3)).tolist()
    equally, otherwise = (
        objective(_pair([3, 3], logps), None).weights.detach() for logps in (alike, apart)
    )
    return Description(
        reference="reference" in objective.needs,
        per_token=per_token,
        per=outcome.per,
        target_margin=getattr(objective, "target_margin", None) or None,
        pushes_down=round(-rejected / chosen, 6) if chosen else 1.0,
        adaptive=not torch.allclose(equally, otherwise),
    )


def _pair(lengths: list[int], logps: Tensor) -> Responses:
    """Return a pair under two prompts, rated nearly the same.

    The reference gives each token one nat less than -1.

    Args:
        lengths: tokens of the two responses, at most T.
        logps: [1, 2, 2, T].
    """
    logps = logps.double().clone().requires_grad_()
    mask = (torch.arange(logps.shape[-1]) < torch.tensor(lengths).unsqueeze(-1)).expand(1, 2, 2, -1)
    ratings = torch.tensor([0.5 + GAP, 0.5], dtype=torch.float64).view(1, 2, 1)
    return Responses.of_pairs(
        logps,
        mask,
        ratings=ratings.expand(1, 2, 2),
        points=torch.ones(1, 2, dtype=torch.float64),
        weights=torch.full((1, 2), 0.5, dtype=torch.float64),
        reference=response_sums(torch.full_like(logps, -2.0), mask).detach().expand(2, 1, 2, 2),
        counts=torch.ones(1),
        ids=torch.zeros(1, dtype=torch.long),
    )
