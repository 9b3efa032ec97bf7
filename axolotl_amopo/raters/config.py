"""The file of raters: YAML -> `Raters`, or one sentence that says what to write.

dimensions:
  helpfulness: {judge: main, scale: [1, 5]}
  coverage: {function: "my_raters:coverage", scale: [0, 1]}
  quality: {reward_model: NAME_OR_FOLDER, head: 0, scale: [-10, 10]}
  brevity: {formula: words, direction: lower, scale: [0, 200]}
judges:
  main: {url: "http://localhost:8000/v1", model: NAME, key_env: JUDGE_KEY}
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from axolotl_amopo.config.dimensions import Dimension, Scale, check_scale
from axolotl_amopo.config.files import check_yaml, read_yaml
from axolotl_amopo.config.parse import parse_block
from axolotl_amopo.endpoint import Endpoint
from axolotl_amopo.errors import ConfigError, did_you_mean
from axolotl_amopo.raters.base import RatedDimension, Rater
from axolotl_amopo.raters.formulas import FORMULAS, FormulaRater
from axolotl_amopo.raters.function import FunctionRater, find_function
from axolotl_amopo.raters.judge import JudgeRater, Judging
from axolotl_amopo.raters.rating import Raters
from axolotl_amopo.raters.reward_model import RewardModelRater
from axolotl_amopo.raters.rubrics import RUBRICS

KINDS = ("judge", "function", "reward_model", "formula")
# Keys that belong to one kind of rater.
OF_KIND = {
    "rubric": ("judge",),
    "head": ("reward_model",),
    "batch_size": ("reward_model",),
    "reference": ("formula",),
    "language": ("formula",),
}
JUDGE_SCALE = (1.0, 5.0)


class Price(BaseModel):
    """Hold what a million tokens cost, in any currency."""

    model_config = ConfigDict(extra="forbid")

    input: float = Field(ge=0)
    output: float = Field(ge=0)


class JudgeBlock(BaseModel):
    """Describe a judge: a server, a model, and how it is asked."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(pattern=r"^https?://")
    model: str = Field(min_length=1)
    key_env: str | None = Field(default=None, min_length=1)
    concurrency: int = Field(default=8, ge=1)
    retries: int = Field(default=5, ge=0)
    timeout: float = Field(default=600, gt=0)
    draws: int = Field(default=1, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    max_tokens: int = Field(default=16, ge=1)
    top_logprobs: int = Field(default=20, ge=0)
    asks_again: int = Field(default=2, ge=0)
    system_turn: bool = True
    options: dict[str, Any] = {}
    price: Price | None = None


class DimensionBlock(BaseModel):
    """Describe a dimension: one rater, and its scale."""

    model_config = ConfigDict(extra="forbid")

    judge: str | None = None
    function: str | None = None
    reward_model: str | None = None
    formula: Literal["characters", "words", "chrf", "bleu", "rouge_l", "language"] | None = None
    rubric: Annotated[str, Field(min_length=1)] | None = None
    head: int | str | None = None
    batch_size: int | None = Field(default=None, ge=1)
    reference: str | None = None
    language: str | None = None
    scale: Scale | None = None
    direction: Literal["higher", "lower"] = "higher"

    check_scale = field_validator("scale")(check_scale)


class RatersFile(BaseModel):
    """Hold the whole file."""

    model_config = ConfigDict(extra="forbid")

    dimensions: dict[str, dict[str, Any]] = Field(min_length=1)
    judges: dict[str, dict[str, Any]] = {}


def load_raters(path: Path, only: Sequence[str] = ()) -> Raters:
    """Return the raters of a YAML file.

    Args:
        only: the dimensions to rate; all of them where there are none.

    Raises:
        AMoPOError: naming file, key, and what to write.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file.")
    values = read_yaml(path)
    check_yaml(path)
    return make_raters(values, str(path), path.parent.resolve(), only)


def make_raters(values: Any, where: str, folder: Path, only: Sequence[str] = ()) -> Raters:
    """Return the raters of what such a file holds.

    Args:
        where: names it in errors.
        folder: where modules of functions are looked for.

    Raises:
        AMoPOError: naming the key, and what to write.
    """
    file = parse_block(RatersFile, values, where)
    for name in only:
        if name not in file.dimensions:
            raise ConfigError(
                f"{where}, dimensions: no rater covers '{name}'; there are "
                f"{', '.join(file.dimensions)}.{did_you_mean(name, file.dimensions)}"
            )
    judges = {
        name: parse_block(JudgeBlock, block, f"{where}, judges.{name}")
        for name, block in file.judges.items()
    }
    raters: list[Rater] = []
    by_judge: dict[str, list[tuple[RatedDimension, DimensionBlock]]] = {}
    by_model: dict[tuple[str, int], list[tuple[RatedDimension, DimensionBlock]]] = {}
    for name in only or file.dimensions:
        at = f"{where}, dimensions.{name}"
        block = parse_block(DimensionBlock, file.dimensions[name], at)
        dimension = _dimension(name, block, at)
        if block.judge is not None:
            if block.judge not in judges:
                raise ConfigError(
                    f"{at}.judge: there is no judge '{block.judge}' under judges:; "
                    f"{_listed(judges)}.{did_you_mean(block.judge, judges)}"
                )
            if block.rubric is None and name not in RUBRICS:
                raise ConfigError(
                    f"{at}.rubric: is missing; write what a low and a high rating mean. Only "
                    f"{', '.join(RUBRICS)} have one of their own.{did_you_mean(name, RUBRICS)}"
                )
            by_judge.setdefault(block.judge, []).append((dimension, block))
        elif block.reward_model is not None:
            model = (_local(block.reward_model, folder), block.batch_size or 8)
            by_model.setdefault(model, []).append((dimension, block))
        elif block.function is not None:
            function, code = find_function(block.function, folder, f"{at}.function")
            raters.append(FunctionRater(dimension, block.function, function, code))
        else:
            needs = FORMULAS[str(block.formula)].needs
            argument = getattr(block, needs) if needs else None
            raters.append(FormulaRater(dimension, str(block.formula), argument))
    # What costs nothing comes first: if it fails, nothing is paid.
    for (model, batch_size), members in by_model.items():
        heads = {one.name: block.head for one, block in members}
        raters.append(RewardModelRater(model, [one for one, _ in members], heads, batch_size))
    for name, members in by_judge.items():
        rubrics = {one.name: block.rubric for one, block in members}
        dimensions = [one for one, _ in members]
        raters.append(_judge(judges[name], dimensions, rubrics))
    return Raters(raters, only or list(file.dimensions))


def _dimension(name: str, block: DimensionBlock, at: str) -> RatedDimension:
    """Return the dimension, of a block that has one rater and what belongs to it."""
    parse_block(Dimension, {"name": name}, at)  # the same names as in training
    given = [kind for kind in KINDS if getattr(block, kind) is not None]
    if len(given) != 1:
        has = f"has {' and '.join(given)}" if given else "no rater covers it"
        raise ConfigError(f"{at}: {has}; write one of {', '.join(KINDS)}.")
    for key, kinds in OF_KIND.items():
        if getattr(block, key) is not None and given[0] not in kinds:
            raise ConfigError(
                f"{at}.{key}: is for {kinds[0]}, and this is a {given[0]}; remove it."
            )
    scale = block.scale
    if block.formula:
        formula = FORMULAS[block.formula]
        for key in ("reference", "language"):
            if (getattr(block, key) is not None) != (formula.needs == key):
                what = "is missing" if formula.needs == key else "has no effect; remove it"
                raise ConfigError(f"{at}.{key}: {what} with formula: {block.formula}.")
        scale = scale or formula.scale
    elif block.judge:
        scale = scale or JUDGE_SCALE
    if scale is None:
        raise ConfigError(f"{at}.scale: is missing; write [lowest, highest], e.g. scale: [0, 1].")
    return RatedDimension(name, scale, block.direction)


def _judge(
    block: JudgeBlock, dimensions: list[RatedDimension], rubrics: dict[str, str | None]
) -> JudgeRater:
    endpoint = Endpoint(
        block.url,
        block.model,
        key_env=block.key_env,
        concurrency=block.concurrency,
        retries=block.retries,
        timeout=block.timeout,
    )
    temperature = block.temperature
    if temperature is None:
        temperature = 1.0 if block.draws > 1 else 0.0
    judging = Judging(
        draws=block.draws,
        temperature=temperature,
        max_tokens=block.max_tokens,
        top_logprobs=block.top_logprobs,
        retries=block.asks_again,
        options=block.options,
        price=block.price and (block.price.input, block.price.output),
        system=block.system_turn,
    )
    return JudgeRater(endpoint, dimensions, rubrics, judging)


def _local(model: str, folder: Path) -> str:
    """Return a model's folder, looked for beside the YAML too; a hub's name as it is."""
    beside = folder / model
    return str(beside) if not Path(model).exists() and beside.is_dir() else model


def _listed(names: Any) -> str:
    return f"there are {', '.join(names)}" if names else "there are none"
