"""compare.yml -> the runs that it asks for, with the config of each.

    base: config.yml              # or a config itself
    variants:
      amopo: {}
      dpo: {amopo.objective: dpo}
      axolotl-dpo: {rl: dpo, rl_beta: 0.1}
    baseline: amopo
    folds: 5                      # or seeds: [1, 2, 3] with test_datasets in the base
    output: comparison

Everything here is plain values: no axolotl, no data, no model.
"""

import copy
import functools
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from axolotl_amopo.config.before_launch import option_keys
from axolotl_amopo.config.block import AMoPOConfig, plain
from axolotl_amopo.config.files import check_yaml, digest, local_files, read_yaml
from axolotl_amopo.config.parse import parse_block
from axolotl_amopo.config.samples import COUNT, SAMPLING, SWITCH
from axolotl_amopo.errors import ConfigError, did_you_mean

# axolotl's own methods that train on pairs with one winner.
AXOLOTLS = ("dpo", "ipo", "simpo")
# A plugin that records what a run cost, named in every run's config.
RECORDER = "axolotl_amopo.commands.compare.recorder.RecorderPlugin"

# How held-out pairs are made, for all runs alike.
PAIRING = (
    "dimensions",
    "overall",
    "winner",
    "pairs",
    "order_by",
    "min_gap",
    "missing_ratings",
    "bad_rows",
)
# How a model is asked, which each run's own training says.
PROMPTING = (
    "instruction",
    "overall_instruction",
    "instruction_place",
    "rating_in_prompt",
    "rating_levels",
    "prompts",
)
# Set by the comparison itself.
SET_HERE = (
    "output_dir",
    "seed",
    "datasets",
    "test_datasets",
    "val_set_size",
    "dataset_prepared_path",
)
# These would choose a model by the held-out pairs, or publish every run under one name.
REFUSED = {
    "load_best_model_at_end": "it would choose a checkpoint by the held-out pairs",
    "early_stopping_patience": "it would choose the last step by the held-out pairs",
    "hub_model_id": "every run would be uploaded under that name",
    "resume_from_checkpoint": "every run begins at the base model",
    "auto_resume_from_checkpoints": "every run begins at the base model",
}
# Held-out pairs are scored once, after training.
EVALUATION = (
    "test_datasets",
    "eval_steps",
    "evals_per_epoch",
    "eval_strategy",
    "eval_batch_size",
    SWITCH,
    COUNT,
    *SAMPLING,
)

# What is measured beside each rating.
OVERALL = "overall"
MEAN, WORST, CONFLICT, LENGTH = "mean", "worst", "conflicting", "length-controlled"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]


class Folds(BaseModel):
    """Split the prompts of `datasets:` into held-out parts of equal size."""

    model_config = ConfigDict(extra="forbid")

    count: int = Field(ge=2)
    heldout: int | None = Field(default=None, ge=1)
    train: int | None = Field(default=None, ge=1)
    seed: int = 0


class Measure(BaseModel):
    """Say how every run is scored."""

    model_config = ConfigDict(extra="forbid")

    limit: int | None = Field(default=None, ge=1)
    prompts: Literal["both", "own", "plain"] = "both"
    reward: Literal["average", "sum", "reference"] = "average"
    batch_pairs: int = Field(default=2, ge=1)
    seed: int = 0
    untuned: bool = True
    # Of PAIRING: how held-out pairs are made, where it is not as the base trains.
    pairs: Any = None
    winner: Literal["overall", "per_dimension"] | None = None
    order_by: str | None = None
    min_gap: float | None = None


class CompareFile(BaseModel):
    """Hold what stands in compare.yml."""

    model_config = ConfigDict(extra="forbid")

    base: str | dict[str, Any]
    variants: dict[Name, dict[str, Any] | None] = Field(min_length=1)
    existing: dict[Name, str] = {}
    baseline: str
    seeds: list[int] = []
    folds: Folds | None = None
    measure: Measure = Measure()
    comparisons: list[str] = Field(default=[MEAN], min_length=1)
    output: str

    @field_validator("folds", mode="before")
    @classmethod
    def count_to_folds(cls, value: Any) -> Any:
        return {"count": value} if isinstance(value, int) else value


@dataclass(frozen=True)
class Variant:
    """Hold a variant: its changed keys, and the base with them."""

    name: str
    changes: dict[str, Any]
    values: dict[str, Any]

    @property
    def is_axolotls(self) -> bool:
        """Return whether axolotl's own trainer trains it."""
        return self.values["rl"] != "amopo"


