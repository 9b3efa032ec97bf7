"""The `amopo:` block of the YAML: the engine's keys, and the hyperparameters of the objective.

The engine's keys are fields of `AMoPOConfig`. The hyperparameters are the fields of the objective's
own dataclass and of the settings that go with it, so a new objective brings its keys along;
`amopo.objective` says which apply.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import Field as DataclassField
from dataclasses import fields
from typing import Annotated, Any, Literal, get_type_hints

from jinja2 import TemplateError, meta
from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from axolotl_amopo.config.dimensions import Dimension
from axolotl_amopo.config.instructions import ENVIRONMENT, dimension_facts, render
from axolotl_amopo.config.together import OVERALL, check_block, check_names
from axolotl_amopo.errors import ConfigError, did_you_mean
from axolotl_amopo.objectives import OBJECTIVES, Objective, Setting
from axolotl_amopo.objectives.settings import admitted

DEFAULT_OBJECTIVE = "amopo"
# Settings by name, for keys that the block does not set. `paper` is AMoPO as arXiv 2506.07165
# describes it, section 3, whatever our defaults become; beta is axolotl's `rl_beta`.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "objective": "amopo",
        "beta": 0.8,
        "gamma": 2.0,
        "weighting": "gaussian",
        "overall": True,
        "winner": "overall",
        "prompts": "per_criterion",
        "rating_in_prompt": "chosen",
        "instruction_place": "before",
    }
}
# Fields of the block that the plugin fills in.
INTERNAL = {"enabled", "datasets"}


@functools.cache
def hyperparameter_model(objective: type[Objective], *settings: type[Setting]) -> type[BaseModel]:
    """Return a model of the objective's and the settings' fields; of `beta` not, it is `rl_beta`.

    Made when it is asked for, so that an objective of anybody's is known to the block as soon as it
    is in `OBJECTIVES`.
    """
    keys = {
        field.name: _key(field, get_type_hints(kind)[field.name])
        for kind in (objective, *settings)
        for field in fields(kind)
        if field.name != "beta"
    }
    return create_model(objective.__name__, __config__=ConfigDict(extra="forbid"), **keys)


def _key(field: DataclassField, kind: Any) -> tuple[Any, Any]:
    about = field.metadata
    if about["least_weight"] is not None:  # a criterion's number, which the YAML has by its name
        return str | None, Field(default=None, description=about["description"])
    bounds = about["bounds"]
    return kind, Field(default=field.default, description=about["description"], **bounds)


def hyperparameter_names(objective: str) -> list[str]:
    """Return the keys of the block that belong to an objective, those of settings last."""
    return list(hyperparameter_model(OBJECTIVES[objective], *admitted(objective)).model_fields)


class AMoPOConfig(BaseModel):
    """The `amopo:` block. Where a key has a published default, it is AMoPO's (arXiv 2506.07165).

    >>> config = AMoPOConfig(objective="simpo", dimensions=["helpfulness"])
    >>> config.gamma, config.criteria
    (0.5, ['overall', 'helpfulness'])
    """

    # Beside the fields, an instance holds the hyperparameters of its objective, see
    # `read_hyperparameters`. So it reads, dumps and copies them as it does the fields.
    model_config = ConfigDict(extra="allow")

    preset: Literal["paper"] | None = Field(
        default=None,
        description="paper: AMoPO's settings as its paper has them, for keys that are not set here",
    )
    objective: str = Field(
        default=DEFAULT_OBJECTIVE, description=f"The loss: {', '.join(OBJECTIVES)}"
    )
    dimensions: list[Dimension] = Field(
        default=["helpfulness", "correctness", "instruction_following"],
        min_length=1,
        validate_default=True,
        description="Preference dimensions: names, or {name, description, scale}",
    )
    overall: bool = Field(
        default=True, description="Add one prompt that names all the dimensions at once"
    )
    weights: dict[str, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]] | None = Field(
        default=None,
        description="A weight per criterion, by name, or equal; for objectives that use them, such "
        "as dpo, or amopo with weighting: static",
    )
    weights_per_row: bool = Field(
        default=False,
        description="Instead of weights, each row of the data has its own, in its field weights",
    )
    winner: Literal["overall", "per_dimension", "nearest"] = Field(
        default="overall",
        description="overall: one winner per pair; per_dimension: each dimension's ratings decide; "
        "nearest: those nearest to what the prompt asks for win",
    )
    rating_in_prompt: Literal["chosen", "own", "none", "target"] = Field(
        default="chosen",
        description="The rating a prompt asks for: the chosen response's, each its own, none, or "
        "(with winner: nearest, and by default there) that of a response that is drawn",
    )
    prompts: Literal["per_criterion", "one"] = Field(
        default="per_criterion",
        description="per_criterion: each criterion reads a prompt of its own; one: all of them "
        "read the prompt that names all the dimensions, of overall_instruction",
    )
    weight_draws: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="How many weight vectors are drawn per example, each into a prompt of its own; "
        "for cos_dpo",
    )
    weight_concentration: Annotated[float, Field(ge=0.05, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Of the Dirichlet distribution that they are drawn from: below 1 it prefers "
        "corners",
    )
    rating_levels: int | None = Field(
        default=None,
        ge=2,
        description="Round the rating that a prompt asks for to so many evenly spaced levels of "
        "the scale, so that responses with nearly equal ratings share a prompt; default: exact",
    )
    instruction: str | None = Field(
        default=None,
        description="Jinja template of a dimension's instruction: dimension, description, min, "
        "max, rating; empty for none",
    )
    overall_instruction: str | None = Field(
        default=None,
        description="Jinja template of the overall instruction: dimensions, a list of the same "
        "(for cos_dpo with weight); empty for none",
    )
    instruction_place: Literal["before", "after", "system"] = Field(
        default="before",
        description="The instruction stands before the question; after it, which is cheaper: all "
        "prompts of a pair then share the question; or at the end of the system message",
    )
    share_prompt: Literal["auto", True, False] = Field(
        default="auto",
        description="Run the prompt that responses share once. auto: where the model gives the "
        "same numbers; true: always, or stop; false: never",
    )
    reference: str | list[str] | None = Field(
        default=None,
        description="What an objective compares the model with. initial: the model as training "
        "found it; none: nothing; a folder or hub name: another model; a list, for mrpo: two of "
        "them. Default: what the objective needs",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="The most tokens of a forward pass. A batch that has more runs in parts, one "
        "after another, with the same numbers, for one more forward pass in training; at least "
        "sequence_len",
    )
    one_prompt_at_a_time: bool = Field(
        default=False,
        description="The same with one prompt and its responses per part, whatever their tokens: "
        "the memory of one prompt",
    )
    gradient_cosines: int = Field(
        default=0,
        ge=0,
        description="At every so many optimizer steps, log the cosines between the criteria's "
        "gradients, which say whether they pull in one direction; such a step costs up to a "
        "backward pass per criterion. 0: never",
    )
    pairs: Literal["all", "best_worst"] | Annotated[int, Field(ge=1)] = Field(
        default="all",
        description="Which pairs are made of a prompt's rated responses: all, best_worst, or a "
        "number: at most so many, drawn by the seed",
    )
    group_by_prompt: bool = Field(
        default=False,
        description="All pairs of a prompt are one training example, in which each response runs "
        "once under a prompt, whatever the number of its pairs",
    )
    order_by: str | None = Field(
        default=None,
        description="What makes a response the better one overall: mean (of the ratings, each on 0 "
        "to 1), dataset (the data's own order or overall rating), or a dimension; default: the "
        "data's own order where it has one, else mean",
    )
    min_gap: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Pairs whose overall ratings (0 to 1) differ by less are dropped; with "
        "per_dimension, dimensions that do weigh nothing",
    )
    missing_ratings: Literal["error", "drop", "mask"] = Field(
        default="error",
        description="A response without a rating: stop, drop its pairs, or mask that dimension",
    )
    single_responses: Literal["drop", "error", "keep"] = Field(
        default="drop",
        description="A prompt with one response only: drop and count, stop, or (objectives without "
        "pairs) keep",
    )
    bad_rows: Literal["error", "drop"] = Field(
        default="error", description="A row that can't be used: stop, or drop and count"
    )
    eval_table: int = Field(
        default=0,
        ge=0,
        description="How many held-out examples are shown one by one at each evaluation, in a file "
        "and in the trackers",
    )
    generate_samples: int = Field(
        default=0,
        ge=0,
        description="How many held-out prompts are answered at each evaluation of a training run, "
        "into its log, a file and the trackers; 0: none",
    )
    sample_settings: list[str] | None = Field(
        default=None,
        min_length=1,
        description="What these answers are asked for: each as in helpfulness=5, overall, none or "
        "weights helpfulness=0.7. Default: all dimensions at their best, and none",
    )
    console: Literal["table", "plain", "off"] = Field(
        default="table",
        description="What training shows of each logged step. table: on a terminal a table that is "
        "drawn anew, elsewhere a line; plain: a line; off: transformers' dictionary of all metrics",
    )

    # Set by the plugin, kept in the block because axolotl's config carries it to every process.
    enabled: bool = Field(default=False, description="Set by `rl: amopo`; not for users")
    datasets: dict[str, dict[str, Any]] = Field(
        default={}, description="Per-dataset options, moved here by the plugin; not for users"
    )

    @model_validator(mode="before")
    @classmethod
    def read_hyperparameters(cls, block: Any) -> Any:
        """Return the block with its objective's hyperparameters and defaults resolved.

        Raises:
            ValidationError: for a hyperparameter that is out of bounds, or a key that the block
                does not have with this objective.
        """
        if not isinstance(block, Mapping):
            return block
        preset = PRESETS.get(str(block.get("preset")), {})
        named = {key: value for key, value in preset.items() if key != "beta"}
        block = {**block, **{k: v for k, v in named.items() if block.get(k) is None}}
        name = block.get("objective") or DEFAULT_OBJECTIVE
        if not isinstance(name, str) or name not in OBJECTIVES:
            return block  # refused by `check_objective`
        if preset and name != preset["objective"]:
            raise ValueError(
                f"preset: {block['preset']} is of objective {preset['objective']}, not of {name}; "
                "remove one of the two"
            )
        # A null is a key that is not set: axolotl drops it when it hands the config on.
        defaults = {k: v for k, v in OBJECTIVES[name].defaults.items() if block.get(k) is None}
        if block.get("weights_per_row"):
            defaults.pop("weights", None)
        block = {**block, **defaults}
        if block.get("winner") == "nearest" and block.get("rating_in_prompt") is None:
            block["rating_in_prompt"] = "target"
        others = {key: value for key, value in block.items() if key not in cls.model_fields}
        read = hyperparameter_model(OBJECTIVES[name], *admitted(name)).model_validate(others)
        # Of settings, which mostly are not in use, what is set.
        own = {field.name for field in fields(OBJECTIVES[name])} | read.model_fields_set
        return {**block, **read.model_dump(include=own), "objective": name}

    @field_validator("objective")
    @classmethod
    def check_objective(cls, name: str) -> str:
        if name not in OBJECTIVES:
            known = ", ".join(map(repr, OBJECTIVES))
            raise ValueError(f"{name!r} is not one of {known}.{did_you_mean(name, OBJECTIVES)}")
        return name

    @field_validator("dimensions", mode="before")
    @classmethod
    def names_to_dimensions(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [value]
        if isinstance(value, list):
            return [{"name": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("console", mode="before")
    @classmethod
    def unquoted_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # as YAML 1.1 reads the word

    @field_validator("weights", mode="before")
    @classmethod
    def equal_weights(cls, value: Any, info: Any) -> Any:
        if value != "equal":
            return value
        if "dimensions" not in info.data or "overall" not in info.data:
            return None  # which is refused for what is wrong with them
        names = [dimension.name for dimension in info.data["dimensions"]]
        return dict.fromkeys([OVERALL] * info.data["overall"] + names, 1.0)

    @field_validator("instruction", "overall_instruction")
    @classmethod
    def check_template(cls, text: str | None, info: Any) -> str | None:
        if text is None:
            return text
        facts = dimension_facts("name", None, (1, 5), 3)
        if info.field_name == "overall_instruction":
            weighted = "drawn_weights" in OBJECTIVES[info.data.get("objective", "amopo")]().needs
            facts = {"dimensions": [facts | ({"weight": "0.5"} if weighted else {})]}
        try:
            unknown = meta.find_undeclared_variables(ENVIRONMENT.parse(text)) - set(facts)
            if unknown:
                raise ValueError(f"uses {', '.join(sorted(unknown))}")
            render(text, facts)
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(
                f"is not a Jinja template that works ({error}); it may use {', '.join(facts)}"
            ) from None
        return text

    @model_validator(mode="after")
    def check_together(self) -> "AMoPOConfig":
        check_names(self)
        self._check_criterion_keys()
        check_block(self)
        return self

    def _check_criterion_keys(self) -> None:
        """Put the first dimension where a key that names one is not set, and check the others."""
        for field in self.criterion_fields():
            name = self.hyperparameters().get(field.name) or self.dimension_names[0]
            setattr(self, field.name, name)
            if name not in self.dimension_names:
                raise ValueError(
                    f"{field.name}: '{name}' is not a dimension."
                    f"{did_you_mean(name, self.dimension_names)}"
                )

    def criterion_fields(self) -> list[DataclassField]:
        """Return the fields of the objective whose keys name a criterion."""
        of_objective = fields(OBJECTIVES[self.objective])
        return [field for field in of_objective if field.metadata["least_weight"] is not None]

    @property
    def asks_for_ratings(self) -> bool:
        """Return whether a prompt asks for a rating."""
        return self.rating_in_prompt != "none" and self.has_instructions

    @property
    def dimension_names(self) -> list[str]:
        """Return the names of the dimensions."""
        return [dimension.name for dimension in self.dimensions]

    @property
    def criteria(self) -> list[str]:
        """Return what judges a comparison, in order: overall first, as in AMoPO's paper."""
        return ([OVERALL] if self.overall else []) + self.dimension_names

    @property
    def needs(self) -> frozenset[str]:
        """Return what the objective and its settings need beside log-probabilities."""
        return frozenset().union(
            *(one.needs for one in (self.make_objective(), *self.make_settings()))
        )

    @property
    def references(self) -> list[str]:
        """Return the models that the objective compares with: `initial`, or names of others."""
        if "reference" not in self.make_objective().needs:
            return []
        named = self.reference or "initial"
        return [named] if isinstance(named, str) else named

    @property
    def other_references(self) -> list[str]:
        """Return those of them that are not the model as training found it."""
        return [model for model in self.references if model != "initial"]

    @property
    def draws_weights(self) -> bool:
        """Return whether weights are drawn for an example, and stand in its prompts."""
        return "drawn_weights" in self.needs

    @property
    def rows_are_drawn(self) -> bool:
        """Return whether rows depend on the seed."""
        return isinstance(self.pairs, int) or self.draws_weights or self.winner == "nearest"

    @property
    def prompt_count(self) -> int:
        """Return how many different prompts a pair has: criteria without an instruction share one.

        With `winner: per_dimension` and ratings of the winner some have more.
        """
        if self.prompts == "one":
            return self.weight_draws or 1
        own = len(self.dimensions) if self.instruction != "" else 1
        alike = self.instruction == self.overall_instruction == ""
        return own + (self.overall and not alike)

    @property
    def all_responses(self) -> bool:
        """Return whether an example has every response of its prompt, also those in no pair."""
        return "all_responses" in self.needs

    @property
    def keeps_single_responses(self) -> bool:
        """Return whether a response alone can be trained on, because nothing is compared."""
        return {"all_responses", "token_counts"} <= self.needs

    @property
    def has_instructions(self) -> bool:
        """Return whether any criterion's prompt has an instruction."""
        in_use = [self.overall_instruction] * (self.overall or self.prompts == "one")
        if self.prompts == "per_criterion":
            in_use.append(self.instruction)
        return any(text != "" for text in in_use)

    @property
    def shares(self) -> list[float] | None:
        """Return the weights of the criteria, in order and scaled to sum to 1, where there are."""
        if self.weights is None:
            return None
        total = sum(self.weights.values())
        return [self.weights[name] / total for name in self.criteria]

    @property
    def in_parts(self) -> str:
        """Return the keys by which batches run in parts, empty where they run whole."""
        keys = ("max_tokens", "one_prompt_at_a_time")
        return " and ".join(f"amopo.{key}" for key in keys if getattr(self, key))

    def hyperparameters(self) -> dict[str, Any]:
        """Return the objective's fields, and those of settings that are set.

        Not `beta`, which is axolotl's `rl_beta`.
        """
        return dict(self.model_extra or {})

    def make_objective(self, beta: float | None = None) -> Objective:
        """Return the objective with its hyperparameters; by default with its own `beta`."""
        given = {} if beta is None else {"beta": beta}
        kind = OBJECTIVES[self.objective]
        given |= self._given(kind)
        for field in self.criterion_fields():
            given[field.name] = self.criteria.index(given[field.name])
        return kind(**given)

    def make_settings(self) -> list[Setting]:
        """Return the settings that go with the objective, in the order in which they apply."""
        return [kind(**self._given(kind)) for kind in admitted(self.objective)]

    def _given(self, kind: type) -> dict[str, Any]:
        names = {field.name for field in fields(kind)}
        return {key: value for key, value in self.hyperparameters().items() if key in names}


