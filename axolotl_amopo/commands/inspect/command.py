"""The click command `axolotl amopo inspect`."""

from pathlib import Path

import click

from axolotl_amopo.commands.kit.options import (
    FORCE_FILES,
    JSON,
    OUTPUT,
    QUIET,
    check_free,
    command,
    library_output,
    write_json,
)


@command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option("--rows", type=click.IntRange(0), default=3, show_default=True, help="Pairs to show.")
@click.option("--find", metavar="TEXT", help="Show pairs with this text in them.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page.")
@OUTPUT
@FORCE_FILES
@QUIET
@JSON
def inspect(
    config: str,
    rows: int,
    find: str | None,
    html: Path | None,
    output: Path | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Show rows, pairs, ratings, lengths, and the pairs as the model sees them.

    \b
        axolotl amopo inspect config.yml --rows 2 --html data.html

    Prepares the data as training would, anew and in a folder that is deleted
    again; the model itself is not loaded. Colours of a pair: special tokens dim,
    the instruction cyan, what bears the loss green.
    """
    written = [path for path in (html, output) if path]
    for path in written:
        check_free(path, force)
    with library_output(quiet=quiet, as_json=as_json):
        from axolotl_amopo.commands.inspect.gather import gather
        from axolotl_amopo.commands.inspect.page import inspection_page

        report = gather(config, rows, find)
        if html:
            html.write_text(inspection_page(report), encoding="utf-8")
    write_json(report.to_json(), as_json=as_json, output=output)
    if as_json or quiet:
        return
    for path in written:
        click.echo(f"Written: {path}")
    if not written:
        from axolotl_amopo.commands.inspect.text import print_inspection

        print_inspection(report)
