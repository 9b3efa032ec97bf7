"""What is logged: one number an example and metric, then means over examples.

Names are stable. For every prompt (`overall` and each dimension) `amopo/<prompt>/<metric>`, and
over the prompts of an example `rewards/...` and `logps/...`, named as in TRL.
"""

import torch
from torch import Tensor

from axolotl_amopo.loss import AMoPOLoss

PER_PROMPT = (
    "loss",  # -log sigmoid(margin - gamma)
    "margin",  # reward chosen - reward rejected
    "accuracy",  # share of pairs with the chosen response's reward above the rejected one's
    "weight",  # share of the pair's loss
    "prob",  # mean probability of the two responses' tokens
    "reward_chosen",
    "reward_rejected",
)
TOTALS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",  # mean log-probability per token
    "logps/rejected",
)


def metric_names(prompt_names: list[str]) -> list[str]:
    """Names of `example_metrics`' columns after the first, which is the example's loss."""
    return [f"amopo/{name}/{metric}" for name in prompt_names for metric in PER_PROMPT] + [*TOTALS]


def example_metrics(result: AMoPOLoss, dimension_mask: Tensor) -> Tensor:
    """Every metric of every example.

    Args:
        result: of a batch of B examples and K prompts.
        dimension_mask: [B, K] bool.

    Returns:
        [B, 1 + M] float32, the example's loss first; NaN where a dimension is masked.
    """
    margins = result.rewards_chosen - result.rewards_rejected  # [B, K]
    accuracies = (margins > 0).float()
    per_prompt = torch.stack(
        [
            result.pair_losses,
            margins,
            accuracies,
            result.weights,
            result.stats.prob_mean.mean(-1),
            result.rewards_chosen,
            result.rewards_rejected,
        ],
        dim=-1,
    )  # [B, K, len(PER_PROMPT)]
    hidden = ~dimension_mask.bool()
    per_prompt = per_prompt.masked_fill(hidden.unsqueeze(-1), torch.nan)
    logps = result.stats.avg_logp  # [B, K, 2]
    totals = torch.stack(
        [
            value.masked_fill(hidden, torch.nan).nanmean(-1)
            for value in (
                result.rewards_chosen,
                result.rewards_rejected,
                margins,
                accuracies,
                logps[..., 0],
                logps[..., 1],
            )
        ],
        dim=-1,
    )  # [B, len(TOTALS)]
    losses = (result.weights * result.pair_losses).sum(-1, keepdim=True)
    return torch.cat([losses, per_prompt.flatten(1), totals], dim=-1).detach().float()


class Means:
    """Sums and counts of metrics on the device, reduced over ranks only when they are read."""

    def __init__(self):
        self.sums: Tensor | None = None  # [2, 1 + M] sums, then counts of values that are not NaN

    def add(self, values: Tensor) -> None:
        """Add [B, 1 + M] values."""
        sums = torch.stack([values.nansum(0), values.isfinite().sum(0).to(values)])
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self, reduce_sum) -> list[float | None]:
        """The means so far over all ranks, None where nothing was counted; starts anew.

        One collective call, whatever this rank has seen, if every rank has called `add`.
        """
        if self.sums is None:
            return []
        sums, counts = reduce_sum(self.sums).tolist()
        self.sums = None
        return [s / c if c else None for s, c in zip(sums, counts, strict=True)]
