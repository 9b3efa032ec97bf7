"""The click command `axolotl amopo plan`."""

import json
import sys
from typing import Any

import click

from axolotl_amopo.commands.kit.options import (
    EXIT_FOUND,
    EXITS,
    JSON,
    QUIET,
    command,
    library_output,
    plain_errors,
)


@command(epilog=f"{EXITS}, {EXIT_FOUND} where it does not fit.")
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option("--gpu", metavar="NAME", help="A card, e.g. h100-80gb; cpu for this machine.")
@click.option("--gpu-memory", type=float, metavar="GIB", help="Memory of a card by hand.")
@click.option("--gpu-tflops", type=float, metavar="N", help="Its dense bf16 TFLOP/s.")
@click.option("--gpus", type=click.IntRange(1), default=1, help="Cards in all, over all nodes.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=480, show_default=True)
@click.option("--response-tokens", type=click.IntRange(1), default=115, show_default=True)
@click.option("--pairs", type=click.IntRange(1), default=10_000, show_default=True)
@click.option(
    "--utilisation",
    type=click.FloatRange(0.01, 1),
    default=0.4,
    show_default=True,
    help="Share of the card's speed that training reaches.",
)
@QUIET
@JSON
def plan(config: str, gpus: int, quiet: bool, as_json: bool, **options: Any) -> None:
    """Estimate a run's tokens, memory and time, and what would make it fit.

    \b
        axolotl amopo plan config.yml --gpu h100-80gb --gpus 8

    Only the model's config is read: of a local folder, of the models that the
    examples name, or from the hub. Tokens, FLOPs and time are those of pairs of
    --prompt-tokens (the instruction included) and --response-tokens each, by
    default HelpSteer's means; memory is that of the largest pair that
    sequence_len lets through.
    """
    with plain_errors(), library_output(quiet=quiet, as_json=as_json):
        from axolotl_amopo.commands.plan.load import plan_config

        made, advice = plan_config(config, gpus=gpus, **options)
    if as_json:
        changes = [{"change": text} | other.to_json() for text, other in advice]
        click.echo(json.dumps(made.to_json() | {"changes": changes}))
    elif not quiet:
        from axolotl_amopo.commands.plan.text import print_plan

        print_plan(made, advice)
    if made.fits is False:
        sys.exit(EXIT_FOUND)
