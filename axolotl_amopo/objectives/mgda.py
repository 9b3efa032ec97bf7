"""MGDA: the Multiple-Gradient Descent Algorithm (Sener and Koltun, NeurIPS 2018), on DPO's losses.

https://arxiv.org/abs/1810.04650. With g_k the gradient of the mean DPO loss of dimension k,

    p    = argmin over the simplex of |sum_k p_k g_k|
    step = sum_k p_k g_k

The shortest vector between the gradients serves every dimension, if any step does; where it is 0,
none can improve without another's loss. There are no weights to choose: `weights` of the user are
refused. A dimension with a small gradient takes much of the weight, and the step shrinks near a
compromise, so gradient norms in the log mean something else. `gradients.py` solves for p;
evaluation shows the plain mean of the losses.

beta: 0.1, as for DPO.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from axolotl_amopo.objectives.base import Paper
from axolotl_amopo.objectives.dpo import DPO

PAPER = Paper(
    "MGDA",
    "https://arxiv.org/abs/1810.04650",
    """\
@inproceedings{sener-koltun-2018-mgda,
  title = {Multi-Task Learning as Multi-Objective Optimization},
  author = {Sener, Ozan and Koltun, Vladlen},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2018},
  url = {https://arxiv.org/abs/1810.04650}
}""",
)


@dataclass(frozen=True)
class MGDA(DPO):
    """MGDA, see the head of this file: DPO whose gradients are combined by `mgda`."""

    paper: ClassVar[Paper] = PAPER
    defaults: ClassVar[Mapping[str, Any]] = {
        key: value for key, value in DPO.defaults.items() if key != "weights"
    } | {"gradients": "mgda"}

    @property
    def needs(self) -> frozenset[str]:
        """Return the reference model's log-probabilities."""
        return frozenset({"reference"})
