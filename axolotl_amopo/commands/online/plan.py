"""ONLINE.yml -> what every round does, in plain values: no axolotl, no data, no model.

    config: config.yml            # axolotl's: model, adapter, objective, ...; no datasets
    raters: raters.yml
    prompts: prompts.jsonl
    held_out: held_out.jsonl      # for the measurement after each round
    output: online
    rounds: 3
    prompts_per_round: 64

Paths are seen from the folder in which the command runs.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.config.files import check_yaml, read_yaml
from axolotl_amopo.config.parse import parse_block
from axolotl_amopo.errors import AMoPOError, ConfigError
from axolotl_amopo.raters.base import RatedDimension
from axolotl_amopo.steering.asks import asks_of
from axolotl_amopo.steering.steering import Steering, Weights, written

# Set by the rounds themselves.
SET_HERE = {
    "datasets": "each round trains on what it has rated",
    "test_datasets": "each round is measured on held_out",
    "val_set_size": "each round is measured on held_out",
    "output_dir": "each round has its own",
    "dataset_prepared_path": "each round has its own",
    "lora_model_dir": "each round goes on with the adapter of the one before",
    "resume_from_checkpoint": "the command goes on by itself",
    "auto_resume_from_checkpoints": "the command goes on by itself",
    "hub_model_id": "every round would be uploaded under that name",
}
RATED = "rated.jsonl"
# So many vectors of weights are drawn per round, unless told otherwise.
DRAWS = 8


class Measurement(BaseModel):
    """Say how the model is measured after each round, as `axolotl amopo steer` does."""

    model_config = ConfigDict(extra="forbid")

    limit: int | None = Field(default=None, ge=2)
    points: int = Field(default=3, ge=2)
    only: Literal["sweep", "front"] | None = None
    samples: int = Field(default=1, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    max_new_tokens: int = Field(default=256, ge=1)

    @model_validator(mode="after")
    def check_samples(self) -> Self:
        """Return it.

        Raises:
            ValueError: for several answers per prompt that would be equal.
        """
        if self.samples > 1 and not self.temperature:
            raise ValueError("samples above 1 go with a temperature, or they are all alike")
        return self


class OnlineFile(BaseModel):
    """Hold what stands in ONLINE.yml."""

    model_config = ConfigDict(extra="forbid")

    config: str
    raters: str
    prompts: str
    held_out: str | None = None
    output: str
    rounds: int = Field(ge=1)
    prompts_per_round: int = Field(ge=1)
    responses: int = Field(default=4, ge=2)
    ask: Literal["weights", "spread", "nothing"] = "spread"
    draws: int = Field(default=DRAWS, ge=1)
    temperatures: list[float] = Field(default=[0.7, 1.0], min_length=1)
    max_new_tokens: int = Field(default=256, ge=1)
    batch_size: int = Field(default=8, ge=1)
    backend: Literal["auto", "transformers", "vllm"] = "auto"
    train_on: Literal["round", "all"] = "round"
    train_options: list[str] = []
    measure: Measurement = Measurement()
    seed: int = 0

    @field_validator("temperatures")
    @classmethod
    def check_temperatures(cls, values: list[float]) -> list[float]:
        """Return them.

        Raises:
            ValueError: for one at which all responses would be alike.
        """
        if min(values) <= 0:
            raise ValueError("must be above 0, or the responses to a prompt are all alike")
        return values


@dataclass(frozen=True)
class Online:
    """Hold a whole plan."""

    path: Path
    file: OnlineFile
    base: dict[str, Any]  # the config of every round, but for what the rounds set
    block: AMoPOConfig
    steering: Steering

    @property
    def output(self) -> Path:
        return Path(self.file.output)

    def folder(self, number: int) -> Path:
        """Return the folder of a round, counted from 1."""
        return self.output / f"round-{number}"

    def model(self, number: int) -> Path:
        """Return the folder of the model that a round trains."""
        return self.output / "models" / f"round-{number}"

    @property
    def takes_reference(self) -> bool:
        """Return whether a round after the first needs another model's log-probabilities."""
        return bool(self.block.references)


