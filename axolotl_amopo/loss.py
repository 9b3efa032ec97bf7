"""The AMoPO loss, by the name that it is imported by: `from axolotl_amopo.loss import amopo_loss`.

The method itself stands in `objectives.amopo`.
"""

from axolotl_amopo.objectives.amopo import (
    WEIGHTINGS,
    AMoPOLoss,
    Weighting,
    amopo_loss,
    dimension_weights,
)
from axolotl_amopo.objectives.base import MIN_LOGP, ResponseStats, response_stats

__all__ = [
    "MIN_LOGP",
    "WEIGHTINGS",
    "AMoPOLoss",
    "ResponseStats",
    "Weighting",
    "amopo_loss",
    "dimension_weights",
    "response_stats",
]
