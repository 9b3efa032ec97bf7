"""The AMoPO method as pure functions on tensors.

AMoPO: Adaptive Multi-objective Preference Optimization (Liu et al., Findings of ACL 2025,
arXiv 2506.07165). A preference pair is seen under K prompts, one per preference dimension.
Under each, the policy's own length-normalised log-probability is the reward (as in SimPO, so
there is no reference model), each prompt gives a pair loss, and the pair losses are mixed by
weights that come from how probable the responses' tokens are under that prompt.

Axis names: B examples (pairs), K prompts, 2 = (chosen, rejected), T response tokens.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Weighting = Literal["gaussian", "mean", "uniform", "static"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)

# A log-probability this low is the result of an overflow upstream. Held here, it costs a large
# but finite loss; as -inf it would turn the margin of two such responses into NaN.
MIN_LOGP = -1e6


class ResponseStats(NamedTuple):
    """What one response looks like to the policy, each [..., ] without the token axis."""

    avg_logp: Tensor  # mean log-probability per token, in nats; carries the gradient
    prob_mean: Tensor  # mean of the tokens' probabilities, 0 to 1; no gradient
    prob_std: Tensor  # their standard deviation (n - 1), 0 below two tokens; no gradient
    tokens: Tensor  # how many there are


class AMoPOLoss(NamedTuple):
    """Result of `amopo_loss`."""

    loss: Tensor  # scalar: (weighted) mean over examples of the weighted pair losses
    pair_losses: Tensor  # [B, K] -log sigmoid(margin - gamma)
    weights: Tensor  # [B, K] sums to 1 over the dimensions that count; no gradient
    rewards_chosen: Tensor  # [B, K] beta * avg_logp of the chosen response
    rewards_rejected: Tensor  # [B, K] beta * avg_logp of the rejected response
    stats: ResponseStats  # each [B, K, 2]


def response_stats(token_logps: Tensor, mask: Tensor) -> ResponseStats:
    """Average log-probability, and the Gaussian fitted to the token probabilities.

    Args:
        token_logps: [..., T] log pi(y_t | x, y_<t) in nats. Entries outside `mask` are ignored,
            whatever they hold.
        mask: [..., T] true (or non-zero) where a response token stands.
    """
    mask = mask.bool()
    if token_logps.dtype in (torch.float16, torch.bfloat16):
        token_logps = token_logps.float()
    logps = token_logps.masked_fill(~mask, 0.0).clamp(min=MIN_LOGP)
    count = mask.sum(-1)
    avg_logp = logps.sum(-1) / count.clamp(min=1)

    with torch.no_grad():
        probs = logps.exp().masked_fill(~mask, 0.0)
        prob_mean = probs.sum(-1) / count.clamp(min=1)
        deviation = (probs - prob_mean.unsqueeze(-1)).masked_fill(~mask, 0.0)
        # One token has no spread; torch.std would give NaN, which the published code raises on.
        prob_std = (deviation.square().sum(-1) / (count - 1).clamp(min=1)).sqrt()
    return ResponseStats(avg_logp, prob_mean, prob_std, count)


def dimension_weights(
    stats: ResponseStats,
    *,
    weighting: Weighting = "gaussian",
    static_weights: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    dimension_mask: Tensor | None = None,
) -> Tensor:
    """How much each prompt's pair loss counts, example by example (paper, section 3.3).

    A response's token probabilities are taken as a Gaussian N(m, s); one score is drawn per
    response, a prompt's score is the sum over its two responses, and the weights are the
    softmax of the scores over the prompts. They carry no gradient.

    Args:
        stats: fields are [B, K, 2].
        weighting: `gaussian` draws the scores; `mean` takes m itself (deterministic); `uniform`
            gives all prompts the same; `static` takes `static_weights`.
        static_weights: [K], non-negative; scaled to sum to 1 over the prompts that count.
        noise: [B, K, 2] standard normal draws to use instead of fresh ones.
        generator: where fresh draws come from.
        dimension_mask: [B, K], false where a prompt weighs nothing for an example.

    Returns:
        [B, K]; a row sums to 1, or to 0 where the mask leaves nothing.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting {weighting!r} is not one of {', '.join(WEIGHTINGS)}")
    if (weighting == "static") != (static_weights is not None):
        raise ValueError("static_weights go with weighting='static', and only with it")

    prob_mean, prob_std = stats.prob_mean.detach(), stats.prob_std.detach()
    keep = torch.ones_like(prob_mean[..., 0], dtype=torch.bool)
    if dimension_mask is not None:
        keep = dimension_mask.bool()

    if weighting in ("uniform", "static"):
        shares = torch.ones_like(prob_mean[..., 0])
        if static_weights is not None:
            shares = static_weights.to(shares).expand_as(shares)
        shares = shares * keep
        return shares / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)

    scores = prob_mean
    if weighting == "gaussian":
        if noise is None:
            device = generator.device if generator is not None else prob_mean.device
            noise = torch.randn(prob_mean.shape, generator=generator, device=device)
        scores = prob_mean + prob_std * noise.to(prob_mean)
    # A finite floor instead of -inf keeps the softmax defined where every prompt is masked.
    scores_BK = scores.sum(-1).masked_fill(~keep, torch.finfo(scores.dtype).min)
    return scores_BK.softmax(-1) * keep


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
    pair_weights: Tensor | None = None,
) -> AMoPOLoss:
    """The AMoPO loss of a batch of pairs, each seen under K prompts.

    For prompt k: reward r_k(y) = beta * mean_t log pi(y_t | x_k, y_<t), pair loss
    L_k = -log sigmoid(r_k(chosen) - r_k(rejected) - gamma), and loss = mean_B sum_K weight * L.
    With one prompt the weight is 1 and this is exactly SimPO, whose gamma / beta ratio is
    written here as an absolute margin gamma.

    Args:
        token_logps: [B, K, 2, T] log-probabilities of the response tokens, chosen first.
        mask: [B, K, 2, T] true where a response token stands.
        beta: reward scale; 0.1 to 2.5 in published runs, 0.8 in the paper.
        gamma: target margin between the two rewards; 0 to 3 in published runs, 2.0 in the paper.
        weighting, static_weights, noise, generator, dimension_mask: see `dimension_weights`.
        pair_weights: [B] how much each example counts in the loss, instead of 1 / B.

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
    weights = dimension_weights(
        stats,
        weighting=weighting,
        static_weights=static_weights,
        noise=noise,
        generator=generator,
        dimension_mask=dimension_mask,
    )
    losses = (weights * pair_losses).sum(-1)  # [B]
    loss = losses.mean() if pair_weights is None else losses @ pair_weights.to(losses)
    return AMoPOLoss(loss, pair_losses, weights, rewards_chosen, rewards_rejected, stats)