def read_online(path: Path, dimensions: list[RatedDimension] | None = None) -> Online:
    """Return the plan of a file.

    Args:
        dimensions: of the raters; None reads them from the raters' file.

    Raises:
        AMoPOError: naming file, key, and what to write.
    """
    file = parse_block(OnlineFile, read_yaml(path), str(path))
    check_yaml(path)
    for key in ("config", "raters", "prompts", "held_out"):
        named = getattr(file, key)
        if named is not None and not Path(named).is_file():
            raise ConfigError(f"{path}, {key}: there is no file {named}.")
    if dimensions is None:
        from axolotl_amopo.raters.config import load_raters

        dimensions = load_raters(Path(file.raters)).dimensions
    config = Path(file.config)
    base = read_yaml(config)
    check_yaml(config)
    if not isinstance(base, dict) or base.get("rl") != "amopo":
        raise ConfigError(f"{config}: has no `rl: amopo`.")
    for key, why in SET_HERE.items():
        if base.get(key):
            raise ConfigError(f"{config}, {key}: remove it; {why}.")
    if not base.get("base_model"):
        raise ConfigError(f"{config}, base_model: is missing.")
    block = base.get("amopo") or {}
    if isinstance(block, dict) and (given := block.get("dimensions")):
        listed = [given] if isinstance(given, str) else given
        if isinstance(listed, list):  # else it is refused below
            block = block | {"dimensions": [_with_scale(one, dimensions, config) for one in listed]}
    parsed = parse_block(AMoPOConfig, block, f"{config}, amopo")
    if "initial" in parsed.references and len(parsed.references) > 1:
        raise ConfigError(
            f"{config}, amopo.reference: a list of models does not go with rounds, of which each "
            "would find another initial one; name one model, or an objective with one reference."
        )
    steering = Steering.from_config(
        parsed,
        {one["name"]: one["scale"] for one in block["dimensions"]},
        {one["name"] for one in block["dimensions"] if one["direction"] == "lower"},
        base.get("chat_template_kwargs"),
        base.get("eot_tokens"),
    )
    if file.ask == "weights" and not (steering.takes_weights and parsed.has_instructions):
        raise ConfigError(
            f"{path}, ask: this objective's prompts take no weights; write ask: spread, or take "
            "objective: cos_dpo."
        )
    if file.held_out:  # what can't be measured is said before anything is trained
        names = [dimension.name for dimension in steering.dimensions]
        try:
            asks_of(steering, names, file.measure.points, file.measure.only)
        except AMoPOError as error:
            raise ConfigError(f"{path}, measure: {error}") from None
    return Online(path, file, base | {"amopo": block}, parsed, steering)


def _with_scale(given: Any, dimensions: list[RatedDimension], config: Path) -> dict[str, Any]:
    """Return a dimension of the config with the scale and direction of its rater.

    Raises:
        ConfigError: for one that no rater covers, or that is rated otherwise.
    """
    made = dict(given) if isinstance(given, dict) else {"name": given}
    rater = next((one for one in dimensions if one.name == made.get("name")), None)
    where = f"{config}, amopo.dimensions"
    if rater is None:
        raise ConfigError(
            f"{where}: no rater covers {made.get('name')!r}; there are "
            f"{', '.join(one.name for one in dimensions)}."
        )
    for key, own in (("scale", list(rater.scale)), ("direction", rater.direction)):
        value = made.setdefault(key, own)
        if value != own:
            raise ConfigError(
                f"{where}, {rater.name}.{key}: is {value}, and its rater's is {own}; remove it."
            )
    return made


def round_config(plan: Online, number: int) -> dict[str, Any]:
    """Return axolotl's config of a round, counted from 1.

    The first one trains the config's own model. Each later one goes on with the adapter, or the
    model, of the one before, and compares with what the first one began with.
    """
    folder, before = plan.folder(number), plan.model(number - 1)
    first = 1 if plan.file.train_on == "all" else number
    values = plan.base | {
        "datasets": [
            {"path": str(plan.folder(k) / RATED), "split": "train", "type": "amopo.rated"}
            for k in range(first, number + 1)
        ],
        "val_set_size": 0,
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(plan.model(number)),
        "auto_resume_from_checkpoints": True,
    }
    if number > 1:
        values |= {"lora_model_dir" if plan.base.get("adapter") else "base_model": str(before)}
        if plan.block.references == ["initial"]:
            # Else each round would stray from the one before, and nothing would hold them.
            values["amopo"] = values["amopo"] | {"reference": plan.base["base_model"]}
    return values


def drawn_rows(plan: Online, rows: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Return the prompts of a round: all are used before one comes again.

    Raises:
        ConfigError: for more prompts per round than there are.
    """
    count = plan.file.prompts_per_round
    if count > len(rows):
        raise ConfigError(
            f"{plan.path}, prompts_per_round: {count} is more than the {len(rows)} of "
            f"{plan.file.prompts}."
        )
    order: list[int] = []
    for time in range(number * count // len(rows) + 1):
        again = list(range(len(rows)))
        random.Random(f"{plan.file.seed}/{time}").shuffle(again)
        # Those that the round has already come last, so that none is in it twice.
        open_round = set(order[len(order) // count * count :])
        order += sorted(again, key=lambda i: i in open_round)
    return [rows[i] for i in order[(number - 1) * count : number * count]]


def spread(plan: Online, number: int) -> list[str]:
    """Return the settings under which a round's responses are drawn, as `--spread` takes them.

    Empty where `generate` is to choose. Weights are drawn from the flat Dirichlet distribution and
    rounded to tenths, as prompts state them.
    """
    if plan.file.ask == "nothing":
        return ["none"]
    if plan.file.ask == "spread":
        return []
    names = [dimension.name for dimension in plan.steering.dimensions]
    draws = random.Random(f"weights/{plan.file.seed}/{number}")
    made = []
    for _ in range(plan.file.draws):
        parts = [draws.gammavariate(1.0, 1.0) for _ in names]
        shares = [round(part / sum(parts), 1) for part in parts]
        made.append(written(Weights(zip(names, shares, strict=True))))
    return made