@dataclass(frozen=True)
class Run:
    """Name one run: of a variant with a seed and a fold, or of a model that exists."""

    name: str
    fold: int | None
    seed: int | None
    variant: Variant | None = None
    model: str | None = None  # of a model that exists

    @property
    def label(self) -> str:
        """Return the run's name for people, which is also its folder."""
        parts = [f"{key}-{at}" for key, at in (("fold", self.fold), ("seed", self.seed))]
        parts = [part for part in parts if not part.endswith("None")]
        return "/".join([self.name, "-".join(parts) or "all"])


@dataclass(frozen=True)
class Comparison:
    """Hold a checked compare.yml."""

    path: str
    base: dict[str, Any]
    variants: list[Variant]
    existing: dict[str, str]
    baseline: str
    seeds: list[int]
    folds: Folds | None
    measure: Measure
    comparisons: list[str]
    output: Path
    notes: list[str] = field(default_factory=list)

    def runs(self) -> list[Run]:
        """Return all runs, fold by fold and seed by seed, so that an early stop compares some."""
        folds = range(1, self.folds.count + 1) if self.folds else [None]
        models = dict(self.existing)
        if self.measure.untuned:
            models = {"untuned": str(self.base["base_model"])} | models
        made = []
        for fold in folds:
            made += [Run(name, fold, None, model=path) for name, path in models.items()]
            for seed in self.seeds:
                made += [Run(v.name, fold, seed, variant=v) for v in self.variants]
        return made

    def names(self) -> list[str]:
        """Return the names of what is compared, the baseline first."""
        names = list(dict.fromkeys(run.name for run in self.runs()))
        return sorted(names, key=lambda name: name != self.baseline)

    def folder(self, run: Run) -> Path:
        """Return a run's folder."""
        return self.output / "runs" / run.label

    def training(self, run: Run, folder: Path) -> dict[str, Any]:
        """Return the config of a run's training, into a folder.

        Of axolotl's own methods it lacks the data, see `pairing`.
        """
        values = without_evaluation(run.variant.values)
        values |= self._places(run, folder / "model")
        values["plugins"] = [*(values.get("plugins") or []), RECORDER]
        if run.variant.is_axolotls:
            values.pop("amopo", None)
            values.pop("datasets", None)
        else:
            values["datasets"] = self.entries(run, "train")
        return values

    def pairing(self, run: Run, folder: Path) -> dict[str, Any]:
        """Return the config whose pairs one of axolotl's own methods trains on."""
        of_variant = run.variant.values
        values = without_evaluation(self.base) | {
            key: of_variant[key]
            for key in ("base_model", "sequence_len", "chat_template", "excess_length_strategy")
            if key in of_variant
        }
        values |= self._places(run, folder / "pairing")
        block = pick(read(of_variant.get("amopo"), run.name), PAIRING)
        block |= {"overall": True, "winner": "overall", "objective": "simpo"}
        block |= dict.fromkeys(("instruction", "overall_instruction"), "")
        return values | {"amopo": block, "datasets": self.entries(run, "train")}

    def scoring(self, run: Run, folder: Path) -> dict[str, Any]:
        """Return the config by which a run is scored.

        The pairs are the same for all runs; the prompts "own" are those that the run was trained
        with, which AMoPO takes whatever they are; the reward is the plain mean log-probability.
        """
        of_run = run.variant.values if run.variant else self.base
        values = without_evaluation(self.base)
        for key in ("base_model", "sequence_len", "chat_template"):
            if key in of_run:
                values[key] = of_run[key]
        block = self._measured()
        if run.variant and run.variant.is_axolotls:
            block |= {"instruction": "", "overall_instruction": "", "objective": "simpo"}
        else:
            trained = read(of_run.get("amopo"), run.name)
            if trained.draws_weights:  # which prompts state: only its own objective has those
                own = {"overall": False, "rating_in_prompt": "none", "prompts": "one"}
                block = plain(of_run["amopo"]) | block | own
            else:
                # Not SimPO, whose default is to have no instruction.
                block |= pick(trained, PROMPTING) | {"objective": "amopo"}
                if block["rating_in_prompt"] == "target":
                    block["rating_in_prompt"] = "chosen"
        values |= self._places(run, folder / "scoring") | {"seed": self.base.get("seed", 42)}
        values |= {"rl_beta": 1.0, "amopo": block, "datasets": self.entries(run, "train")}
        return values | {"test_datasets": self.entries(run, "heldout")}

    def _measured(self) -> dict[str, Any]:
        block = pick(read(self.base["amopo"], "base"), PAIRING)
        given = self.measure.model_dump(include=set(PAIRING), exclude_none=True)
        if block["winner"] == "nearest":
            block["winner"] = "overall"
        return block | given

    def _places(self, run: Run, folder: Path) -> dict[str, Any]:
        return {
            "output_dir": str(folder),
            "dataset_prepared_path": str(self.output / "prepared"),
            "val_set_size": 0,
            "seed": run.seed if run.seed is not None else self.base.get("seed", 42),
        }

    def entries(self, run: Run, part: Literal["train", "heldout"]) -> list[dict[str, Any]]:
        """Return the `datasets:` entries of a run's training or held-out rows."""
        if run.fold is None:
            entries = self.base["datasets" if part == "train" else "test_datasets"]
            return copy.deepcopy(entries)
        return [
            fold_entry(entry, fold_file(self.output, run.fold, part, number))
            for number, entry in enumerate(self.base["datasets"])
        ]

    def config_digest(self, run: Run) -> str:
        """Return a hash of the configs that decide a run's numbers, where they lie left out."""
        facts: list[Any] = [self.measure.model_dump(), self.scoring(run, Path())]
        if run.variant:
            facts.append(self.training(run, Path()))
            if run.variant.is_axolotls:
                facts.append(self.pairing(run, Path()))
        else:
            facts.append(run.model)
        text = json.dumps(facts, sort_keys=True, default=str).replace(str(self.output), "")
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def run_digest(self, run: Run) -> str:
        """Return a hash of a run's configs and of the local files with its data."""
        files = [
            _digest(path, path.stat().st_mtime_ns)
            for part in ("train", "heldout")
            for entry in self.entries(run, part)
            for path in local_files(entry)
        ]
        text = " ".join([self.config_digest(run), *files])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@functools.lru_cache
