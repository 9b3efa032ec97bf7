"""The click command `axolotl amopo configs`."""

from pathlib import Path

import click

from axolotl_amopo.commands.configs.examples import FOLDER, copy_configs, list_configs
from axolotl_amopo.commands.kit.options import JSON, QUIET, command, write_json


@command(needs_axolotl=False)
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=FOLDER,
    show_default=True,
    metavar="FOLDER",
    help="Where copies go.",
)
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
@QUIET
@JSON
def configs(names: tuple[str, ...], output: Path, force: bool, quiet: bool, as_json: bool) -> None:
    """List the example configs, or copy those that are named.

    \b
    axolotl amopo configs
    axolotl amopo configs qwen2.5-7b-24gb-qlora

    With a config goes what it names: a DeepSpeed file, or the quickstart's data and scripts.
    """
    if names:
        made = copy_configs(names, output, force=force)
        if as_json:
            write_json([str(path) for path in made], as_json=True)
        elif not quiet:
            for path in made:
                click.echo(f"Written: {path}")
        return
    known = list_configs()
    if as_json:
        facts = [{"name": c.name, "what": c.what, "hardware": c.hardware} for c in known]
        write_json(facts, as_json=True)
    elif not quiet:
        for config in known:
            click.echo(click.style(config.name, bold=True))
            for text in (config.what, config.hardware):
                click.echo(click.wrap_text(text, 80, "  ", "  "))
