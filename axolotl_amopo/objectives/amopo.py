"""AMoPO: Adaptive Multi-objective Preference Optimization (Liu et al., Findings of ACL 2025).

https://arxiv.org/abs/2506.07165. A pair of responses is seen under K prompts, one per preference
dimension and one that names them all. Under each,

    r_k(y) = beta / |y| * sum_t log pi(y_t | x_k, y_<t)         implicit reward, no reference
    L_k    = -log sigmoid(r_k(chosen) - r_k(rejected) - gamma)  pair loss, SimPO's
    w      = softmax_k(z_k(chosen) + z_k(rejected)),  z_k(y) ~ N(m, s)
    loss   = mean over pairs of sum_k w_k L_k

where m and s are mean and standard deviation of the probabilities of y's tokens under x_k. So a
dimension counts more in a pair where the policy is surer of its tokens, and the draws keep the
softmax from settling. The weights carry no gradient; evaluation takes m instead of draws. With one
prompt and no instruction this is exactly SimPO.

beta: 0.1 to 2.5 in published runs, 0.8 in the paper. gamma: an absolute margin, not a ratio to
beta; 0 to 3 in published runs, 2.0 in the paper.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_amopo.objectives import weights
from axolotl_amopo.objectives.base import (
    Draw,
    Outcome,
    Paper,
    Responses,
    ResponseStats,
    hyperparameter,
    response_stats,
)

Weighting = Literal["gaussian", "mean", "uniform", "static"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


PAPER = Paper(
    "AMoPO",
    "https://arxiv.org/abs/2506.07165",
    """\
