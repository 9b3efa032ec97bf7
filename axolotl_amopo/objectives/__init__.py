"""The objectives: one paper per file, each a frozen dataclass that turns responses into losses.

torch alone; nothing here knows a config, a dataset, a model or a trainer. A new objective is a new
file and a line in `OBJECTIVES`; CONTRIBUTING.md walks through one.
"""

from axolotl_amopo.objectives.amopo import AMoPO
from axolotl_amopo.objectives.base import (
    Draw,
    Objective,
    Outcome,
    Paper,
    Responses,
    example_losses,
)
from axolotl_amopo.objectives.simpo import SimPO

#: By the name that `amopo.objective` gives.
OBJECTIVES: dict[str, type[Objective]] = {"amopo": AMoPO, "simpo": SimPO}

__all__ = ["OBJECTIVES", "Draw", "Objective", "Outcome", "Paper", "Responses", "example_losses"]
