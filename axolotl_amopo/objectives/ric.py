"""RiC: Rewards-in-Context (Yang et al., ICML 2024), its offline stage.

https://arxiv.org/abs/2402.10207. Supervised fine-tuning on every rated response, good or bad, under
a prompt that states the response's own ratings:

    loss = -sum over responses and tokens of log pi(y_t | x, ratings of y, y_<t) / tokens

The model learns what responses of given ratings look like, and at inference good ratings are asked
for. Nothing is compared, so nothing is pushed down. The mean is one over the tokens of the whole
optimizer step, as in supervised fine-tuning: an example counts by its tokens (`counts`).

Ratings that never occur together in the data are not learned; `targets` gives ratings to ask for
that do, from preference weights.

beta scales the rewards in the metrics and nothing else. The authors' runs: learning rate 1.4e-4,
LoRA r 64, alpha 128.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from axolotl_amopo.objectives.base import (
    Draw,
    Outcome,
    Paper,
    Responses,
    hyperparameter,
    response_stats,
    response_sums,
)

PAPER = Paper(
    "RiC",
    "https://arxiv.org/abs/2402.10207",
    """\
@inproceedings{yang-etal-2024-ric,
  title = {Rewards-in-Context: Multi-objective Alignment of Foundation Models with Dynamic
           Preference Adjustment},
  author = {Yang, Rui and Pan, Xiaoman and Luo, Feng and Qiu, Shuang and Zhong, Han and Yu, Dong and
            Chen, Jianshu},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  url = {https://arxiv.org/abs/2402.10207}
}""",
)


@dataclass(frozen=True)
class RiC:
    """RiC, see the head of this file."""

    paper: ClassVar[Paper] = PAPER
    defaults: ClassVar[Mapping[str, Any]] = {
        "prompts": "one",
        "rating_in_prompt": "own",
        "group_by_prompt": True,
        "single_responses": "keep",
    }

    beta: float = hyperparameter(
        1.0, "Scale of the rewards in the metrics; training does not depend on it", above=0
    )

    @property
    def needs(self) -> frozenset[str]:
        """Return all responses of a prompt, and the numbers of their tokens."""
        return frozenset({"all_responses", "token_counts"})

    def __call__(self, responses: Responses, draw: Draw | None) -> Outcome:
        """Return the mean losses of the responses, [B, N], under all prompts that they follow."""
        tokens = responses.mask.sum((1, 3))  # [B, N]
        sums = response_sums(responses.logps, responses.mask).sum(1)
        shares = tokens.to(sums) / tokens.sum(-1, keepdim=True).clamp(min=1)
        rewards = self.beta * response_stats(responses.logps, responses.mask).avg_logp
        losses = -sums / tokens.clamp(min=1)
        return Outcome(losses, shares, rewards, terms={}, per="response")


def targets(
    preference: Sequence[float],
    lowest: Sequence[float],
    highest: Sequence[float],
    norm: Literal["l2", "linf", "linear"] = "l2",
) -> list[float]:
    """Return the ratings to ask for, from the weights of the dimensions (RiC, section 3.3).

    Args:
        preference: weights of the dimensions, which sum to 1.
        lowest, highest: ratings of each dimension in the training data.
        norm: `l2` asks for weight / |weights| of the way from the lowest to the highest rating,
            `linf` for all of it from an equal weight on, `linear` for the weight itself.
    """
    count, length = len(preference), math.hypot(*preference)
    ways = {
        "l2": [weight / length for weight in preference],
        "linf": [min(1.0, count * weight) for weight in preference],
        "linear": list(preference),
    }
    return [
        low + way * (high - low) for way, low, high in zip(ways[norm], lowest, highest, strict=True)
    ]