@inproceedings{liu-etal-2025-amopo,
  title = {{AM}o{PO}: Adaptive Multi-objective Preference Optimization without Reward Models and
           Reference Models},
  author = {Liu, Qi and Ruan, Jingqing and Li, Hao and Zhao, Haodong and Wang, Desheng and
            Chen, Jiansong and Guanglu, Wan and Cai, Xunliang and Zheng, Zhi and Xu, Tong},
  booktitle = {Findings of the Association for Computational Linguistics: ACL 2025},
  year = {2025},
  url = {https://arxiv.org/abs/2506.07165}
}""",
)


@dataclass(frozen=True)
class AMoPO:
    """AMoPO, see the head of this file."""

    paper: ClassVar[Paper] = PAPER
    defaults: ClassVar[Mapping[str, Any]] = {}

    beta: float = hyperparameter(0.8, "Reward scale", above=0)
    gamma: float = hyperparameter(
        2.0,
        "Target margin between the rewards; absolute, not a ratio to rl_beta",
        at_least=0,
        at_most=100,
    )
    weighting: Weighting = hyperparameter(
        "gaussian",
        "How criteria are weighted: gaussian (draws), mean (no draws), uniform, static",
    )

    @property
    def needs(self) -> frozenset[str]:
        """Return {"weights"} for static weights, which are the user's."""
        return frozenset({"weights"} if self.weighting == "static" else ())

    @property
    def target_margin(self) -> float:
        """Return the margin between rewards at which the loss aims."""
        return self.gamma

    def __call__(self, responses: Responses, draw: Draw | None) -> Outcome:
        """Return the pair losses; without `draw`, the weights come from the means."""
        noise, weighting = None, self.weighting
        if weighting == "gaussian":
            if draw is None:
                weighting = "mean"
            else:
                counts, criteria = responses.comparisons_per_example(), responses.reads.shape[1]
                noise = draw.normal(responses.required("ids"), counts, criteria, 2)
        static = None
        if weighting == "static":
            static = responses.per_comparison(responses.required("weights"))
        result = amopo_loss(
            responses.winner_first(responses.logps),  # [P, C, 2, T]
            responses.winner_first(responses.mask),
            beta=self.beta,
            gamma=self.gamma,
            weighting=weighting,
            static_weights=static,
            noise=noise,
            dimension_mask=responses.signs != 0,
        )
        rewards = self.beta * response_stats(responses.logps.detach(), responses.mask).avg_logp
        margins = result.rewards_chosen - result.rewards_rejected - self.gamma
        return Outcome(result.pair_losses, result.weights, rewards, terms={}, margins=margins)


class AMoPOLoss(NamedTuple):
    """Result of `amopo_loss`."""

    loss: Tensor  # scalar: mean over examples of the weighted pair losses
    pair_losses: Tensor  # [B, K] -log sigmoid(margin - gamma)
    weights: Tensor  # [B, K] sums to 1 over the dimensions that count; no gradient
    rewards_chosen: Tensor  # [B, K] beta * avg_logp of the chosen response
    rewards_rejected: Tensor  # [B, K] beta * avg_logp of the rejected response
    stats: ResponseStats  # each [B, K, 2]


def amopo_loss(
    token_logps: Tensor,
    mask: Tensor,
    *,
    beta: float,
    gamma: float,
    weighting: Weighting = "gaussian",
    static_weights: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    dimension_mask: Tensor | None = None,
) -> AMoPOLoss:
    """Return the AMoPO loss of a batch of pairs, each seen under K prompts.

    Args:
        token_logps: [B, K, 2, T] log-probabilities of the response tokens in nats, chosen first.
        mask: [B, K, 2, T] true where a response token stands.
        beta: reward scale.
        gamma: target margin between the two rewards.
        weighting, static_weights, noise, generator, dimension_mask: see `dimension_weights`.

    Raises:
        ValueError: for tensors of another shape, or weighting options that don't fit together.
    """
    if token_logps.ndim != 4 or token_logps.shape[2] != 2 or token_logps.shape != mask.shape:
        raise ValueError(
            "token_logps and mask must both be [B, K, 2, T] (examples, prompts, chosen/rejected, "
            f"tokens), got {list(token_logps.shape)} and {list(mask.shape)}"
        )
    for name, value in (("noise", noise), ("dimension_mask", dimension_mask)):
        expected = token_logps.shape[: 3 if name == "noise" else 2]
        if value is not None and value.shape != expected:
            raise ValueError(f"{name} must be {list(expected)}, got {list(value.shape)}")

    stats = response_stats(token_logps, mask)  # each [B, K, 2]
    rewards_chosen, rewards_rejected = (beta * stats.avg_logp).unbind(-1)  # [B, K]
    pair_losses = -F.logsigmoid(rewards_chosen - rewards_rejected - gamma)  # [B, K]
    shares = dimension_weights(
        stats,
        weighting=weighting,
        static_weights=static_weights,
        noise=noise,
        generator=generator,
        dimension_mask=dimension_mask,
    )
    loss = (shares * pair_losses).sum(-1).mean()
    return AMoPOLoss(loss, pair_losses, shares, rewards_chosen, rewards_rejected, stats)


def dimension_weights(
    stats: ResponseStats,
    *,
    weighting: Weighting = "gaussian",
    static_weights: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    dimension_mask: Tensor | None = None,
) -> Tensor:
    """Return how much each prompt's pair loss counts, example by example (paper, section 3.3).

    Args:
        stats: fields are [B, K, 2].
        weighting: `gaussian` draws the scores; `mean` takes m itself (deterministic); `uniform`
            gives all prompts the same; `static` takes `static_weights`.
        static_weights: [K] or [B, K], non-negative; scaled to sum to 1 over the prompts that count.
        noise: [B, K, 2] standard normal draws to use instead of fresh ones.
        generator: where fresh draws come from.
        dimension_mask: [B, K], false where a prompt weighs nothing for an example.

    Returns:
        [B, K]; a row sums to 1, or to 0 where the mask leaves nothing. No gradient.

    Raises:
        ValueError: for another weighting, or `static_weights` without it.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting {weighting!r} is not one of {', '.join(WEIGHTINGS)}")
    if (weighting == "static") != (static_weights is not None):
        raise ValueError("static_weights go with weighting='static', and only with it")

    prob_mean = stats.prob_mean
    keep = torch.ones_like(prob_mean[..., 0], dtype=torch.bool)
    if dimension_mask is not None:
        keep = dimension_mask.bool()
    if weighting == "uniform":
        return weights.uniform(keep, prob_mean.dtype)
    if static_weights is not None:
        return weights.static(static_weights.to(prob_mean), keep)
    if weighting == "mean":
        return weights.mean(stats, keep)
    if noise is None:
        device = generator.device if generator is not None else prob_mean.device
        noise = torch.randn(prob_mean.shape, generator=generator, device=device)
    return weights.gaussian(stats, keep, noise)