class AMoPOArgs(BaseModel):
    """Keys that the plugin adds to axolotl's config schema."""

    amopo: AMoPOConfig | None = Field(
        default=None, description="AMoPO settings, used with `rl: amopo`"
    )


def read_block(cfg: Any) -> AMoPOConfig:
    """Return the block of axolotl's validated config."""
    return AMoPOConfig.model_validate(plain(cfg.amopo))


def read_beta(cfg: Mapping[str, Any], config: AMoPOConfig) -> float:
    """Return `rl_beta` of the raw config, by default the objective's own.

    Raises:
        ConfigError: where it is not a number above 0.
    """
    beta, default = cfg.get("rl_beta"), config.make_objective().beta
    if config.preset:
        default = PRESETS[config.preset]["beta"]
    if beta is None:
        return default
    number = isinstance(beta, (int, float)) and not isinstance(beta, bool)
    if not (number and 0 < beta < math.inf):
        raise ConfigError(f"rl_beta: must be a number above 0, e.g. {default}; got {beta!r}.")
    return beta


def known_keys(*objectives: str) -> list[str]:
    """Return the keys that users may write in the block, with these objectives or with any."""
    engine = [name for name in AMoPOConfig.model_fields if name not in INTERNAL]
    own = [key for name in objectives or OBJECTIVES for key in hyperparameter_names(name)]
    return list(dict.fromkeys([*engine, *own]))


def plain(value: Any) -> Any:
    """Return axolotl's DictDefault as the plain dicts and lists it stands for."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
