"""RACO: Reward-free Alignment for Conflicting Objectives (Chen et al., ICML 2026).

https://arxiv.org/abs/2602.02495. The losses are DPO's per dimension, and the user's weights w stay;
what changes is the step. With g_k the gradient of the mean loss of dimension k and
g_0 = sum_k w_k g_k,

    p    = argmin over the simplex of g_0 . G_p + c |g_0| |G_p|,    G_p = sum_k p_k g_k
    p'   = min(p, w)                                                not scaled up again
    step = g_0 + c |g_0| G_p' / |G_p'|

A weighted sum can improve its losses at one dimension's cost. This step stays within c |g_0| of
g_0 and is the best there for the dimension that it serves worst (conflict-averse gradient descent).
The clip keeps a dimension from a larger correction than its weight allows. `gradients.py` solves
for p. c = 0 is DPO with static weights.

c: 0.4 in the authors' README; 0 to below 1. beta: 0.2. Learning rate 1.5e-5 to 2.75e-5 on 4B
models, 7e-7 on Llama 3 8B, 64 pairs per step. With one pair per step all g_k are collinear and
nothing is resolved: train on many.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from axolotl_amopo.objectives.base import Paper, hyperparameter
from axolotl_amopo.objectives.dpo import DPO

PAPER = Paper(
    "RACO",
    "https://arxiv.org/abs/2602.02495",
    """\
@inproceedings{chen-etal-2026-raco,
  title = {Reward-free Alignment for Conflicting Objectives},
  author = {Chen, Peter and Li, Xiaopeng and Chen, Xi and Lin, Tianyi},
  booktitle = {International Conference on Machine Learning},
  year = {2026},
  url = {https://arxiv.org/abs/2602.02495}
}""",
)


@dataclass(frozen=True)
class RACO(DPO):
    """RACO, see the head of this file: DPO whose gradients are combined by `cagrad`."""

    paper: ClassVar[Paper] = PAPER
    defaults: ClassVar[Mapping[str, Any]] = {**DPO.defaults, "gradients": "cagrad"}

    beta: float = hyperparameter(0.2, "Reward scale", above=0)
