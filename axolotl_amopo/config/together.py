"""The checks of an `amopo:` block that look at several of its keys."""

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from axolotl_amopo.config.instructions import overall_instruction
from axolotl_amopo.errors import ConfigError, did_you_mean
from axolotl_amopo.objectives import Objective
from axolotl_amopo.objectives.gradients import Gradients
from axolotl_amopo.objectives.settings import check_together

if TYPE_CHECKING:
    from axolotl_amopo.config.block import AMoPOConfig

OVERALL = "overall"
# What the trainer supplies of what objectives and settings need beside log-probabilities.
SUPPLIED = {
    "ratings",
    "points",
    "weights",
    "reference",
    "references",
    "gradients",
    "all_responses",
    "token_counts",
    "drawn_weights",
    "fit",
}


def check_names(config: "AMoPOConfig") -> None:
    """Check that every criterion has a name of its own, and that keys name existing ones.

    Raises:
        ValueError: saying what is wrong, as `check_block` does.
    """
    names = config.criteria
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"dimensions: '{name}' is there twice"
                + (" ('overall' is the name of the extra prompt)" if name == OVERALL else "")
            )
    orders = ["mean", "dataset", *config.dimension_names]
    if config.order_by is not None and config.order_by not in orders:
        raise ValueError(
            f"order_by: '{config.order_by}' is neither mean, dataset nor a dimension."
            f"{did_you_mean(config.order_by, orders)}"
        )


def check_block(config: "AMoPOConfig") -> None:
    """Check that keys which are right one by one go together.

    Raises:
        ValueError: naming a key, what it does not go with, and what to write instead.
    """
    _check_prompts(config)
    _check_nearest(config)
    _check_all_responses(config)
    check_together(config.make_objective(), config.make_settings())
    _check_fit(config)
    _check_levels(config)
    _check_cosines(config)
    _check_weights(config)


def _check_cosines(config: "AMoPOConfig") -> None:
    if not config.gradient_cosines:
        return
    if "gradients" in config.needs:
        raise ValueError(
            "gradient_cosines: has no effect where the criteria's gradients are combined, which "
            "logs their cosines at every step; remove it"
        )
    if len(config.criteria) < 2:
        raise ValueError("gradient_cosines: needs two criteria; there is one")
    if config.keeps_single_responses:
        raise ValueError(
            f"gradient_cosines: does not go with objective {config.objective}, whose loss is not "
            "one per criterion; remove it"
        )


def _check_levels(config: "AMoPOConfig") -> None:
    if not config.rating_levels or config.asks_for_ratings:
        return
    none = config.rating_in_prompt == "none"
    why = "rating_in_prompt: none" if none else "instructions that are empty"
    raise ValueError(
        f"rating_levels: has no effect with {why}, since no prompt asks for a rating; remove it"
    )


def _check_prompts(config: "AMoPOConfig") -> None:
    if config.prompts == "one" and config.instruction:
        raise ValueError(
            "instruction: has no effect with prompts: one; write overall_instruction, which "
            "names all the dimensions"
        )
    for key in ("weight_draws", "weight_concentration"):
        if getattr(config, key) is not None and not config.draws_weights:
            raise ValueError(
                f"{key}: has no effect with objective {config.objective}, which has no weights "
                "in its prompts; remove it"
            )
    if config.draws_weights:
        _check_drawn_weights(config)


def _check_drawn_weights(config: "AMoPOConfig") -> None:
    takes = f"objective {config.objective}, whose prompts state the weights of the dimensions"
    for key, value in (("prompts", "one"), ("overall", False), ("rating_in_prompt", "none")):
        if (given := getattr(config, key)) != value:
            given, value = (str(one).lower() for one in (given, value))
            raise ValueError(f"{key}: {given} does not go with {takes}; write {value}")
    asked = [
        tuple((name, None, (0.0, 1.0), None, weight) for name in config.dimension_names)
        for weight in (0.2, 0.7)
    ]
    if len({overall_instruction(config.overall_instruction, one) for one in asked}) < 2:
        raise ValueError(
            "overall_instruction: does not show the weights; write {{ d.weight }} in a loop "
            "over dimensions"
        )


