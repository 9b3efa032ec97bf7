"""`axolotl amopo report RUN_DIR`: what a training run did, while it goes on or afterwards."""

import json
import sys
from pathlib import Path

import click

from axolotl_amopo.commands.kit.options import EXITS, FOUND, JSON, QUIET, told


@click.command(
    context_settings={"max_content_width": 80},
    epilog=f"{EXITS}, {FOUND} where --fail-on found something.",
)
@click.argument("run_dirs", metavar="RUN_DIR...", nargs=-1, required=True, type=click.Path())
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Where to write.  [default: RUN_DIR/amopo_report, of several ./amopo_report]",
)
@click.option("--force", is_flag=True, help="Overwrite what is in the folder.")
@QUIET
@JSON
@click.option(
    "--fail-on",
    type=click.Choice(["problem", "warning"]),
    help=f"Exit with {FOUND} where there is one (or a worse one).",
)
def report(
    run_dirs: tuple[str, ...],
    output: Path | None,
    force: bool,
    quiet: bool,
    as_json: bool,
    fail_on: str | None,
) -> None:
    """Which dimensions improved, which paid for it, and what looks wrong.

    \b
        axolotl amopo report outputs/qwen2.5-7b-amopo

    Reads a run's log from its output_dir, also while it is training, and writes
    index.html, one page that needs nothing else, and its plots as SVG and PNG.
    Several runs are drawn over each other, with the settings that differ.

    Called again for the same runs it writes the page anew; anything else that is
    there already is only overwritten with --force.
    """
    from axolotl_amopo.commands.report.findings import SEVERITIES, findings
    from axolotl_amopo.commands.report.show import show, to_json
    from axolotl_amopo.commands.report.write import names, write
    from axolotl_amopo.training.runs import read_run

    folders = [Path(folder) for folder in run_dirs]
    if output is None:
        output = (folders[0] if len(folders) == 1 else Path()) / "amopo_report"
    with told():
        runs = names([read_run(folder) for folder in folders])
        page = write(runs, output, force=force, quiet=quiet)
    if not (quiet or as_json):
        from rich.console import Console

        show(runs, Console(width=80, highlight=False))
        click.echo(f"Written: {page}")
    if as_json:
        made = [{"name": name} | to_json(run) for name, run in runs.items()]
        click.echo(json.dumps({"page": str(page), "runs": made}))
    if fail_on:
        found = {finding.severity for run in runs.values() for finding in findings(run)}
        if found & set(SEVERITIES[: SEVERITIES.index(fail_on) + 1]):
            sys.exit(FOUND)
