"""`axolotl amopo inspect CONFIG`: what the data is, before anything is trained."""

import json
from pathlib import Path

import click


@click.command(context_settings={"max_content_width": 80})
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option("--rows", type=click.IntRange(0), default=3, show_default=True, help="Pairs to show.")
@click.option("--find", metavar="TEXT", help="Show pairs with this text in them.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page.")
@click.option("--force", is_flag=True, help="Overwrite the page where there is one.")
@click.option("--json", "as_json", is_flag=True, help="For programs: the last line of the output.")
def inspect(
    config: str, rows: int, find: str | None, html: Path | None, force: bool, as_json: bool
) -> None:
    """Rows, pairs, ratings, lengths, and the pairs as the model sees them.

    \b
        axolotl amopo inspect config.yml --rows 2 --html data.html

    Prepares the data as training would, anew and in a folder that is deleted
    again; the model itself is not loaded. Colours of a pair: special tokens dim,
    the instruction cyan, what bears the loss green.
    """
    from axolotl_amopo.errors import AMoPOError
    from axolotl_amopo.inspection.gather import gather
    from axolotl_amopo.inspection.page import page
    from axolotl_amopo.inspection.show import show

    if html and html.exists() and not force:
        raise click.ClickException(f"{html} is there already; name another file, or add --force.")
    try:
        report = gather(config, rows, find)
    except AMoPOError as error:
        raise click.ClickException(str(error)) from None
    if html:
        html.write_text(page(report), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(report.to_json()))
    elif not html:
        from rich.console import Console

        show(report, Console(width=80, highlight=False))
    else:
        click.echo(f"Written: {html}")