def _digest(path: Path, modified: int) -> str:
    return digest(path)


def read(block: Any, name: str) -> AMoPOConfig:
    """Return an `amopo:` block, resolved.

    Raises:
        ConfigError: naming the variant and the key.
    """
    try:
        return parse_block(AMoPOConfig, plain(block), "amopo")
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def pick(block: AMoPOConfig, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return those keys of a block that have a value."""
    return block.model_dump(mode="json", include=set(keys), exclude_none=True)


def without_evaluation(values: dict[str, Any]) -> dict[str, Any]:
    """Return a config that trains without evaluating."""
    values = {key: value for key, value in copy.deepcopy(values).items() if key not in EVALUATION}
    if isinstance(values.get("amopo"), dict):
        for key in ("eval_table", "generate_samples", "sample_settings"):
            values["amopo"].pop(key, None)
    return values


def fold_file(output: Path, fold: int, part: str, number: int) -> Path:
    """Return the file with a fold's rows of the entry of that number."""
    return output / "folds" / str(fold) / f"{part}-{number}.jsonl"


# What says where an entry's rows come from: a fold's file has them already.
ORIGIN = (
    *("path", "data_files", "split", "name", "ds_type", "shards", "shards_idx", "weight"),
    *("revision", "trust_remote_code", "preprocess_shards"),
)


def fold_entry(entry: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return an entry that reads a fold's file as the given one reads its data."""
    kept = {key: value for key, value in copy.deepcopy(entry).items() if key not in ORIGIN}
    return {"path": str(path), "ds_type": "json", "split": "train"} | kept


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a config with keys changed: `amopo.gamma` names one inside a block, null removes one.

    A block that is given as a block changes the keys that it names; a list is replaced.
    """
    made = copy.deepcopy(values)
    for key, value in changes.items():
        _change(made, str(key).split("."), value, str(key))
    return made


def _change(block: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    first, *rest = path
    if rest:
        inner = block.get(first)
        if inner is not None and not isinstance(inner, dict):
            raise ConfigError(f"{key}: '{first}' is not a block of keys in the base.")
        block[first] = dict(inner or {})
        _change(block[first], rest, value, key)
    elif isinstance(value, dict) and isinstance(block.get(first), dict):
        for name, item in value.items():
            _change(block[first], [str(name)], item, f"{key}.{name}")
    elif value is None:
        block.pop(first, None)
    else:
        block[first] = copy.deepcopy(value)


def read_comparison(path: str | Path) -> Comparison:
    """Read and check compare.yml; nothing is trained, and no data is read.

    Raises:
        ConfigError: one sentence that names the key and what to write instead.
    """
    path = Path(path)
    check_yaml(path)
    file = parse_block(CompareFile, read_yaml(path), str(path))
    base = file.base
    if isinstance(base, str):
        if not Path(base).is_file():
            raise ConfigError(f"{path}: base: there is no file '{base}' as seen from {Path.cwd()}.")
        check_yaml(base)
        base = read_yaml(Path(base))
    if not isinstance(base, dict) or base.get("rl") != "amopo":
        raise ConfigError(f"{path}: base: must be a config with `rl: amopo`.")
    _check_base(path, file, base)
    variants = [_variant(path, base, *item) for item in file.variants.items()]
    _check_names(path, file)
    notes = [note for variant in variants for note in _notes(variant)]
    given = [key for key in EVALUATION if base.get(key) and key != "test_datasets"]
    if given:
        notes.append(f"{', '.join(given)}: no effect; runs are scored once, after training.")
    return Comparison(
        path=str(path),
        base=base,
        variants=variants,
        existing={name: _home(model) for name, model in file.existing.items()},
        baseline=file.baseline,
        seeds=file.seeds or [base.get("seed", 42)],
        folds=file.folds,
        measure=file.measure,
        comparisons=file.comparisons,
        output=Path(file.output),
        notes=notes,
    )


def _check_base(path: Path, file: CompareFile, base: dict[str, Any]) -> None:
    for key in ("base_model", "datasets", "learning_rate"):  # without which axolotl loads none
        if not base.get(key):
            raise ConfigError(f"{path}: base: has no {key}.")
    ratings = read(base.get("amopo"), f"{path}: base").dimension_names
    measures = [MEAN, WORST, CONFLICT, LENGTH]
    if taken := set(measures) & set(ratings):
        raise ConfigError(f"{path}: base: a dimension can't be named '{min(taken)}' here.")
    for name in file.comparisons:
        if name not in (known := [*measures, OVERALL, *ratings]):
            raise ConfigError(
                f"{path}: comparisons: '{name}' is none of {', '.join(known)}."
                f"{did_you_mean(name, known)}"
            )
    if file.folds and base.get("test_datasets"):
        raise ConfigError(
            f"{path}: folds hold out rows of datasets:, and the base has test_datasets too; remove "
            "one of the two."
        )
    if not file.folds and not base.get("test_datasets"):
        raise ConfigError(
            f"{path}: nothing says which prompts are held out; write folds: 5, or test_datasets: "
            "in the base. (val_set_size splits pairs, not prompts.)"
        )
    if not file.folds and base.get("val_set_size"):
        raise ConfigError(f"{path}: base: val_set_size: remove it; test_datasets are held out.")


def _variant(path: Path, base: dict[str, Any], name: str, changes: Any) -> Variant:
    where = f"{path}: variants.{name}"
    try:
        values = changed(base, changes or {})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    known = {*option_keys(), *base, "amopo", "plugins"}
    for key in changes or {}:
        first = str(key).partition(".")[0]
        if first in SET_HERE:
            raise ConfigError(f"{where}.{key}: the comparison sets {first} itself; remove it.")
        if first not in known and values.get("rl") != "amopo":
            raise ConfigError(f"{where}.{key}: unknown key.{did_you_mean(first, known)}")
    for key, why in REFUSED.items():
        if values.get(key):
            raise ConfigError(f"{where}: {key}: {why}; remove it.")
    if values.get("rl") not in ("amopo", *AXOLOTLS):
        raise ConfigError(
            f"{where}.rl: {values.get('rl')!r} can't be compared; write amopo, "
            f"{', '.join(AXOLOTLS)}."
        )
    try:
        read(values.get("amopo"), where)
    except ConfigError as error:
        raise ConfigError(f"{error} (In a variant, KEY: null removes a key of the base.)") from None
    return Variant(name, changes or {}, values)


def _notes(variant: Variant) -> list[str]:
    if variant.values["rl"] == "simpo" and variant.values.get("cpo_alpha") != 0:
        return [
            f"{variant.name}: rl: simpo without cpo_alpha: 0 adds an NLL term of the chosen "
            "responses, which SimPO does not have."
        ]
    return []


def _home(model: str) -> str:
    return str(Path(model).expanduser()) if model.startswith("~") else model


def _check_names(path: Path, file: CompareFile) -> None:
    taken = [*file.variants, *file.existing]
    if file.measure.untuned:
        taken.append("untuned")
    twice = {name for name in taken if taken.count(name) > 1}
    if twice:
        raise ConfigError(f"{path}: the name '{min(twice)}' is there twice; choose another.")
    if file.baseline not in taken:
        raise ConfigError(
            f"{path}: baseline: '{file.baseline}' is none of {', '.join(taken)}."
            f"{did_you_mean(file.baseline, taken)}"
        )
    for name, model in file.existing.items():
        if re.match(r"^[./~]", model) and not Path(_home(model)).is_dir():
            raise ConfigError(f"{path}: existing.{name}: there is no folder '{model}'.")
    if len(set(file.seeds)) < len(file.seeds):
        raise ConfigError(f"{path}: seeds: one is there twice.")
