"""A block of the YAML -> its model, or one sentence per mistake."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from axolotl_amopo.config.block import (
    DEFAULT_OBJECTIVE,
    INTERNAL,
    AMoPOConfig,
    hyperparameter_names,
    known_keys,
)
from axolotl_amopo.config.dimensions import Dimension
from axolotl_amopo.config.together import choices
from axolotl_amopo.errors import ConfigError, did_you_mean
from axolotl_amopo.objectives import OBJECTIVES
from axolotl_amopo.objectives.settings import admitted


def parse_block[Model: BaseModel](model: type[Model], block: Any, where: str) -> Model:
    """Return a validated block of the YAML.

    Raises:
        ConfigError: naming the key, what is wrong with it and what may stand there, in one sentence
            per mistake.
    """
    if block is None:
        block = {}
    if not isinstance(block, dict):
        raise ConfigError(f"{where}: must be a block of keys, not {block!r}.")
    if model is AMoPOConfig and (internal := INTERNAL & set(block)):
        raise ConfigError(f"{where}.{min(internal)}: is for the plugin alone; remove it.")
    try:
        return model.model_validate(block)
    except ValidationError as error:
        raise ConfigError(
            " ".join(_sentence(model, block, where, detail) for detail in error.errors())
        ) from None


def _sentence(model: type[BaseModel], block: dict, where: str, detail: Mapping[str, Any]) -> str:
    path = [str(part) for part in detail["loc"]]
    key = ".".join([where, *path]) if path else where
    kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        if len(path) > 1 and path[0] == "dimensions":
            return _unknown(key, list(Dimension.model_fields))
        if model is AMoPOConfig:
            return _not_of_the_objective(key, block.get("objective") or DEFAULT_OBJECTIVE)
        return _unknown(key, list(model.model_fields))
    if kind == "literal_error":
        hint = did_you_mean(str(given), re.findall(r"'(.*?)'", context["expected"]))
        if not hint and model is AMoPOConfig:
            hint = _other_key(given, str(block.get("objective") or DEFAULT_OBJECTIVE))
        return f"{key}: {given!r} is not one of {context['expected']}.{hint}"
    if kind == "value_error":
        text = str(context["error"])
        return f"{key}: {text}{'' if text.endswith(('.', '?')) else '.'}"
    return f"{key}: {detail['msg'][0].lower()}{detail['msg'][1:]}, got {given!r}."


def _unknown(key: str, known: list[str]) -> str:
    hint = did_you_mean(key.rpartition(".")[2], known)
    return f"{key}: unknown key.{hint} Known: {', '.join(known)}."


def _other_key(value: Any, objective: str) -> str:
    """Return which key of an objective or its settings takes a value that another one does not."""
    kinds = [OBJECTIVES[name] for name in OBJECTIVES if name == objective] + admitted(objective)
    keys = [
        f"{name}: {value}"
        for kind in kinds
        for name, values in choices(kind).items()
        if value in values
    ]
    return f" Did you mean {keys[0]}?" if keys else ""


def _not_of_the_objective(key: str, objective: str) -> str:
    name = key.rpartition(".")[2]
    if name == "beta":
        return f"{key}: unknown key; beta is axolotl's own key rl_beta, outside this block."
    others = [other for other in OBJECTIVES if name in hyperparameter_names(other)]
    if not others:
        return _unknown(key, known_keys(objective))
    plural = "s" * (len(others) > 1)
    own = ", ".join(hyperparameter_names(objective)) or "no keys of its own"
    return (
        f"{key}: belongs to objective{plural} {', '.join(others)}; objective {objective} has {own}."
    )