def _check_nearest(config: "AMoPOConfig") -> None:
    if config.winner != "nearest":
        if config.rating_in_prompt == "target":
            raise ValueError(
                f"rating_in_prompt: target goes with winner: nearest alone, not with winner: "
                f"{config.winner}"
            )
        return
    if config.rating_in_prompt != "target":
        raise ValueError(
            f"winner: nearest does not go with rating_in_prompt: {config.rating_in_prompt}; "
            "write target, the rating that the winner is nearest to"
        )
    if not config.has_instructions:
        raise ValueError(
            "winner: nearest needs prompts that say which rating they ask for; write an instruction"
        )
    if config.order_by is not None:
        raise ValueError("order_by: has no effect with winner: nearest; remove it")
    if "ratings" in config.needs:
        raise ValueError(
            f"winner: nearest does not go with objective {config.objective} and its settings, "
            "which take the higher rating for the better one; write per_dimension"
        )


def _check_fit(config: "AMoPOConfig") -> None:
    if "fit" not in config.needs:
        return
    if config.rating_in_prompt == "own":
        raise ValueError(
            "contrast: has no effect with rating_in_prompt: own, where every prompt fits every "
            "response; write chosen or none"
        )
    if config.prompt_count < 2:
        raise ValueError(
            "contrast: needs two prompts that ask for different things, and a pair has one; "
            "write an instruction"
        )


def _check_all_responses(config: "AMoPOConfig") -> None:
    """Check the keys that say which responses are trained on."""
    objective = f"objective {config.objective}"
    if config.single_responses == "keep" and not config.keeps_single_responses:
        raise ValueError(
            f"single_responses: keep does not go with {objective}, which compares responses; "
            "write drop or error"
        )
    if not config.all_responses:
        return
    takes = f"{objective}, which takes all responses of a prompt"
    if not config.group_by_prompt:
        raise ValueError(f"group_by_prompt: false does not go with {takes}; remove it")
    if config.pairs != "all":
        raise ValueError(f"pairs: {config.pairs} does not go with {takes}; remove it")
    if config.rating_in_prompt in ("chosen", "target") and config.has_instructions:
        raise ValueError(
            f"rating_in_prompt: {config.rating_in_prompt} does not go with {takes} and chooses "
            "none; write own or none"
        )


def _check_weights(config: "AMoPOConfig") -> None:
    if config.weights_per_row:
        _check_weights_per_row(config)
        return
    objective, names = config.make_objective(), config.criteria
    if "weights" in objective.needs and config.weights is None:
        raise ValueError(
            f"weights: are missing; objective {config.objective}{_with(objective)} needs one per "
            f"criterion: {', '.join(names)}"
        )
    if "weights" not in objective.needs and config.weights is not None:
        used = _choices_that_need(objective, "weights")
        raise ValueError(
            f"weights: are not used by objective {config.objective}{_with(objective)}; remove "
            f"them{''.join(f', or write {choice}' for choice in used)}"
        )
    if config.weights is None:
        return
    if set(config.weights) != set(names):
        raise ValueError(
            f"weights must name every criterion once: {', '.join(names)}; "
            f"they name {', '.join(config.weights)}"
        )
    total = sum(config.weights.values())
    if not total > 0:
        raise ValueError("weights must not all be 0")
    for field in config.criterion_fields():
        name, least = config.hyperparameters()[field.name], field.metadata["least_weight"]
        if config.weights[name] < least * total:
            raise ValueError(
                f"weights: {name}, which {field.name} names, has a share of "
                f"{config.weights[name] / total:g}; the loss divides by it, and it must be at "
                f"least {least:g}"
            )
    equal = len(set(config.weights.values())) == 1
    for setting in config.make_settings():
        if isinstance(setting, Gradients) and setting.finds_weights and not equal:
            raise ValueError(
                f"weights: have no effect with gradients: {setting.gradients}, which finds its "
                "own; remove them"
            )


