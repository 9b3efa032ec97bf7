"""The `datasets:` entries of the YAML: our own keys, and the modules that their `type:` names.

axolotl's schema drops keys that it doesn't know, so before validation ours move into the block,
under the fingerprint of their entry.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from axolotl.utils.schemas.datasets import SFTDataset
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, field_validator

from axolotl_amopo.config.block import AMoPOConfig, plain
from axolotl_amopo.config.dimensions import Scale, check_scale
from axolotl_amopo.config.fingerprint import entry_facts, fingerprint, shared_facts
from axolotl_amopo.config.instructions import ENVIRONMENT
from axolotl_amopo.config.parse import parse_block
from axolotl_amopo.config.through_axolotl import mark
from axolotl_amopo.errors import ConfigError, did_you_mean

FORMATS_PACKAGE = "axolotl_amopo.formats"
PREFIX = "amopo."
# For runs without `rl: amopo`: rows for axolotl's supervised fine-tuning, see the module.
SUPERVISED, SUPERVISED_MODULE = "amopo.ric", "axolotl_amopo.data.supervised"
# The key of such an entry that names the format of its rows.
ROWS = "rows"


# axolotl's keys of an entry that would change what the loss covers, and what they say instead.
ALL_OF_IT = "remove it: the loss is over the responses, and over all of each"
REFUSED = {
    "message_field_training": ALL_OF_IT,
    "message_field_training_detail": ALL_OF_IT,
    "roles_to_train": ALL_OF_IT,
    "train_on_eos": f"{ALL_OF_IT}, the token at its end included",
    "train_on_eot": f"{ALL_OF_IT}, the token at its end included",
}
# Their values that ask for what is done anyway.
DONE_ANYWAY = {
    "roles_to_train": (["assistant"], ["gpt"]),
    "train_on_eos": ("turn", "last"),
    "train_on_eot": ("turn", "last"),
}
# axolotl's keys of an entry that only its own types read.
OF_OTHER_TYPES = (
    "conversation",
    "field",
    "field_human",
    "field_model",
    "input_format",
    "input_transform",
    "logprobs_field",
    "temperature",
)


class DatasetOptions(BaseModel):
    """Keys of a `datasets:` entry that axolotl's schema doesn't have."""

    model_config = ConfigDict(extra="forbid")

    scale: Scale | None = Field(
        default=None, description="Lowest and highest rating of this dataset's dimensions"
    )
    fields: dict[str, str] = Field(
        default={},
        description="Our field names (prompt, chosen, ...) to the data's, or to a path: a.b, a.0",
    )
    template: str | None = Field(
        default=None,
        description="The prompt as a Jinja template of the row's fields (types that say so)",
    )
    responses: list[dict[str, str]] | None = Field(
        default=None,
        min_length=2,
        description="amopo.user_defined: for each response the paths of its text and its ratings",
    )

    check_scale = field_validator("scale")(check_scale)

    @field_validator("template")
    @classmethod
    def check_template(cls, text: str | None) -> str | None:
        try:
            ENVIRONMENT.parse(text or "")
        except TemplateError as error:
            raise ValueError(f"is not a Jinja template ({error})") from None
        return text

    @field_validator("responses")
    @classmethod
    def check_responses(cls, responses: list[dict[str, str]] | None) -> list[dict[str, str]] | None:
        if any("text" not in paths for paths in responses or []):
            raise ValueError("each response needs a path for its text, e.g. {text: answer_a}")
        return responses


def formats() -> list[str]:
    """Return the `type:` names that come with this package."""
    folder = Path(__file__).parent.parent / "formats"
    return sorted(PREFIX + path.stem.rstrip("_") for path in folder.glob("[a-z]*.py"))


class Entry(NamedTuple):
    """An entry of `datasets:` or `test_datasets:`, its keys checked."""

    where: str  # as an error names it: datasets[0]
    section: str
    values: dict  # as it stands in the config
    options: DatasetOptions
    module: str  # which its `type:` names


def read_entries(cfg: dict, *, supervised: bool = False) -> Iterator[Entry]:
    """Check the entries of a raw config, one by one.

    Args:
        supervised: check those of `type: amopo.ric` alone, by the type of their rows.

    Raises:
        ConfigError: for a type or key that is unknown.
    """
    if not cfg.get("datasets"):
        raise ConfigError(
            "datasets: is missing or empty; write at least one entry with path: and type:, e.g. "
            "type: amopo.helpsteer."
        )
    for section in ("datasets", "test_datasets"):
        entries = cfg.get(section) or []
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise ConfigError(f"{section}: must be a list of entries with path: and type:.")
        for i, values in enumerate(entries):
            where = f"{section}[{i}]"
            is_supervised = values.get("type") == SUPERVISED
            if supervised and not is_supervised:
                continue
            if supervised:
                values["type"] = values.pop(ROWS, None)
            elif is_supervised:
                raise ConfigError(
                    f"{where}.type: {SUPERVISED} is for supervised fine-tuning, without rl: amopo; "
                    f"remove rl, or write the type of its {ROWS} here and objective: ric."
                )
            options = _read_options(values, where)
            key = ROWS if supervised else "type"
            module = module_of(values.get("type"), f"{where}.{key}")
            if not values.get("path"):
                raise ConfigError(f"{where}.path: is missing; name a file, folder or hub dataset.")
            yield Entry(where, section, values, options, module)


def prepare_entries(
    cfg: dict, config: AMoPOConfig, *, supervised: bool = False
) -> dict[str, dict[str, Any]]:
    """Rewrite `datasets:` and `test_datasets:` in place; return what axolotl would drop of them.

    Args:
        supervised: rewrite entries of `type: amopo.ric` alone.

    Returns:
        By an entry's fingerprint: its own options, whether it is for evaluation, and the module
        that reads the rows of an entry of `type: amopo.ric`.

    Raises:
        ConfigError: for a type or key that is unknown.
        DataError: for a local file that can't be loaded, naming file and row.
    """
    # The check before a launch reads the entries too, and must not wait for `datasets`.
    from axolotl_amopo.config.loading import check_loads

    stored: dict[str, dict[str, Any]] = {}
    shared = shared_facts(cfg, config)
    for where, section, entry, options, module in read_entries(cfg, supervised=supervised):
        for key in DatasetOptions.model_fields:
            entry.pop(key, None)
        kind, entry["type"] = entry["type"], module
        check_loads(entry, where)
        facts = entry_facts(entry, kind, ours=kind.startswith(PREFIX))
        facts |= {
            "shared": shared,
            "options": options.model_dump(),
            "eval": section == "test_datasets",
        }
        name = fingerprint(facts)
        mark(entry, name)
        stored[name] = {
            "options": options.model_dump(exclude_none=True),
            "eval_split": section == "test_datasets",
        }
        if supervised:
            entry["type"] = SUPERVISED_MODULE
            stored[name][ROWS] = module
    return stored


def _read_options(entry: dict, where: str) -> DatasetOptions:
    own = set(DatasetOptions.model_fields)
    for key in entry:
        if key not in SFTDataset.model_fields and key not in own:
            known = [*own, "path", "type", "split", "name", "data_files", "ds_type", "weight"]
            raise ConfigError(
                f"{where}.{key}: unknown key.{did_you_mean(key, known)} Keys here are axolotl's "
                f"own (path, type, split, ...) and {', '.join(sorted(own))}."
            )
    for key, advice in REFUSED.items():
        if (value := entry.get(key)) and value not in DONE_ANYWAY.get(key, ()):
            raise ConfigError(f"{where}.{key}: {value!r} can't work with amopo.*; {advice}.")
    for key in OF_OTHER_TYPES if str(entry.get("type")).startswith(PREFIX) else ():
        if entry.get(key):
            raise ConfigError(
                f"{where}.{key}: is not read by types of amopo.*; remove it. Names of the data's "
                "fields go under `fields:`."
            )
    given = {key: entry[key] for key in own if key in entry}
    return parse_block(DatasetOptions, plain(given), where)


def module_of(kind: Any, where: str) -> str:
    """Return the module that a `type:` names: one of ours, or any package's with a `load`."""
    if isinstance(kind, str) and "." in kind:
        module = kind
        if kind.startswith(PREFIX):
            module = f"{FORMATS_PACKAGE}.{kind.removeprefix(PREFIX)}"
            # axolotl takes every module of that name for its own format, and fails.
            module += "_" * module.endswith(".user_defined")
        try:
            if importlib.util.find_spec(module):
                return module
        except ModuleNotFoundError:
            pass
    raise ConfigError(
        f"{where}: {kind!r} is not a dataset format of rated responses."
        f"{did_you_mean(str(kind), formats())} Known: {', '.join(formats())}, or the import path "
        "of a module of your own."
    )
