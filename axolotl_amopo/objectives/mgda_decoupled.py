"""MGDA-Decoupled: geometry-aware multi-objective DPO (Vari-Kakas et al., 2026).

https://arxiv.org/abs/2604.20685. As MGDA, but the weights are found on gradients that are divided
by their own losses, and then combine the gradients as they are:

    p    = argmin over the simplex of |sum_k p_k g_k / L_k|
    step = sum_k p_k g_k

A dimension that is learned already has a small loss and a small gradient, for which MGDA gives it
most of the weight. Divided by its loss it no longer looks small. The exact normalisation was taken
from accounts of the paper, not from its text or code, which were not at hand.

beta: 0.1, as for DPO.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from axolotl_amopo.objectives.base import Paper
from axolotl_amopo.objectives.mgda import MGDA

PAPER = Paper(
    "MGDA-Decoupled",
    "https://arxiv.org/abs/2604.20685",
    """\
@misc{vari-kakas-etal-2026-mgda-decoupled,
  title = {{MGDA-Decoupled}: Geometry-Aware Multi-Objective Optimisation for {DPO}-based {LLM}
           Alignment},
  author = {V{\\'a}ri-Kakas, Andor and Park, Ji Won and Tagasovska, Natasa},
  year = {2026},
  eprint = {2604.20685},
  archiveprefix = {arXiv},
  url = {https://arxiv.org/abs/2604.20685}
}""",
)


@dataclass(frozen=True)
class MGDADecoupled(MGDA):
    """MGDA-Decoupled, see the head of this file: DPO combined by `mgda_decoupled`."""

    paper: ClassVar[Paper] = PAPER
    defaults: ClassVar[Mapping[str, Any]] = {**MGDA.defaults, "gradients": "mgda_decoupled"}