def _check_weights_per_row(config: "AMoPOConfig") -> None:
    key, objective = "weights_per_row: true", config.make_objective()
    if "weights" not in objective.needs:
        raise ValueError(
            f"{key} is not used by objective {config.objective}{_with(objective)}; remove it"
        )
    if config.weights is not None:
        raise ValueError(f"weights: have no effect with {key}; remove one of the two")
    for field in config.criterion_fields():
        raise ValueError(
            f"{key} does not go with objective {config.objective}, whose loss divides by the "
            f"weight of {field.name}; write weights"
        )
    for setting in config.make_settings():
        if isinstance(setting, Gradients) and setting.gradients != "sum":
            raise ValueError(
                f"{key} does not go with gradients: {setting.gradients}, which combines the "
                "gradients of all rows; write weights"
            )


def check_needs(config: "AMoPOConfig") -> None:
    """Check that the trainer supplies what the objective and the settings need.

    Raises:
        ConfigError: naming the key and what is lacking.
    """
    _check_reference(config)
    needs = [("objective", config.objective, config.make_objective().needs)]
    for setting in config.make_settings():
        switch = next(iter(vars(setting)))
        needs.append((switch, getattr(setting, switch), setting.needs))
    for key, value, names in needs:
        if lacking := names - SUPPLIED:
            raise ConfigError(
                f"amopo.{key}: {value} needs {', '.join(sorted(lacking))}, which this version does "
                "not supply; choose another one."
            )


def _check_reference(config: "AMoPOConfig") -> None:
    given, needs = config.reference, config.make_objective().needs
    key, objective = "amopo.reference:", f"objective {config.objective}"
    names = given if isinstance(given, list) else [given or "none"]
    for name in names:
        hint = did_you_mean(name, ["none", "initial"])
        if name not in ("none", "initial") and hint and not Path(name).exists():
            raise ConfigError(
                f"{key} {name!r} is neither none, initial nor a model's folder.{hint}"
            )
    if "reference" not in needs:
        if names != ["none"]:
            raise ConfigError(
                f"{key} {', '.join(names) or '[]'} can't go with {objective}, which has no "
                "reference; remove it."
            )
    elif "references" in needs:
        if len(set(names)) != 2 or len(names) != 2 or "none" in names:
            raise ConfigError(
                f"{key} {objective} compares with two models; write [initial, PATH], with the "
                "folder or hub name of the other one."
            )
    elif given is not None and (names == ["none"] or len(names) != 1):
        raise ConfigError(
            f"{key} {', '.join(names) or '[]'} can't go with {objective}, which compares with "
            f"{'a reference; remove it' if names == ['none'] else 'one reference; name one'}."
        )


def _with(objective: Objective) -> str:
    """Return the choices among its hyperparameters, e.g. ` with weighting: mean`."""
    chosen = [f"{name}: {getattr(objective, name)}" for name in choices(type(objective))]
    return f" with {', '.join(chosen)}" if chosen else ""


def _choices_that_need(objective: Objective, need: str) -> list[str]:
    """Return the settings, one changed at a time, with which the objective has a need."""
    return [
        f"{name}: {choice}"
        for name, choices in choices(type(objective)).items()
        for choice in choices
        if need in _needs_with(objective, name, choice)
    ]


def _needs_with(objective: Objective, name: str, choice: Any) -> frozenset[str]:
    try:
        return replace(objective, **{name: choice}).needs
    except ValueError:  # the choice does not go with the other fields
        return frozenset()


def choices(kind: type) -> dict[str, tuple]:
    """Return the values of each of an objective's or setting's fields that has a few."""
    types = get_type_hints(kind)
    return {
        field.name: get_args(types[field.name])
        for field in fields(kind)
        if get_origin(types[field.name]) is Literal
    }
