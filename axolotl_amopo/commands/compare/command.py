"""The click command `axolotl amopo compare`."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from axolotl_amopo.commands.kit.options import (
    EXIT_FOUND,
    EXITS,
    FORCE_FILES,
    JSON,
    QUIET,
    check_free,
    command,
    library_output,
    write_json,
)
from axolotl_amopo.errors import visible


class Shard(click.ParamType):
    """A part of the runs: 2/4."""

    name = "shard"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """Return number and count."""
        number, _, count = str(value).partition("/")
        if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
            return int(number), int(count)
        self.fail(f"{value!r} is no part; write 2/4 for the second of four.", param, ctx)


@command(epilog=f"{EXITS}, {EXIT_FOUND} where a run failed or differs from the real commands.")
@click.argument("compare_file", metavar="COMPARE_YML", type=click.Path(exists=True, dir_okay=False))
@click.option("--dry-run", is_flag=True, help="Show the runs and what `plan` says of each.")
@click.option("--gpu", metavar="NAME", help="The card for --dry-run.  [default: cpu]")
@click.option(
    "--shard", type=Shard(), default="1/1", metavar="I/N", help="Make a part of the runs."
)
@click.option("--only", metavar="RUN", help="Make runs of this name: simpo/fold-1-seed-1, simpo/*.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Runs at once.")
@click.option(
    "--launch",
    type=click.Choice(["auto", "fork", "command"]),
    default="auto",
    show_default=True,
    help="command: every run through `axolotl train`, as several GPUs need it.",
)
@click.option("--no-check", is_flag=True, help="Do not repeat first runs by the real commands.")
@click.option("--report-only", is_flag=True, help="Make the tables again; train nothing.")
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a page with plots.",
)
@FORCE_FILES
@JSON
@QUIET
def compare(
    compare_file: str,
    dry_run: bool,
    gpu: str | None,
    shard: tuple[int, int],
    only: str | None,
    jobs: int,
    launch: str,
    no_check: bool,
    report_only: bool,
    html: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train variants of a config and compare them on held-out prompts.

    \b
        axolotl amopo compare compare.yml --dry-run
        axolotl amopo compare compare.yml --html compare.html

    compare.yml names a base config, variants (changed keys), seeds or folds, a
    baseline and an output folder. Each run trains and is scored in a folder of
    its own. Called again, the command goes on where it was stopped, and repeats
    nothing that is complete.

    The first run of each variant is repeated by `axolotl train` and `axolotl
    amopo score`, and must agree with what this process's fork has computed.
    """
    check_free(html, force)
    if dry_run and report_only:
        raise click.UsageError("--dry-run and --report-only can't go together.")
    if only and (dry_run or report_only):
        raise click.UsageError("--only is for making runs; leave it out here.")

    def say(text: str) -> None:
        if not quiet:
            click.echo(visible(text), err=True)  # it may quote what a run printed

    # Imports and forked processes log for themselves; stdout is for results.
    with library_output(quiet=False, as_json=True):
        from axolotl_amopo.commands.compare.comparison import read_comparison

        comparison = read_comparison(compare_file)  # before axolotl is imported, which takes long
        from axolotl_amopo.commands.compare import compare as comparing

        if dry_run:
            planned = comparing.dry_run(comparison, gpu)
        elif report_only:
            report = comparing.report_on(comparison)
        else:
            report = comparing.compare(
                comparison,
                shard=shard,
                only=only,
                jobs=jobs,
                check=not no_check,
                launch=launch,
                say=say,
            )
    from axolotl_amopo.commands.compare.text import print_comparison, print_plan

    if dry_run:
        write_json([vars(one) for one in planned], as_json=as_json)
        if not as_json and not quiet:
            print_plan(planned)
        return
    if html:
        from axolotl_amopo.commands.compare.page import comparison_page

        html.write_text(comparison_page(report), encoding="utf-8")
    write_json(report.to_json(), as_json=as_json)
    if not quiet:
        if not as_json:
            print_comparison(report)
        if html:
            click.echo(f"Written: {html}", err=as_json)
        click.echo(f"Written: {report.output}{os.sep}", err=as_json)
    if report.failed or report.differs:
        sys.exit(EXIT_FOUND)
