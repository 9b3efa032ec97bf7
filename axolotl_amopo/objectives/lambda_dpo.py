"""lambda-DPO: listwise DPO with mixed preferences (Sun et al., 2025).

https://arxiv.org/abs/2506.19780. The N responses of a prompt are compared at once:

    p_k = softmax_i(rating_k(y_i) / temperature)                   ratings in points
    r_i = beta * (log pi(y_i | x) - log pi_ref(y_i | x)) / |y_i|
    L_k = -sum_i p_ki log softmax(r)_i
    loss = mean over prompts of sum_k lambda_k L_k

A pair says who wins; the list says how the rating's points are spread, and equal ratings ask for
equal rewards. lambda is drawn once per optimizer step from a Dirichlet distribution, in evaluation
it is its mean. The loss is linear in lambda and the model does not see it, so a draw is noise
around equal weights; a model that can be steered needs the weights in its prompt (COS-DPO).

Rewards are per token, as in the authors' code; their README writes sums (`length_normalised`).
Ours otherwise: their code draws from a table of ten vectors in every micro batch, takes a missing
rating for the worst one, and has no reference with LoRA. Here a response without a rating of k
stays out of list k, and a list needs two. A criterion reads the list under the first of the prompts
under which it reads the example's comparisons.

beta: 0.1 in its code. temperature: 1 there; higher makes the targets softer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from axolotl_amopo.objectives.base import (
    Draw,
    Outcome,
    Paper,
    Responses,
    hyperparameter,
    log_ratios,
)
from axolotl_amopo.objectives.dpo import PER_DIMENSION

PAPER = Paper(
    "lambda-DPO",
    "https://arxiv.org/abs/2506.19780",
    """\
@misc{sun-etal-2025-lambda-dpo,
  title = {Multi-Preference Lambda-weighted Listwise {DPO} for Dynamic Preference Alignment},
  author = {Sun, Yuhui and Wang, Xiyao and Li, Zixi and Yuan, Zhenlong and Zhao, Jinman},
  year = {2025},
  eprint = {2506.19780},
  archiveprefix = {arXiv},
  url = {https://arxiv.org/abs/2506.19780}
}""",
)


@dataclass(frozen=True)
class LambdaDPO:
    """lambda-DPO, see the head of this file."""

    paper: ClassVar[Paper] = PAPER
    defaults: ClassVar[Mapping[str, Any]] = {
        key: value for key, value in PER_DIMENSION.items() if key != "weights"
    } | {"group_by_prompt": True}

    beta: float = hyperparameter(0.1, "Reward scale", above=0)
    temperature: float = hyperparameter(
        1.0, "Rating points per unit of the target distribution's logits", above=0
    )
    weighting: Literal["dirichlet", "static"] = hyperparameter(
        "dirichlet", "Weights of the dimensions: dirichlet (drawn per step) or static"
    )
    concentration: float = hyperparameter(
        1.0, "Of the Dirichlet distribution: below 1 it prefers corners", at_least=0.05
    )
    length_normalised: bool = hyperparameter(
        True, "Divide a response's log-probabilities by its tokens"
    )

    def __post_init__(self) -> None:
        if self.weighting == "static" and self.concentration != LambdaDPO.concentration:
            raise ValueError("concentration: has no effect with weighting: static; remove it")

    @property
    def needs(self) -> frozenset[str]:
        """Return reference, ratings in points, whole groups, and static weights where asked for."""
        static = {"weights"} if self.weighting == "static" else set()
        return frozenset({"reference", "ratings", "points", "all_responses"} | static)

    def __call__(self, responses: Responses, draw: Draw | None) -> Outcome:
        """Return the losses of the lists, [B, C]; without `draw`, lambda is its mean."""
        rewards = self.beta * log_ratios(responses, per_token=self.length_normalised)  # [B, K, N]
        points = responses.required("ratings") * responses.required("points").unsqueeze(1)
        points = points.detach().to(rewards).mT / self.temperature  # [B, C, N]

        examples, criteria = len(rewards), responses.reads.shape[1]
        rows = responses.comparisons[:, :1].expand_as(responses.reads)
        prompts = torch.zeros_like(rows[:1]).expand(examples, -1)  # [B, C]
        prompts = prompts.scatter_reduce(0, rows, responses.reads, "amin", include_self=False)
        read = torch.arange(examples, device=prompts.device).unsqueeze(-1), prompts
        listed = responses.mask.any(-1)[read] & ~points.isnan()  # [B, C, N]

        floor = torch.finfo(rewards.dtype).min
        targets = points.masked_fill(~listed, floor).softmax(-1) * listed
        log_shares = rewards[read].masked_fill(~listed, floor).log_softmax(-1)
        losses = -(targets * log_shares).sum(-1)
        keep = listed.sum(-1) > 1
        shares = self._lambda(responses, draw, criteria).to(losses).expand_as(losses) * keep
        return Outcome(losses, shares, rewards, terms={}, per="example")

    def _lambda(self, responses: Responses, draw: Draw | None, criteria: int) -> Tensor:
        """Return [B, C] or [C]."""
        if self.weighting == "static":
            return responses.required("weights").detach()
        if draw is None:
            return torch.full((criteria,), 1 / criteria, dtype=torch.float64)
        return draw.dirichlet(self.concentration, criteria)
