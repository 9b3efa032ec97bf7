"""What a trained model can be asked for, and how it was asked in training.

`amopo_steering.json` in a model's folder holds it, so that the folder steers without its YAML:

    {"version": 1, "prompts": ["overall", "helpfulness", "honesty"],
     "dimensions": [{"name": "helpfulness", "description": null, "scale": [1, 5],
                     "direction": "higher"}, ...],
     "instruction": "...", "overall_instruction": "...", "instruction_place": "before",
     "rating_in_prompt": "chosen", "rating_levels": null, "chat_template_kwargs": {},
     "eot_tokens": []}

Settings name dimensions and the ratings to aim for, which are the data's own: of a dimension whose
lower ratings are better, 1 may be the best. One dimension is asked for by its own instruction,
several by the overall one, with those alone in it; `overall` stands for all of them. A dimension
without a rating is asked for at its best. Where training rounded the ratings in its prompts
(`rating_levels`), so does steering. A model that was trained with one prompt, which names all the
dimensions (`prompts: one`), is asked for all of them, those that are not named at their best. Where
the prompt stated weights instead of ratings (COS-DPO), numbers are weights from 0 to 1, and
dimensions that are not named share what is left.

A model whose prompts ask for ratings of all dimensions at once takes weights as well (`Weights`).
They become ratings as in RiC (Yang et al., ICML 2024, https://arxiv.org/abs/2402.10207, section
3.3): weight / |weights| of the way from a dimension's worst rating to its best.
"""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from axolotl_amopo.config import instructions
from axolotl_amopo.data.prompts import Place, instructed
from axolotl_amopo.data.rows import Message
from axolotl_amopo.errors import AMoPOError, did_you_mean

if TYPE_CHECKING:  # takes half a minute to import
    from axolotl_amopo.config.block import AMoPOConfig

FILE = "amopo_steering.json"
VERSION = 1
OVERALL = "overall"  # as in `args`
# A sweep over a scale that isn't so many whole numbers takes so many steps.
MOST_STEPS = 10
WEIGHTS_TO_TRY = [step / 10 for step in range(11)]
# What a line of settings begins with where they are weights.
BY_WEIGHT = "weights "

Settings = Mapping[str, float | None]


class Weights(dict[str, float | None]):
    """Settings whose numbers say how much a dimension counts, whatever the prompts ask for."""


