"""The checks of a config that need seconds: before anything is launched.

The run itself checks all of this again, and more: devices, and rows. These checks stay clear of
axolotl's schema and of its plugins' base class, which take most of a run's start to import.
"""

import ast
import importlib.util
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from axolotl.cli.config_options import AXOLOTL_CONFIG_CLI_OPTIONS

from axolotl_amopo.config.axolotl_keys import (
    check_axolotl_keys,
    check_gradients,
    check_other_references,
    check_parts,
)
from axolotl_amopo.config.block import AMoPOConfig, plain, read_beta
from axolotl_amopo.config.datasets import read_entries
from axolotl_amopo.config.devices import check_parallel
from axolotl_amopo.config.files import check_files, check_json_lines, check_yaml
from axolotl_amopo.config.overrides import apply_overrides
from axolotl_amopo.config.parse import parse_block
from axolotl_amopo.config.samples import check_samples, move_samples
from axolotl_amopo.config.together import check_needs

# Keys of axolotl's schema whose option has another name: `type_of_model` for `model_type`.
OTHERWISE_NAMED = {"model_type", "model_config", "model_kwargs", "model_revision"}


def check_before_launch(cfg: dict, *, with_data: bool = True) -> None:
    """Check a raw config's block, the spelling of its keys, and the local files that it names.

    Nothing is checked of a config without `rl: amopo`. Rewrites `cfg` on the way.

    Args:
        with_data: false where the data may be elsewhere.

    Raises:
        ConfigError: for a key that is unknown, out of bounds, or can't go with the others.
        DataError: for a local data file that can't be read.
    """
    if cfg.get("rl") != "amopo":
        return
    check_yaml(cfg.get("axolotl_config_path"))
    apply_overrides(cfg)
    move_samples(cfg)
    config = parse_block(AMoPOConfig, plain(cfg.get("amopo")), "amopo")
    check_needs(config)
    check_samples(cfg, config, with_data=with_data)
    check_axolotl_keys(cfg, _known_keys(cfg))
    check_parallel(cfg)
    check_parts(cfg, config)
    check_other_references(cfg, config)
    check_gradients(cfg, config)
    read_beta(cfg, config)
    for entry in read_entries(cfg):
        for file in check_files(entry.values, entry.where) if with_data else []:
            if file.suffix == ".jsonl":
                check_json_lines(file)


def with_options(values: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a YAML file and, over them, the options of one of axolotl's commands.

    As `axolotl.cli.config.load_cfg` does it, but for importing it.
    """
    cfg, strict = dict(values), values.get("strict")
    for name, value in options.items():
        key, nested, child = name.partition("__")
        if value is None or (strict and key not in values):
            continue
        if nested:
            block = cfg.get(key)
            cfg[key] = (block if isinstance(block, dict) else {}) | {child: _typed(value)}
        else:
            cfg[key] = _typed(value)
    return cfg


def _typed(value: Any) -> Any:
    """Return what axolotl takes an option's text for."""
    if not isinstance(value, str):
        return value
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            pass
    words = {"true": True, "yes": True, "false": False, "no": False}
    words |= {"null": None, "none": None, "~": None}
    return words.get(value.lower(), value)


def option_keys() -> set[str]:
    """Return the keys of axolotl's schema, from the options that it generated of them."""
    keys = set(OTHERWISE_NAMED)
    for flags, name, _, _ in AXOLOTL_CONFIG_CLI_OPTIONS:
        option = name or flags[0].partition("/")[0].removeprefix("--").replace("-", "_")
        keys.add(option.partition("__")[0])
    return keys


def _known_keys(cfg: dict) -> set[str]:
    """Return the keys that are not misspelt, as far as that can be told without importing plugins.

    Where somebody else's plugin runs, all of them: its keys are known once it is imported.
    """
    named = [str(plugin) for plugin in cfg.get("plugins") or []]
    named += [point.value for point in entry_points(group="axolotl.plugins")]
    if not all(name.startswith(("axolotl.integrations.", "axolotl_amopo")) for name in named):
        return {*cfg}
    return option_keys() | (integration_keys() & {*cfg})


def integration_keys() -> set[str]:
    """Return the keys of the plugins that come with axolotl, and what else their models hold.

    Read from their source: to import one takes as long as to import axolotl's trainer.
    """
    keys = set()
    spec = importlib.util.find_spec("axolotl.integrations")
    for folder in spec.submodule_search_locations if spec else []:
        for path in Path(folder).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            classes = ast.walk(ast.parse(source)) if "BaseModel" in source else []
            for one in classes:
                if isinstance(one, ast.ClassDef):
                    keys |= {_annotated(line) for line in one.body}
    return keys


def _annotated(line: ast.stmt) -> str:
    named = isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    return line.target.id if named else ""
