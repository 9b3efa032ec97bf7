"""axolotl's own commands under `axolotl amopo`, where they take overrides of the `amopo:` block.

    axolotl amopo train config.yml --amopo.gamma 1.5 --learning-rate 1e-5

axolotl's commands know no options of plugins, so `axolotl train --amopo.gamma 1.5` would hand the
option to the launcher. These take it, and everything that axolotl's command takes.
"""

from pathlib import Path
from typing import Any

import click
import yaml

from axolotl_amopo.config.overrides import Overrides, passed_on, split_overrides

NAMES = ("preprocess", "train", "evaluate", "inference", "merge-lora")


def passed_on_command(name: str) -> click.Command:
    """Return axolotl's command of that name, with overrides."""

    @click.command(
        name,
        add_help_option=False,
        # What follows the config is passed on as it is, a launcher's `--` included.
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
        short_help=f"axolotl {name}, with --amopo.KEY VALUE",
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    @click.pass_context
    def command(ctx: click.Context, arguments: tuple[str, ...]) -> None:
        from axolotl.cli.main import cli as axolotl

        overrides, rest = split_overrides(arguments)
        inner = axolotl.commands[name]
        with inner.make_context(name, rest, parent=ctx.find_root()) as inner_ctx:
            _check_they_arrive(overrides, inner_ctx.params)
            # All of them hand the options that they don't know on to `load_cfg`.
            inner_ctx.params |= passed_on(overrides)
            inner.invoke(inner_ctx)

    return command


def _check_they_arrive(overrides: Overrides, options: dict[str, Any]) -> None:
    """Refuse overrides that axolotl would lose without a word.

    Raises:
        click.UsageError: saying why, and what to do instead.
    """
    if not overrides:
        return
    named = ", ".join(f"--amopo.{key}" for key in overrides)
    if options.get("cloud"):
        raise click.UsageError(f"{named}: --cloud takes the YAML alone; write the keys there.")
    config = Path(options["config"])
    values = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None
    if isinstance(values, dict) and values.get("strict") and not values.get("amopo"):
        raise click.UsageError(
            f"{named}: strict: true drops options whose key {config} does not have; write an "
            "amopo: block there, or remove strict."
        )
