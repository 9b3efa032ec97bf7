"""The click command `axolotl amopo reference`."""

from dataclasses import asdict
from pathlib import Path

import click

from axolotl_amopo.commands.kit.options import (
    JSON,
    OUTPUT,
    QUIET,
    command,
    library_output,
    write_json,
)


@command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="PATH",
    help="Only this one of amopo.reference; several times for several.",
)
@click.option("--batch-examples", type=click.IntRange(1), default=2, show_default=True, metavar="N")
@click.option("--force", is_flag=True, help="Take all anew, also what is there already.")
@OUTPUT
@JSON
@QUIET
def reference(
    config: str,
    models: tuple[str, ...],
    batch_examples: int,
    force: bool,
    output: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Take the log-probabilities of the models that amopo.reference names.

    \b
        amopo:
          objective: mrpo
          reference: [initial, other/model]

    A training run that compares with another model reads that model's numbers
    from a file. This command makes it, with that model alone in memory, its own
    tokenizer and its own chat template, beside the prepared data. What is there
    already is kept, so a command that was interrupted goes on.
    """
    with library_output(quiet=quiet, as_json=as_json):
        from axolotl_amopo.commands.kit.text import progress_bars
        from axolotl_amopo.commands.reference.take import take_references

        with progress_bars("Reading {}", disable=quiet) as progress:
            taken = take_references(
                config, models, batch_examples=batch_examples, anew=force, progress=progress
            )
    write_json([asdict(one) for one in taken], as_json=as_json, output=output)
    if not (quiet or as_json):
        for one in taken:
            click.echo(f"{one.model}: {one.examples} examples, {one.new} of them new: {one.path}")
