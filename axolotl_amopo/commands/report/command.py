"""The click command `axolotl amopo report`."""

import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from axolotl_amopo.commands.kit.options import (
    EXIT_FOUND,
    EXITS,
    JSON,
    QUIET,
    command,
    library_output,
    write_json,
)

if TYPE_CHECKING:
    from axolotl_amopo.commands.report.plots import Plot


@command(needs_axolotl=False, epilog=f"{EXITS}, {EXIT_FOUND} where --fail-on found something.")
@click.argument("run_dirs", metavar="RUN_DIR...", nargs=-1, required=True, type=click.Path())
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Where to write.  [default: RUN_DIR/_amopo_report, of several ./_amopo_report]",
)
@click.option("--force", is_flag=True, help="Overwrite what is in the folder.")
@QUIET
@JSON
@click.option(
    "--fail-on",
    type=click.Choice(["problem", "warning"]),
    help=f"Exit with {EXIT_FOUND} where there is one (or a worse one).",
)
def report(
    run_dirs: tuple[str, ...],
    output: Path | None,
    force: bool,
    quiet: bool,
    as_json: bool,
    fail_on: str | None,
) -> None:
    """Say which dimensions improved, which got worse, and what looks wrong.

    \b
        axolotl amopo report outputs/qwen2.5-7b-amopo

    Reads a run's log from its output_dir, also while it is training, and writes
    index.html, one page that needs nothing else, its plots as SVG and PNG, and
    report.json, which is what --json prints.
    Several runs are drawn over each other, with the settings that differ.

    Called again for the same runs it writes the page anew; anything else that is
    there already is only overwritten with --force.
    """
    with library_output(quiet=False, as_json=as_json):
        from axolotl_amopo.commands.report.findings import SEVERITIES
        from axolotl_amopo.commands.report.report import write_report

        made = write_report(
            [Path(folder) for folder in run_dirs],
            output,
            force=force,
            progress=partial(_track, quiet=quiet),
        )
    if as_json:
        write_json(made.to_json(), as_json=True)
    elif not quiet:
        from axolotl_amopo.commands.report.text import print_report

        print_report(made.runs)
        click.echo(f"Written: {made.page}")
    if fail_on and made.severities & set(SEVERITIES[: SEVERITIES.index(fail_on) + 1]):
        sys.exit(EXIT_FOUND)


def _track(plots: Sequence["Plot"], *, quiet: bool) -> Iterable["Plot"]:
    from rich.progress import track

    from axolotl_amopo.commands.kit.text import bars_console

    console = bars_console()
    hidden = quiet or not console.is_terminal
    return track(plots, description="Drawing", console=console, disable=hidden, transient=True)
