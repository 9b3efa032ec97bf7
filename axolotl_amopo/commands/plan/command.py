"""The click command `axolotl amopo plan`."""

import sys
from pathlib import Path
from typing import Any

import click

from axolotl_amopo.commands.kit.options import (
    EXIT_FOUND,
    EXITS,
    FORCE_FILES,
    JSON,
    OUTPUT,
    QUIET,
    check_free,
    command,
    library_output,
    write_json,
)


@command(epilog=f"{EXITS}, {EXIT_FOUND} where it does not fit.")
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option("--gpu", metavar="NAME", help="A card, e.g. h100-80gb; cpu for this machine.")
@click.option("--gpu-memory", type=float, metavar="GIB", help="Memory of a card by hand.")
@click.option("--gpu-tflops", type=float, metavar="N", help="Its dense bf16 TFLOP/s.")
@click.option("--gpus", type=click.IntRange(1), default=1, help="Cards in all, over all nodes.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=480, show_default=True)
@click.option("--response-tokens", type=click.IntRange(1), default=115, show_default=True)
@click.option(
    "--responses",
    type=click.IntRange(1),
    metavar="N",
    help="Responses of a group; by default the prepared data's own groups, else 4.",
)
@click.option("--pairs", type=click.IntRange(1), default=10_000, show_default=True)
@click.option(
    "--held-out",
    type=click.IntRange(0),
    metavar="N",
    help="Pairs for evaluation; by default as val_set_size says.",
)
@click.option(
    "--utilisation",
    type=click.FloatRange(0.01, 1),
    default=0.4,
    show_default=True,
    help="Share of the card's speed that training reaches.",
)
@OUTPUT
@FORCE_FILES
@QUIET
@JSON
def plan(
    config: str,
    gpus: int,
    output: Path | None,
    force: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Estimate a run's tokens, memory and time, and what would make it fit.

    \b
        axolotl amopo plan config.yml --gpu h100-80gb --gpus 8

    Only the model's config is read: of a local folder, of the models that the
    examples name, or from the hub. Tokens, FLOPs and time are those of pairs of
    --prompt-tokens (the instruction included) and --response-tokens each, by
    default HelpSteer's means; memory is that of the largest pair that
    sequence_len lets through. With amopo.group_by_prompt, an example is a
    group, all of whose responses are rated differently; where the data is
    prepared here, the group of median length, and for memory the largest.
    A reference costs a forward pass more per step or, where it is taken once
    before the first step, a pass over all pairs of --pairs and --held-out.
    """
    check_free(output, force)
    with library_output(quiet=quiet, as_json=as_json):
        from axolotl_amopo.commands.plan.load import plan_config

        made, advice = plan_config(config, gpus=gpus, **options)
    changes = [{"change": text} | other.to_json() for text, other in advice]
    write_json(made.to_json() | {"changes": changes}, as_json=as_json, output=output)
    if not as_json and not quiet:
        from axolotl_amopo.commands.plan.text import print_plan

        print_plan(made, advice)
        if output:
            click.echo(f"Written: {output}")
    if made.fits is False:
        sys.exit(EXIT_FOUND)
