"""Settings that go with objectives of pairs: margins from ratings, an anchor, a contrast.

They belong to no single paper, so no objective's file knows them. Each takes an outcome and returns
the changed one. `settings.py` says with which objectives they go.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from axolotl_amopo.objectives.base import (
    Outcome,
    Responses,
    example_means,
    hyperparameter,
    response_stats,
    response_sums,
)

#: The smallest rating gap, in points, that the logarithm of an offset is taken of.
LEAST_POINTS = 0.1


@dataclass(frozen=True)
class Offset:
    """A margin that follows the rating gap: -log sigmoid(margin - offset).

        log     offset = alpha * log(gap in rating points)     ODPO
        linear  offset = alpha * gap, on 0 to 1                ours

    ODPO (Amini et al., Findings of ACL 2024, https://arxiv.org/abs/2402.10571, equation 8) asks for
    a larger margin where the winner is much better, alpha 1 in its code. Its logarithm is below 0
    for gaps of less than one point, where it asks for less than the plain loss, and has no value at
    0: gaps of less than 0.1 point count as 0.1. The linear one is 0 where the ratings are equal,
    and lets the loser lead where the criterion's own rating is against the winner. A criterion
    without both ratings keeps its margin.
    """

    offset: float = hyperparameter(
        0.0, "Margin that a rating gap asks for, see offset_form; 0: none", at_least=0
    )
    offset_form: Literal["linear", "log"] = hyperparameter(
        "linear", "linear: times the gap, 0 to 1; log: times the log of the gap in points (ODPO)"
    )

    def __post_init__(self) -> None:
        if not self.offset and self.offset_form != Offset.offset_form:
            raise ValueError("offset_form: has no effect with offset: 0; set offset, or remove it")

    @property
    def needs(self) -> frozenset[str]:
        """Return the ratings, and in the log form their points."""
        if not self.offset:
            return frozenset()
        return frozenset({"ratings", "points"} if self.offset_form == "log" else {"ratings"})

    def __call__(self, outcome: Outcome, responses: Responses) -> Outcome:
        """Return the outcome with the losses of smaller margins.

        Raises:
            ValueError: for an objective whose losses are not -log sigmoid(margin).
        """
        if not self.offset:
            return outcome
        if outcome.margins is None:
            raise ValueError("an offset needs losses that are -log sigmoid of a margin")
        gaps = responses.rating_gaps()  # [P, C]
        if self.offset_form == "log":
            points = responses.per_comparison(responses.required("points").detach())
            gaps = (gaps * points).clamp(min=LEAST_POINTS).log()
        margins = outcome.margins - self.offset * gaps.nan_to_num().to(outcome.margins)
        return outcome._replace(losses=-F.logsigmoid(margins), margins=margins)


@dataclass(frozen=True)
class Anchor:
    """A term that keeps the chosen responses likely; against falling rewards, loops and collapse.

        mean       -log pi(winner | x) / |winner|     per example a mean over tokens
        sum        -log pi(winner | x)                as in CPO (arXiv 2401.08417)
        reference  -log sigmoid(r(winner))            mDPO, https://arxiv.org/abs/2406.11839, eq. 6

    A pair loss only asks for a difference, which falls out as well where both responses become
    unlikely and the loser more so. `mean` and `sum` push the winner's likelihood up without end;
    iterative RPO (arXiv 2404.19733) found `mean` with weight 1 necessary. `reference` fades once
    the winner is likelier than under the reference model.

    Each criterion's winner under its own prompt, weighted like its pair loss; a criterion that says
    nothing adds nothing. With `winner: per_dimension` both responses can be somebody's winner, and
    then both are raised. `mean` does not depend on how examples are batched, unlike TRL's and
    ms-swift's mean over the tokens of a micro batch.
    """

    anchor: float = hyperparameter(
        0.0, "Weight of the term that keeps winners likely; 0: none", at_least=0
    )
    anchor_form: Literal["mean", "sum", "reference"] = hyperparameter(
        "mean", "mean: per token; sum: over tokens; reference: against the reference model (mDPO)"
    )

    def __post_init__(self) -> None:
        if not self.anchor and self.anchor_form != Anchor.anchor_form:
            raise ValueError("anchor_form: has no effect with anchor: 0; set anchor, or remove it")

    @property
    def needs(self) -> frozenset[str]:
        """Return the reference where the term is against it."""
        against = self.anchor and self.anchor_form == "reference"
        return frozenset({"reference"} if against else ())

    def __call__(self, outcome: Outcome, responses: Responses) -> Outcome:
        """Return the outcome with the term `anchor`."""
        if not self.anchor:
            return outcome
        won = self._losses(outcome, responses)  # [B, K, N] of a response that wins
        losses = responses.winner_first(won)[..., 0]  # [P, C]
        means = example_means((outcome.weights * losses).sum(-1), responses)
        return outcome._replace(terms=outcome.terms | {"anchor": self.anchor * means})

    def _losses(self, outcome: Outcome, responses: Responses) -> Tensor:
        if self.anchor_form == "reference":
            return -F.logsigmoid(outcome.rewards)
        if self.anchor_form == "sum":
            return -response_sums(responses.logps, responses.mask)
        return -response_stats(responses.logps, responses.mask).avg_logp


@dataclass(frozen=True)
class Contrast:
    """A term that makes the prompt matter: one response under two prompts.

        -log sigmoid(beta * (log pi(y | x+) - sg[log pi(y | x-)]))

    x+ is the prompt that asks for ratings nearest to y's own, x- the one that asks for the
    farthest. A pair loss compares responses under one prompt, and nothing in it rewards different
    answers to different prompts. The form is that of MI-EPO (arXiv 2607.01392), whose text was not
    at hand; offline it is ours. No gradient goes through x-, or the term could be won by making
    every response unlikely there. Sums over tokens, hence the small beta.

    The mean over the responses that run under two prompts which fit them differently; 0 where none
    does.
    """

    contrast: float = hyperparameter(
        0.0, "Weight of the term that tells prompts apart; 0: none", at_least=0
    )
    contrast_beta: float = hyperparameter(0.01, "Scale of the term's log-probabilities", above=0)

    def __post_init__(self) -> None:
        if not self.contrast and self.contrast_beta != Contrast.contrast_beta:
            raise ValueError(
                "contrast_beta: has no effect with contrast: 0; set contrast, or remove it"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Return how well prompts fit responses."""
        return frozenset({"fit"} if self.contrast else ())

    def __call__(self, outcome: Outcome, responses: Responses) -> Outcome:
        """Return the outcome with the term `contrast`."""
        if not self.contrast:
            return outcome
        fit = responses.required("fit").detach()  # [B, K, N]
        unknown = fit.isnan() | ~responses.mask.any(-1)
        best, near = fit.masked_fill(unknown, -math.inf).max(1, keepdim=True)  # [B, 1, N]
        least, far = fit.masked_fill(unknown, math.inf).min(1, keepdim=True)
        sums = response_sums(responses.logps, responses.mask)
        ahead = sums.gather(1, near) - sums.gather(1, far).detach()
        differ = (best > least).to(sums)
        losses = -F.logsigmoid(self.contrast_beta * ahead) * differ
        means = losses.sum((1, 2)) / differ.sum((1, 2)).clamp(min=1)
        return outcome._replace(terms=outcome.terms | {"contrast": self.contrast * means})
