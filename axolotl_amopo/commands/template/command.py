"""The click command `axolotl amopo template`."""

from pathlib import Path

import click

from axolotl_amopo.commands.kit.options import (
    ALL_DIMENSIONS,
    DIMENSIONS,
    FORCE,
    MODEL,
    QUIET,
    WEIGHTS,
    check_free,
    command,
    steering_settings,
)


@command(needs_axolotl=False)
@MODEL
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="FILE")
@DIMENSIONS
@ALL_DIMENSIONS
@WEIGHTS
@FORCE
@QUIET
def template(
    model: str,
    output: Path,
    dimensions: tuple[str, ...],
    overall: bool,
    weights: str | None,
    force: bool,
    quiet: bool,
) -> None:
    """Write a chat template that steers by a line of the system message.

    \b
        axolotl amopo template outputs/adapter --output steered.jinja
        vllm serve outputs/merged --chat-template steered.jinja

    The system message's first line then says what to ask for, and is taken out:

    \b
        {"role": "system", "content": "amopo: helpfulness=4, honesty=5"}

    It may say overall, none, or weights helpfulness=0.7, honesty=0.3 too. With
    --dimension, --overall or --weights, that is what conversations without such
    a line ask for. The template is held against what training rendered before it
    is written. Over a folder's chat_template.jinja (with --force), everything
    that loads the folder steers.
    """
    check_free(output, force)
    from axolotl_amopo.commands.kit.models import find_model
    from axolotl_amopo.commands.template.steered import steered_template

    settings = steering_settings(dimensions, overall, weights)
    made = steered_template(find_model(model), settings)
    output.write_text(made, encoding="utf-8")
    if not quiet:
        click.echo(f"Written: {output}")
