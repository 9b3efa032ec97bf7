"""The click command `axolotl amopo init`."""

import sys
from dataclasses import asdict
from pathlib import Path

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
from axolotl_amopo.errors import visible


def on_terminal() -> bool:
    """Return whether somebody can be asked."""
    return sys.stdin.isatty()


@command(epilog=f"{EXITS}, {EXIT_FOUND} where something is to be filled in.")
@click.argument("data")
@click.option("--model", metavar="NAME", help="A hub name or folder; by default what fits.")
@click.option("--gpu", metavar="NAME", help="A card, e.g. h100-80gb, or cpu; else what is here.")
@click.option("--type", "kind", metavar="TYPE", help="How rows are read; else what fits best.")
@click.option("--dimensions", metavar="NAME,...", help="Those to take; by default all that vary.")
@click.option("--split", metavar="NAME", help="The split to train on.")
@click.option("--name", metavar="NAME", help="The configuration of a hub dataset.")
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE", help="By default config.yml."
)
@QUIET
@JSON
def init(
    data: str,
    model: str | None,
    gpu: str | None,
    kind: str | None,
    dimensions: str | None,
    split: str | None,
    name: str | None,
    output: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write a first config from DATA: a file, a folder or a hub dataset.

    \b
        axolotl amopo init ratings.jsonl --gpu rtx-4090-24gb

    Finds the format, dimensions, scales, directions and lengths, holds prompts
    out, and says in comments why it wrote what. A terminal is asked for what
    no option says; a file that is there is never overwritten.
    """
    asks = on_terminal() and not (quiet or as_json)
    output = output or Path(click.prompt("Write to", "config.yml") if asks else "config.yml")
    if output.exists() or not output.parent.is_dir():
        why = "is there already" if output.exists() else "is in a folder that is not there"
        raise click.ClickException(f"{output} {why}; name another file with --output.")
    if gpu not in (None, "cpu"):
        from axolotl_amopo.commands.plan.cards import find_card

        find_card(gpu)
    named = split_names(dimensions)
    options = {"kind": kind, "split": split, "name": name, "dimensions": named, "model": model}
    with library_output(quiet=quiet, as_json=as_json):
        from axolotl_amopo.commands.init.look import look
        from axolotl_amopo.commands.init.write import choose_training, config_text

        found = look(data, **options)
        shown = [visible(f"{found.fit}."), *(visible(f"  Or: {fit}.") for fit in found.runners_up)]
        if asks:
            click.echo("\n".join(shown))
            kinds = [found.fit.type, *(fit.split()[0] for fit in found.runners_up)]
            if len(kinds) > 1:
                options["kind"] = click.prompt("Type", kinds[0], type=click.Choice(kinds))
            if found.dimensions and not named:
                names = ",".join(dimension.name for dimension in found.dimensions)
                options["dimensions"] = split_names(click.prompt("Dimensions", names))
            gpu = gpu or click.prompt("GPU, cpu, or nothing for what is here", "") or None
            model = model or click.prompt("Model, or nothing for what fits", "") or None
            found = look(data, **options | {"model": model})
        training = choose_training(found, model, gpu)
        text = config_text(found, training)
    with output.open("x", encoding="utf-8") as file:
        file.write(text)
    facts = asdict(found) | {"training": asdict(training), "written": str(output)}
    write_json(facts, as_json=as_json)
    if not as_json and not quiet:
        shown += [f"To fill in: {visible(item)}." for item in found.fit.fill_in]
        shown += [f"Written: {output}", f"Next: axolotl amopo inspect {output}"]
        click.echo("\n".join(shown))
    if found.fit.fill_in:
        sys.exit(EXIT_FOUND)


def split_names(text: str | None) -> list[str]:
    """Return names that commas separate."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]
