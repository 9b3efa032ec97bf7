"""How much each criterion counts in a comparison: one function per way.

All return [P, C] weights that carry no gradient. Those of `gaussian`, `mean`, `uniform` and
`static` sum to 1 over the criteria that say something about a comparison; a row where none does is
0. `as_given` keeps the user's weights instead, as published losses per dimension do: a criterion
that says nothing adds nothing, and the others weigh what they weigh elsewhere.

`Scalarization` is a setting: it replaces the weighted sum of a comparison's losses.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from axolotl_amopo.objectives.base import (
    Outcome,
    Responses,
    ResponseStats,
    example_means,
    hyperparameter,
)


def gaussian(stats: ResponseStats, keep: Tensor, noise: Tensor) -> Tensor:
    """Return the softmax of scores drawn from N(prob_mean, prob_std) (AMoPO, section 3.3).

    One score is drawn per response; a criterion's score is the sum over its two responses.

    Args:
        stats: fields are [P, C, 2].
        keep: [P, C] bool, false where a criterion says nothing.
        noise: [P, C, 2] standard normal draws.
    """
    prob_mean, prob_std = stats.prob_mean.detach(), stats.prob_std.detach()
    return _softmax(prob_mean + prob_std * noise.to(prob_mean), keep)


def mean(stats: ResponseStats, keep: Tensor) -> Tensor:
    """Return what `gaussian` returns without its noise; deterministic."""
    return _softmax(stats.prob_mean.detach(), keep)


def uniform(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the same weight for all criteria."""
    return static(torch.ones_like(keep, dtype=dtype), keep)


def static(weights: Tensor, keep: Tensor) -> Tensor:
    """Return the user's weights, scaled to sum to 1 over the criteria that say something.

    Args:
        weights: [C] or [P, C], non-negative.
        keep: [P, C] bool.
    """
    shares = weights.detach().expand_as(keep) * keep
    return shares / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)


def as_given(responses: Responses, dtype: torch.dtype) -> Tensor:
    """Return the user's weights as they are, 0 where a criterion says nothing.

    Args:
        responses: their `weights` should sum to 1; without any, all criteria weigh the same.
        dtype: of the result.
    """
    keep = responses.signs != 0
    if responses.weights is None:
        return keep.to(dtype) / keep.shape[1]
    return responses.per_comparison(responses.weights.detach()).to(dtype) * keep


def worst(losses: Tensor, shares: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """Return the weights of a soft maximum of the losses, and its value.

        value   = W / sharpness * log sum_k shares_k / W * exp(sharpness * loss_k)
        weights = W * softmax_k(log shares_k + sharpness * loss_k),  W = sum_k shares_k

    The weights are the value's gradient with respect to the losses. A sharpness near 0 gives the
    weighted mean, an infinite one the largest loss.

    Args:
        losses: [..., C].
        shares: [..., C], 0 where a criterion says nothing.
        sharpness: above 0, infinite allowed.

    Returns:
        Weights [..., C] and value [...], both without gradient; 0 where all shares are 0.
    """
    losses, keep = losses.detach(), shares > 0
    total = shares.sum(-1, keepdim=True)
    parts = shares / total.clamp(min=_tiny(shares))
    top, exponents = _below_top(losses, keep, sharpness)
    grown = parts * exponents.exp()
    sums = grown.sum(-1, keepdim=True)
    # Accurate near 1, where a small sharpness leads, and where the largest loss has a tiny share.
    near = torch.log1p((parts * exponents.expm1()).sum(-1, keepdim=True).clamp(min=-0.5))
    logs = torch.where(sums > 0.5, near, sums.clamp(min=_tiny(sums)).log())
    value = total * (top + logs / sharpness)
    return total * grown / sums.clamp(min=_tiny(sums)), value.squeeze(-1)


def tchebycheff(losses: Tensor, shares: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """Return the weights of the smooth Tchebycheff scalarization, and its value.

        value   = 1 / sharpness * log sum_k exp(sharpness * shares_k * loss_k)
        weights = shares_k * softmax_k(sharpness * shares_k * loss_k)

    (Lin et al., https://arxiv.org/abs/2402.19078, with 0 for the ideal losses.) An infinite
    sharpness gives the largest of the weighted losses: products, which training makes equal, so a
    larger share leads to a lower loss.

    Args, Returns: as for `worst`.
    """
    losses, keep = losses.detach(), shares > 0
    top, exponents = _below_top(shares * losses, keep, sharpness)
    grown = exponents.exp() * keep
    sums = grown.sum(-1, keepdim=True)
    value = top + sums.clamp(min=1.0).log() / sharpness
    return shares * grown / sums.clamp(min=1.0), value.squeeze(-1)


@dataclass(frozen=True)
class Scalarization:
    """Make one number of the criteria's losses; a use of ours, for offline losses.

    `worst` minimises the worst dimension instead of the mean (RVPO, arXiv 2605.05750, does so with
    online advantages): at a small sharpness mean + sharpness / 2 * variance. `tchebycheff` reaches
    compromises that no weighted sum has as its minimum. A dimension that can't be learned, or is
    labelled at random, keeps much of the weight: watch `amopo/<criterion>/weight`.

    sharpness: losses are about 0.7 at the start, so 1 is mild and 10 is close to the maximum.
    """

    scalarization: Literal["linear", "worst", "tchebycheff"] = hyperparameter(
        "linear", "How the criteria's losses become one: linear (weighted sum), worst, tchebycheff"
    )
    sharpness: float = hyperparameter(
        1.0, "From near 0, the mean, to .inf, the largest loss alone", above=0
    )

    def __post_init__(self) -> None:
        if self.scalarization == "linear" and self.sharpness != Scalarization.sharpness:
            raise ValueError("sharpness: has no effect with scalarization: linear; remove it")

    @property
    def needs(self) -> frozenset[str]:
        """Return nothing."""
        return frozenset()

    def __call__(self, outcome: Outcome, responses: Responses) -> Outcome:
        """Return the outcome with other weights, so that its loss has the scalarization's gradient.

        The term `scalarization` carries no gradient. It makes the loss the scalarization's value.
        """
        if self.scalarization == "linear":
            return outcome
        scalarize = worst if self.scalarization == "worst" else tchebycheff
        changed, values = scalarize(outcome.losses, outcome.weights, self.sharpness)
        rest = values - (changed * outcome.losses.detach()).sum(-1)  # [P]
        terms = outcome.terms | {"scalarization": example_means(rest, responses)}
        return outcome._replace(weights=changed, terms=terms)


def _below_top(values: Tensor, keep: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """Return the largest kept value, [..., 1], and sharpness * (value - largest), at most 0."""
    top = values.masked_fill(~keep, -math.inf).amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    lead = (values - top).masked_fill(~keep, 0.0)
    if sharpness == math.inf:
        return top, torch.zeros_like(lead).masked_fill(lead < 0, -math.inf)
    return top, sharpness * lead


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny


def _softmax(scores: Tensor, keep: Tensor) -> Tensor:
    # A finite floor instead of -inf keeps the softmax defined where every criterion is left out.
    scores_PC = scores.sum(-1).masked_fill(~keep, torch.finfo(scores.dtype).min)
    return scores_PC.softmax(-1) * keep
