"""Overrides of the `amopo:` block: `--amopo.gamma 1.5`, and the keys of a sweep.

They reach the raw config in one of two spellings:

    amopo.gamma: 1.5                  at its top level: what `axolotl train --sweep FILE` writes
    amopo: {overrides: {gamma: 1.5}}  what `axolotl amopo train --amopo.gamma 1.5` passes on

The second is axolotl's own way of setting a key of a block (`amopo__overrides=...` among the
options of its commands), with all overrides in one value. One option per key would not do: axolotl
turns an option's text into what it takes for the meant type (`none` into null, and any word into
false where the YAML has true), but passes on what is no text as it is.
"""

import json
from collections.abc import Iterable
from typing import Any

import click
import yaml

PREFIX = "amopo."
#: The option that carries the overrides, as a keyword argument of axolotl's commands.
PASSED_AS = "amopo__overrides"
KEY = "overrides"

Overrides = dict[str, Any]


def split_overrides(arguments: Iterable[str]) -> tuple[Overrides, list[str]]:
    """Return the `--amopo.key value` and `--amopo.key=value` among arguments, and the others.

    Values are YAML, as in the config file.

    Raises:
        click.UsageError: for a key without a value.
    """
    overrides: Overrides = {}
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith(f"--{PREFIX}"):
            rest.append(argument)
            continue
        name, given, value = argument.removeprefix(f"--{PREFIX}").partition("=")
        if not given:
            value = next(waiting, None)
            if value is None:
                raise click.UsageError(f"{argument} needs a value, e.g. {argument} VALUE")
        try:
            overrides[name.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise click.UsageError(f"--{PREFIX}{name}: {value!r} is not YAML: {error}") from None
    return overrides, rest


def passed_on(overrides: Overrides) -> dict[str, Any]:
    """Return the keyword arguments by which axolotl's commands carry overrides to every process.

    A launcher gets them as text, which must be read as a Python literal again; so values that have
    none (a date) become text here.
    """
    return {PASSED_AS: json.loads(json.dumps(overrides, default=str))} if overrides else {}


def apply_overrides(cfg: dict) -> None:
    """Move overrides from where they stand in the raw config into its `amopo:` block.

    Those of the command line win over those of a sweep, as axolotl's own options do.
    """
    found: Overrides = {}
    for key in [key for key in cfg if str(key).startswith(PREFIX)]:
        found[key.removeprefix(PREFIX).replace("-", "_")] = cfg.pop(key)
    block = cfg.get("amopo")
    if block is not None and not isinstance(block, dict):
        return  # refused as a whole by whoever reads it
    block = dict(block or {})
    if isinstance(block.get(KEY), dict):
        found |= block.pop(KEY)
    if found:
        cfg["amopo"] = block | found
