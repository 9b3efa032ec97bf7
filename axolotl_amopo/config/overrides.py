"""`--amopo.gamma 1.5`: from the command line into the raw config."""

import json
import os
import sys
from collections.abc import Iterable
from typing import Any

import click
import yaml

PREFIX = "--amopo."
# Carries the overrides of `axolotl amopo ...` through the launcher to every process.
ENVIRONMENT_VARIABLE = "AXOLOTL_AMOPO_OVERRIDES"

Overrides = dict[str, Any]


def split_overrides(arguments: Iterable[str]) -> tuple[Overrides, list[str]]:
    """Take `--amopo.key value` and `--amopo.key=value` out of command-line arguments.

    Raises:
        click.UsageError: for a key without a value.
    """
    overrides: Overrides = {}
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith(PREFIX):
            rest.append(argument)
            continue
        name, given, value = argument.removeprefix(PREFIX).partition("=")
        if not given:
            value = next(waiting, None)
            if value is None:
                raise click.UsageError(f"{argument} needs a value, e.g. {argument} VALUE")
        overrides[name.replace("-", "_")] = yaml.safe_load(value)
    return overrides, rest


def to_json(overrides: Overrides) -> str:
    return json.dumps(overrides)


def apply_overrides(cfg: dict) -> None:
    """Put the overrides of this process' command line into the raw config's `amopo:` block.

    They come through `axolotl amopo ...`, or, where axolotl's command runs in this very process
    (`--launcher python`, `python -m axolotl.cli.train`), stand in `sys.argv`.
    """
    overrides = json.loads(os.environ.get(ENVIRONMENT_VARIABLE, "{}"))
    overrides |= split_overrides(sys.argv[1:])[0]
    for key in [key for key in cfg if str(key).startswith(PREFIX.removeprefix("--"))]:
        del cfg[key]  # what axolotl made of the same option
    if overrides:
        cfg["amopo"] = dict(cfg.get("amopo") or {}) | overrides
