"""What is logged: one number per example and metric, then means over examples.

Names are stable. For every criterion (`overall` and each dimension) `amopo/<criterion>/<metric>`,
and over the criteria of an example `rewards/...` and `logps/...`, named as in TRL. Rewards are the
objective's implicit ones, so margins and accuracies mean the same for every objective.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from axolotl_amopo.objectives.base import Outcome, Responses, example_losses, response_stats

PER_CRITERION = (
    "loss",  # of the criterion's pair or list
    "margin",  # reward chosen - reward rejected
    "accuracy",  # share of pairs with the chosen response's reward above the rejected one's
    "weight",  # share of the pair's loss
    "prob",  # mean probability of the two responses' tokens
    "reward_chosen",
    "reward_rejected",
)
# Logged with its standard deviation over the examples too, as `weight_std`.
SPREAD = "weight"


def example_metrics(
    outcome: Outcome, responses: Responses, criteria: list[str]
) -> dict[str, Tensor]:
    """Return every metric of every example, the example's loss first.

    Args:
        outcome: of an objective.
        responses: that the objective was given.
        criteria: names of the criteria. Where there are M times as many, of M sets of weights, what
            is logged is the mean over the sets, and the sum of their weights.

    Returns:
        By name [B] float32. Losses and weights of criteria are not there where the losses are those
        of single responses. NaN where no criterion says anything, or where the model's outputs are
        NaN. Of an example with several comparisons, the mean over them.
    """
    stats = response_stats(responses.logps.detach(), responses.mask)  # [B, K, N]
    first = responses.winner_first
    chosen, rejected = first(outcome.rewards.detach()).unbind(-1)  # [P, C]
    logps, tokens = first(stats.avg_logp), first(stats.tokens)  # [P, C, 2]
    margins = chosen - rejected
    longer = (tokens[..., 0] - tokens[..., 1]).sign()  # [P, C] 0 where they are equally long
    accuracies = _share(margins > 0, margins.isnan())
    said = (responses.signs != 0) & (responses.per_comparison(responses.counts) > 0).unsqueeze(-1)

    def known(values: Tensor) -> Tensor:
        return values.detach().masked_fill(~said, torch.nan)

    def by_name(values: Tensor) -> Tensor:
        return known(values).unflatten(-1, (-1, len(criteria))).nanmean(-2)

    values = (
        outcome.losses,
        margins,
        accuracies,
        outcome.weights * (outcome.weights.shape[-1] // len(criteria)),
        first(stats.prob_mean).mean(-1),
        chosen,
        rejected,
    )
    by_criterion = dict(zip(PER_CRITERION, values, strict=True))
    if outcome.per != "comparison":
        del by_criterion["loss"], by_criterion["weight"]
    totals = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": accuracies,
        # Share of pairs whose longer response has the higher reward.
        "rewards/longer_wins": _share(margins * longer > 0, (longer == 0) | margins.isnan()),
        "logps/chosen": logps[..., 0],  # mean log-probability per token
        "logps/rejected": logps[..., 1],
    }
    per_comparison = {
        f"amopo/{name}/{metric}": by_name(values)[:, c]
        for c, name in enumerate(criteria)
        for metric, values in by_criterion.items()
    } | {name: known(values).nanmean(-1) for name, values in totals.items()}
    columns = torch.stack(list(per_comparison.values()), dim=-1).float()  # [P, M]
    means = _means_over_comparisons(columns, responses).unbind(-1)
    per_example = {f"terms/{name}": term for name, term in outcome.terms.items()}
    if outcome.per == "example":
        silent = (outcome.weights == 0) | (responses.counts == 0).unsqueeze(-1)  # [B, C]
        for metric, values in (("loss", outcome.losses), ("weight", outcome.weights)):
            columns = values.detach().masked_fill(silent, torch.nan).unbind(-1)
            per_example |= {
                f"amopo/{name}/{metric}": column
                for name, column in zip(criteria, columns, strict=True)
            }
    return (
        {"loss": example_losses(outcome, responses).detach().float()}
        | dict(zip(per_comparison, means, strict=True))
        | {name: values.detach().float() for name, values in per_example.items()}
    )


def _share(happened: Tensor, unknown: Tensor) -> Tensor:
    return happened.float().masked_fill(unknown, torch.nan)


def _means_over_comparisons(values: Tensor, responses: Responses) -> Tensor:
    """Return [B, M] means of each example's values [P, M] that are not NaN."""
    examples, found = responses.comparisons[:, 0], ~values.isnan()
    empty = values.new_zeros(len(responses.logps), values.shape[1])
    sums = empty.index_add(0, examples, values.nan_to_num())
    return sums / empty.index_add(0, examples, found.to(values))


class Means:
    """Sums of metrics on the device, reduced over ranks only when they are read."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.sums: Tensor | None = None  # [3, M] of values, of squares, and how many

    def add(self, values: dict[str, Tensor]) -> None:
        """Add [B] values of each metric, the same metrics each time; NaN don't count."""
        self.names = tuple(values)
        columns = torch.stack(list(values.values()), dim=-1)  # [B, M]
        found = columns.isfinite()
        # In 32 bits the spread of equal weights would be 1e-4, for their squares cancel.
        wide = torch.float32 if columns.device.type == "mps" else torch.float64
        columns = columns.masked_fill(~found, 0.0).to(wide)
        sums = torch.stack([columns.sum(0), columns.square().sum(0), found.sum(0).to(columns)])
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self, reduce_sum: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """Return the means so far over all ranks, of metrics that had a value; start anew.

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