class SteeredDimension(BaseModel):
    """A dimension as training had it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str | None = None
    scale: tuple[float, float]
    direction: Literal["higher", "lower"] = "higher"

    @property
    def best(self) -> float:
        return self.scale[0 if self.direction == "lower" else 1]

    def ratings(self, levels: int | None = None) -> list[float]:
        """The ratings to try, one after the other: whole steps, or ten of a longer scale.

        Args:
            levels: how many evenly spaced ratings training had in its prompts, if it rounded them.
        """
        low, high = self.scale
        whole = high - low == int(high - low) <= MOST_STEPS
        steps = levels - 1 if levels else int(high - low) if whole else MOST_STEPS
        return [round(low + (high - low) * i / steps, 6) for i in range(steps + 1)]


class Steering(BaseModel):
    """How a model was asked for ratings in training."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    version: Literal[1] = VERSION
    prompts: list[str]
    dimensions: list[SteeredDimension] = Field(min_length=1)
    template: str = Field(alias="instruction")
    overall_template: str = Field(alias="overall_instruction")
    instruction_place: Place = "before"
    rating_in_prompt: Literal["chosen", "own", "none", "target"] = "chosen"
    one_prompt: bool = False  # whether every prompt of training named all the dimensions
    weighted: bool = False  # whether it stated weights of them
    rating_levels: int | None = Field(default=None, ge=2)
    chat_template_kwargs: dict[str, Any] = {}
    eot_tokens: list[str] = []

    @classmethod
    def from_config(
        cls,
        config: "AMoPOConfig",
        scales: Mapping[str, Sequence[float]],
        lower: Set[str] = frozenset(),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        eot_tokens: Iterable[str] | None = None,
    ) -> Self:
        """The steering of what a config trains.

        Args:
            scales: every dimension's lowest and highest rating, as in the instructions.
            lower: the dimensions whose lower ratings are better.
            chat_template_kwargs: axolotl's key, if the run has it.
            eot_tokens: the same.
        """
        given = (config.instruction, config.overall_instruction)
        default = instructions.DEFAULT_OVERALL_INSTRUCTION
        if config.draws_weights:
            default = instructions.DEFAULT_WEIGHTS_INSTRUCTION
        usual = (instructions.DEFAULT_INSTRUCTION, default)
        own, overall = (u if g is None else g for g, u in zip(given, usual, strict=True))
        return cls(
            prompts=config.criteria,
            dimensions=[
                SteeredDimension(
                    name=dimension.name,
                    description=dimension.description,
                    scale=tuple(scales[dimension.name]),
                    direction="lower" if dimension.name in lower else "higher",
                )
                for dimension in config.dimensions
            ],
            template=own,
            overall_template=overall,
            instruction_place=config.instruction_place,
            rating_in_prompt=config.rating_in_prompt,
            one_prompt=config.prompts == "one",
            weighted=config.draws_weights,
            rating_levels=config.rating_levels,
            chat_template_kwargs=dict(chat_template_kwargs or {}),
            eot_tokens=list(eot_tokens or []),
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [dimension.name for dimension in self.dimensions]
        if self.prompts not in (names, [OVERALL, *names]):
            raise ValueError("prompts must be the dimensions' names, after 'overall' or without")
        if not all(low < high for low, high in (d.scale for d in self.dimensions)):
            raise ValueError("a scale must be [lowest, highest]")
        try:
            self.instruction({names[0]: None})
            self.instruction({OVERALL: None} if self.overall else {names[0]: None})
        except Exception as error:  # a filter may raise whatever Python does
            raise ValueError(
                f"an instruction is not a Jinja template that works: {error}"
            ) from None
        return self

    def save(self, folder: Path | str) -> Path:
        """Write `amopo_steering.json` into a model's folder."""
        path = Path(folder) / FILE
        path.write_text(self.model_dump_json(by_alias=True, indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read a folder's `amopo_steering.json`.

        Raises:
            AMoPOError: where it is missing, of another version, or broken.
        """
        path = Path(folder) / FILE
        instead = "name the YAML that it was trained with in the folder's place"
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise AMoPOError(
                f"{folder}: has no {FILE}, which says what the model can be asked for; {instead}, "
                "or copy the file from the folder that training wrote."
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise AMoPOError(f"{path}: can't be read ({error}); {instead}.") from None
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            detail = error.errors()[0]
        key = ".".join(map(str, detail["loc"]))
        if key == "version":
            raise AMoPOError(
                f"{path}: is of version {detail['input']!r}, and this package reads {VERSION}; "
                f"use the package that trained the model, or {instead}."
            )
        raise AMoPOError(
            f"{path}: is broken{f' at {key!r}' if key else ''} ({detail['msg']}); {instead}."
        )

    @property
    def overall(self) -> bool:
        """Whether training had the overall prompt."""
        return len(self.prompts) > len(self.dimensions)

    @property
    def takes_numbers(self) -> bool:
        """Return whether a dimension can be asked for by a rating or a weight."""
        return self.weighted or self.rating_in_prompt != "none"

    @property
    def takes_weights(self) -> bool:
        """Return whether weights can say what to ask for."""
        return self.weighted or (self.takes_numbers and (self.overall or self.one_prompt))

    def best(self, dimension: SteeredDimension) -> float:
        """Return the number of a dimension that is named without one: all the weight, or the best
        rating."""
        return 1.0 if self.weighted else dimension.best

    def range(self, dimension: SteeredDimension) -> tuple[float, float]:
        """The lowest and highest number to ask for."""
        return (0.0, 1.0) if self.weighted else dimension.scale

    def tries(self, dimension: SteeredDimension) -> list[float]:
        """The numbers to try, one after the other."""
        return WEIGHTS_TO_TRY if self.weighted else dimension.ratings(self.rating_levels)

    def dimension(self, name: str) -> SteeredDimension:
        """A dimension by its name.

        Raises:
            AMoPOError: where there is none of that name.
        """
        for dimension in self.dimensions:
            if dimension.name == name:
                return dimension
        raise AMoPOError(
            f"the model knows no dimension '{name}'.{did_you_mean(name, self.prompts)} "
            f"It was trained on {', '.join(self.prompts)}."
        )

    def everything(self) -> Settings:
        """Return the settings that ask for as many dimensions at their best as a prompt can name.

        That is all of them, or the first one where training had a prompt per dimension alone.
        """
        if self.overall:
            return {OVERALL: None}
        every = self.weighted or self.one_prompt
        return {d.name: None for d in self.dimensions[: None if every else 1]}

    def asked(self, settings: Settings) -> list[instructions.Asked]:
        """What the instruction is to name, in the order of training.

        Raises:
            AMoPOError: for a dimension or a rating that training can't have had.
        """
        if self.weighted:
            weights = self.weights(settings) if settings else {}
            return [
                (d.name, d.description, d.scale, None, weights[d.name])
                for d in self.dimensions
                if weights
            ]
        if settings and isinstance(settings, Weights):
            settings = self.ratings(settings)
        named = self.overall and OVERALL in settings
        for name, rating in settings.items():
            if named and name == OVERALL:
                if rating is not None:
                    raise AMoPOError("overall takes no rating; name a dimension, or overall alone.")
                continue
            low, high = self.dimension(name).scale
            if rating is not None and not low <= rating <= high:
                raise AMoPOError(
                    f"{name}: {rating:g} is outside the scale that the model was trained with, "
                    f"{low:g} to {high:g}."
                )
            if rating is not None and not self.takes_numbers:
                raise AMoPOError(
                    f"{name}: the model was trained without ratings in its prompts "
                    f"(rating_in_prompt: none); ask for {name} alone."
                )
        if len(settings) > 1 and not (self.overall or self.one_prompt):
            raise AMoPOError(
                "the model was trained without the overall prompt (amopo.overall: false), so it "
                "can be asked for one dimension at a time."
            )
        every = named or (self.one_prompt and bool(settings))
        asked: list[instructions.Asked] = []
        for d in self.dimensions:
            if every or d.name in settings:
                rating = settings.get(d.name)
                if rating is None and self.rating_in_prompt != "none":
                    rating = d.best
                if rating is not None and self.rating_levels:
                    rating = instructions.nearest_level(rating, d.scale, self.rating_levels)
                asked.append((d.name, d.description, d.scale, rating))
        return asked

    def weights(self, settings: Settings) -> dict[str, float]:
        """The weights that a prompt states, which sum to 1.

        Dimensions that are not named share what is left of 1; one that is named without a weight
        has 1.

        Raises:
            AMoPOError: for a dimension that training did not have, what is no weight, or weights
                that are all 0.
        """
        for name, value in settings.items():
            self.dimension(name)
            if value is not None and not 0 <= value <= 1:
                raise AMoPOError(f"{name}: {value:g} is no weight; write a number from 0 to 1.")
        given = {name: 1.0 if value is None else value for name, value in settings.items()}
        others = [d.name for d in self.dimensions if d.name not in given]
        left = max(0.0, 1.0 - sum(given.values())) / max(1, len(others))
        weights = {d.name: given.get(d.name, left) for d in self.dimensions}
        total = sum(weights.values())
        if total <= 0:
            raise AMoPOError("the weights are all 0; give a dimension one.")
        return {name: weight / total for name, weight in weights.items()}

    def ratings(self, weights: Weights) -> dict[str, float | None]:
        """Return the ratings of all dimensions to ask for by weights, see the head of this file.

        Raises:
            AMoPOError: as `weights`, and where no prompt of training asked for all ratings at once.
        """
        if not self.takes_weights:
            why = "ratings in its prompts (rating_in_prompt: none)"
            if self.takes_numbers:
                why = "a prompt that asks for all dimensions at once (amopo.overall: false)"
            raise AMoPOError(
                f"weights: the model was trained without {why}, so they can't become ratings to "
                "ask for."
            )
        from axolotl_amopo.objectives.ric import targets  # imports torch

        shares = self.weights(weights)
        best = [self.best(d) for d in self.dimensions]
        worst = [sum(d.scale) - d.best for d in self.dimensions]
        asked = targets(list(shares.values()), worst, best)
        ratings = {name: round(rating, 6) for name, rating in zip(shares, asked, strict=True)}
        return ({OVERALL: None} if self.overall else {}) | ratings

    def instruction(self, settings: Settings) -> str:
        """The instruction's text, empty without settings; see `asked` for errors."""
        if settings and isinstance(settings, Weights) and not self.weighted:
            settings = self.ratings(settings)
        asked = self.asked(settings)
        if not asked:
            return ""
        if len(asked) > 1 or self.one_prompt or (self.overall and OVERALL in settings):
            return instructions.overall_instruction(self.overall_template, tuple(asked))
        return instructions.instruction(self.template, asked[0])

    def messages(self, messages: list[Message], settings: Settings) -> list[Message]:
        """A conversation with the instruction where training put it."""
        return instructed(messages, self.instruction(settings), self.instruction_place)


def parse_settings(texts: Iterable[str]) -> dict[str, float | None]:
    """Settings from `helpfulness=4`, `honesty` and `overall`.

    Raises:
        AMoPOError: for what is no number, or named twice.
    """
    settings: dict[str, float | None] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        try:
            rating = float(value) if equals else None
        except ValueError:
            rating = math.nan
        if not name or (rating is not None and not math.isfinite(rating)):
            raise AMoPOError(f"'{text}': write a dimension and a rating, e.g. helpfulness=4.")
        if name in settings:
            raise AMoPOError(f"'{text}': {name} is named twice.")
        settings[name] = rating
    return settings


def read_settings(line: str) -> Settings:
    """Return the settings of a line as `written` writes it.

    >>> read_settings("weights helpfulness=0.7, honesty=0.3")
    {'helpfulness': 0.7, 'honesty': 0.3}

    Raises:
        AMoPOError: for what is no number, or named twice.
    """
    line = line.strip()
    if line == "none":
        return {}
    settings = parse_settings(line.removeprefix(BY_WEIGHT).split(","))
    return Weights(settings) if line.startswith(BY_WEIGHT) else settings


def written(settings: Settings) -> str:
    """Settings as people write them: `helpfulness=4, honesty`, or `weights helpfulness=0.7`.

    `none` where there are none.
    """
    parts = (
        name if rating is None else f"{name}={instructions.number(rating)}"
        for name, rating in settings.items()
    )
    line = ", ".join(parts)
    return (BY_WEIGHT if line and isinstance(settings, Weights) else "") + (line or "none")
