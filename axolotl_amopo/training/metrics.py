"""What is logged: one number an example and metric, then means over examples.

Names are stable. For every prompt (`overall` and each dimension) `amopo/<prompt>/<metric>`, and
over the prompts of an example `rewards/...` and `logps/...`, named as in TRL.
"""

from collections.abc import Callable

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
# Logged with its standard deviation over the examples too, as `weight_std`.
SPREAD = "weight"
TOTALS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/longer_wins",  # share of pairs whose longer response has the higher reward
    "logps/chosen",  # mean log-probability per token
    "logps/rejected",
)


def metric_names(prompt_names: list[str]) -> list[str]:
    """Names of `example_metrics`' columns, the first of which is the example's loss."""
    return (
        ["loss"]
        + [f"amopo/{name}/{metric}" for name in prompt_names for metric in PER_PROMPT]
        + [*TOTALS]
    )


def example_metrics(result: AMoPOLoss, dimension_mask: Tensor) -> Tensor:
    """Every metric of every example.

    Args:
        result: of a batch of B examples and K prompts.
        dimension_mask: [B, K] bool.

    Returns:
        [B, 1 + M] float32, the example's loss first; NaN where a dimension is masked, or where
        the model's outputs are.
    """
    margins = result.rewards_chosen - result.rewards_rejected  # [B, K]
    accuracies = (margins > 0).float().masked_fill(margins.isnan(), torch.nan)
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
    logps, tokens = result.stats.avg_logp, result.stats.tokens  # [B, K, 2]
    longer = (tokens[..., 0] - tokens[..., 1]).sign()  # [B, K] 0 where they are equally long
    unknown = (longer == 0) | margins.isnan()
    longer_wins = (margins * longer > 0).float().masked_fill(unknown, torch.nan)
    totals = torch.stack(
        [
            value.masked_fill(hidden, torch.nan).nanmean(-1)
            for value in (
                result.rewards_chosen,
                result.rewards_rejected,
                margins,
                accuracies,
                longer_wins,
                logps[..., 0],
                logps[..., 1],
            )
        ],
        dim=-1,
    )  # [B, len(TOTALS)]
    losses = (result.weights * result.pair_losses).sum(-1, keepdim=True)
    return torch.cat([losses, per_prompt.flatten(1), totals], dim=-1).detach().float()


def group_means(values: Tensor, groups: Tensor) -> Tensor:
    """[P, 1 + M] values of pairs -> [B, 1 + M] means over each group's that are not NaN."""
    found = ~values.isnan()
    shape = int(groups[-1]) + 1, values.shape[1]
    sums = values.new_zeros(shape).index_add(0, groups, values.nan_to_num())
    return sums / values.new_zeros(shape).index_add(0, groups, found.to(values))


class Means:
    """Sums of metrics on the device, reduced over ranks only when they are read."""

    def __init__(self, names: list[str]):
        self.names = names
        self.sums: Tensor | None = None  # [3, 1 + M] of values, of squares, and how many

    def add(self, values: Tensor) -> None:
        """Add [B, 1 + M] values; NaN don't count."""
        found = values.isfinite()
        # In 32 bits the spread of equal weights would be 1e-4, for their squares cancel.
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        values = values.masked_fill(~found, 0.0).to(wide)
        sums = torch.stack([values.sum(0), values.square().sum(0), found.sum(0).to(values)])
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self, reduce_sum: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """The means so far over all ranks, of metrics that had a value; starts anew.

        One collective call, whatever this rank has seen, if every rank has called `add`.
        """
        if self.sums is None:
            return {}
        made: dict[str, float] = {}
        columns = reduce_sum(self.sums).t().tolist()
        self.sums = None
        for name, (total, squares, count) in zip(self.names, columns, strict=True):
            if count:
                made[name] = total / count
                if name.endswith(f"/{SPREAD}"):
                    made[f"{name}_std"] = max(0.0, squares / count - made[name] ** 2) ** 0.5
        return made
