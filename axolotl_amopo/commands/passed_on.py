"""axolotl's own commands under `axolotl amopo`, where they take overrides of the `amopo:` block.

    axolotl amopo train config.yml --amopo.gamma 1.5 --learning-rate 1e-5

axolotl's commands know no options of plugins, so `axolotl train --amopo.gamma 1.5` would hand the
option to the launcher. These take it, and everything that axolotl's command takes.
"""

import contextlib
import io
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from axolotl_amopo.commands.kit.options import Command
from axolotl_amopo.config.files import read_yaml
from axolotl_amopo.config.overrides import Overrides, passed_on, split_overrides

NAMES = ("preprocess", "train", "evaluate", "inference", "merge-lora")
# Those that read the data; for the others it need not be there.
CHECKED_BEFORE = ("preprocess", "train", "evaluate")
# Options that say how a command runs; the others go into the config.
NOT_IN_CONFIG = ("config", "launcher", "cloud", "sweep")


def passed_on_command(name: str) -> click.Command:
    """Return axolotl's command of that name, with overrides."""

    @click.command(
        name,
        cls=Command,
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
            options = inner_ctx.params
            _check_they_arrive(overrides, options)
            # All of them hand the options that they don't know on to `load_cfg`.
            options |= passed_on(overrides)
            if name in CHECKED_BEFORE:
                check_configs(options)
            if _launches_with_accelerate(options):
                # Or it adds a traceback of its own to what the launched process has said.
                inner_ctx.args = ["--quiet", *inner_ctx.args]
            try:
                inner.invoke(inner_ctx)
            except subprocess.CalledProcessError:
                if options.get("launcher", "python") == "python":
                    raise
                ctx.exit(1)  # what was launched has said why

    return command


def check_configs(options: Mapping[str, Any]) -> None:
    """Check what a command is about to run: its config, or each of a sweep.

    Args:
        options: of one of axolotl's commands.

    Raises:
        AMoPOError: saying what is wrong.
    """
    config = Path(options["config"])
    if not config.is_file():
        return  # on the web, or a folder to choose from
    from axolotl.cli.utils.sweeps import generate_sweep_configs

    from axolotl_amopo.config.before_launch import check_before_launch, with_options

    values = read_yaml(config)
    if not isinstance(values, dict):
        return  # refused by axolotl
    configs = [values]
    if options.get("sweep"):
        with contextlib.redirect_stdout(io.StringIO()):  # axolotl prints them itself
            configs = generate_sweep_configs(values, read_yaml(Path(options["sweep"])))
    given = {name: value for name, value in options.items() if name not in NOT_IN_CONFIG}
    for number, one in enumerate(configs):
        cfg = with_options(one | {"axolotl_config_path": str(config)}, given)
        # A sweep's configs share their data, but for rare ones.
        check_before_launch(cfg, with_data=not options.get("cloud") and number == 0)


def _launches_with_accelerate(options: Mapping[str, Any]) -> bool:
    elsewhere = options.get("cloud") or options.get("use_ray")
    return options.get("launcher") == "accelerate" and not elsewhere


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
    values = read_yaml(config) if config.is_file() else None
    if isinstance(values, dict) and values.get("strict") and not values.get("amopo"):
        raise click.UsageError(
            f"{named}: strict: true drops options whose key {config} does not have; write an "
            "amopo: block there, or remove strict."
        )
