"""How much each criterion counts in a comparison: one function per way.

All return [P, C] weights that carry no gradient and sum to 1 over the criteria that say something
about a comparison; a row where none does is 0.
"""

import torch
from torch import Tensor

from axolotl_amopo.objectives.base import ResponseStats


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


def _softmax(scores: Tensor, keep: Tensor) -> Tensor:
    # A finite floor instead of -inf keeps the softmax defined where every criterion is left out.
    scores_PC = scores.sum(-1).masked_fill(~keep, torch.finfo(scores.dtype).min)
    return scores_PC.softmax(-1) * keep
