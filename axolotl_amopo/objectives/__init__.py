"""The objectives: one paper per file, each a frozen dataclass that turns responses into losses.

torch alone; nothing here knows a config, a dataset, a model or a trainer. A new objective is a new
file and a line in `OBJECTIVES`; CONTRIBUTING.md walks through one. What goes with several of them
stands in `terms.py`, `weights.py` and `gradients.py`, and `settings.py` says with which.
"""

from axolotl_amopo.objectives.amopo import AMoPO
from axolotl_amopo.objectives.base import (
    Draw,
    Objective,
    Outcome,
    Paper,
    Responses,
    Setting,
    example_losses,
)
from axolotl_amopo.objectives.cos_dpo import COSDPO
from axolotl_amopo.objectives.dpo import DPO
from axolotl_amopo.objectives.ipo import IPO
from axolotl_amopo.objectives.lambda_dpo import LambdaDPO
from axolotl_amopo.objectives.mappo import MaPPO
from axolotl_amopo.objectives.mgda import MGDA
from axolotl_amopo.objectives.mgda_decoupled import MGDADecoupled
from axolotl_amopo.objectives.modpo import MODPO
from axolotl_amopo.objectives.mrpo import MRPO
from axolotl_amopo.objectives.raco import RACO
from axolotl_amopo.objectives.ric import RiC
from axolotl_amopo.objectives.simpo import SimPO

#: By the name that `amopo.objective` gives.
OBJECTIVES: dict[str, type[Objective]] = {
    "amopo": AMoPO,
    "simpo": SimPO,
    "dpo": DPO,
    "ipo": IPO,
    "mappo": MaPPO,
    "modpo": MODPO,
    "lambda_dpo": LambdaDPO,
    "raco": RACO,
    "mgda": MGDA,
    "mgda_decoupled": MGDADecoupled,
    "cos_dpo": COSDPO,
    "ric": RiC,
    "mrpo": MRPO,
}

__all__ = [
    "OBJECTIVES",
    "Draw",
    "Objective",
    "Outcome",
    "Paper",
    "Responses",
    "Setting",
    "example_losses",
]
