"""A preference dimension, as the YAML describes it."""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from axolotl_amopo.errors import is_line

Scale = Annotated[
    tuple[float, float],
    Field(description="Lowest and highest rating, e.g. [0, 4]"),
]


def check_scale(scale: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return the scale.

    Raises:
        ValueError: where it is not two finite numbers in ascending order.
    """
    if scale and not (all(map(math.isfinite, scale)) and scale[0] < scale[1]):
        raise ValueError("must be [lowest, highest], e.g. [1, 5]")
    return scale


class Dimension(BaseModel):
    """One preference dimension."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, description="Name of the rating in the data")
    description: str | None = Field(
        default=None, description="What it means; shown to the model in the instruction"
    )
    scale: Scale | None = Field(
        default=None,
        description="Lowest and highest rating; default: the dataset's, else what the data spans",
    )
    direction: Literal["higher", "lower"] | None = Field(
        default=None,
        description="Which ratings are better; default: the dataset's (severity: lower), else "
        "higher",
    )

    check_scale = field_validator("scale")(check_scale)

    @field_validator("name")
    @classmethod
    def check_name(cls, name: str) -> str:
        # A name becomes part of a metric's name, where a slash separates.
        if "/" in name or name != name.strip() or not is_line(name):
            raise ValueError("must be one line, without a slash, or spaces at its ends")
        return name
