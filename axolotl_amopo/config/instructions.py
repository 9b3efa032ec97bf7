"""Dimension-aware prompts: the instruction beside the question (paper, section 3.1).

Templates are Jinja, rendered in a sandbox: a shared YAML runs no code.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined)

# A dimension's name, description, scale, and the rating to aim for; where weights stand in the
# prompt, its weight as well.
Asked = (
    tuple[str, str | None, tuple[float, float], float | None]
    | tuple[str, str | None, tuple[float, float], float | None, float]
)

DEFAULT_INSTRUCTION = (
    "Your answer will be rated on {{ dimension }}"
    "{% if description %} ({{ description }}){% endif %}, from {{ min }} to {{ max }}. "
    "{% if rating is none %}Aim for the best rating."
    "{% else %}Write an answer whose {{ dimension }} is {{ rating }} of {{ max }}.{% endif %}"
)
DEFAULT_OVERALL_INSTRUCTION = (
    "Your answer will be rated on several dimensions."
    "{% for d in dimensions %} {{ d.dimension }}"
    "{% if d.description %} ({{ d.description }}){% endif %}, from {{ d.min }} to {{ d.max }}"
    "{% if d.rating is not none %}: aim for {{ d.rating }}{% endif %}."
    "{% endfor %}"
    # Not selectattr('rating', 'none'), which llama.cpp's engine reads as another thing.
    "{% if dimensions | rejectattr('rating') | list %} Aim for the best ratings.{% endif %}"
)
DEFAULT_WEIGHTS_INSTRUCTION = (
    "Your answer will be rated on several dimensions, which count by these weights:"
    "{% for d in dimensions %} {{ d.dimension }}"
    "{% if d.description %} ({{ d.description }}){% endif %} {{ d.weight }}"
    "{{ '.' if loop.last else ',' }}{% endfor %}"
)


def number(value: float) -> str:
    """Return a rating as people write it: 4, 3.5, 3.67."""
    return f"{round(value, 2) + 0:g}"  # -0 + 0 is 0


def nearest_level(rating: float, scale: Sequence[float], levels: int) -> float:
    """Return the nearest of so many evenly spaced ratings of a scale, both ends among them.

    What is halfway between two becomes the higher one.
    """
    low, high = scale
    steps = levels - 1
    # The little on top: floats may make less of what is halfway.
    step = math.floor((rating - low) / (high - low) * steps + 0.5 + 1e-9)
    return low + step * (high - low) / steps


@functools.lru_cache(maxsize=64)
def _template(text: str):
    return ENVIRONMENT.from_string(text)


def dimension_facts(
    name: str,
    description: str | None,
    scale: Sequence[float],
    rating: float | None,
    weight: float | None = None,
) -> dict[str, Any]:
    """Return what a template may use of one dimension; numbers come as readable text."""
    weighted = {} if weight is None else {"weight": f"{weight:.1f}"}
    return weighted | {
        "dimension": name.replace("_", " "),
        "description": description,
        "min": number(scale[0]),
        "max": number(scale[1]),
        "rating": None if rating is None else number(rating),
    }


def render(template: str, facts: Mapping[str, Any]) -> str:
    """Return the instruction's text, empty where the template is."""
    return _template(template).render(**facts).strip()


# Remembered: with few different ratings in the data, the same texts come again and again.
@functools.lru_cache(maxsize=4096)
def instruction(template: str | None, asked: Asked) -> str:
    """Return one dimension's instruction; by the default template where there is none."""
    template = DEFAULT_INSTRUCTION if template is None else template
    return render(template, dimension_facts(*asked))


@functools.lru_cache(maxsize=4096)
def overall_instruction(template: str | None, asked: tuple[Asked, ...]) -> str:
    """Return the overall prompt's instruction, which names all the dimensions."""
    if template is None:
        weighted = any(len(one) > 4 for one in asked)
        template = DEFAULT_WEIGHTS_INSTRUCTION if weighted else DEFAULT_OVERALL_INSTRUCTION
    return render(template, {"dimensions": [dimension_facts(*one) for one in asked]})
