"""`axolotl amopo plan CONFIG`: what a run needs, before anything is downloaded."""

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from axolotl_amopo.commands.kit.options import EXITS, FOUND, JSON, QUIET, libraries, told
from axolotl_amopo.commands.plan.cards import GIB

if TYPE_CHECKING:
    from axolotl_amopo.commands.plan.estimate import Plan

WHAT = {
    "weights": "weights of the model",
    "adapters": "adapters",
    "optimizer": "optimizer states",
    "gradients": "gradients",
    "gathered": "gathered weights",
    "unpacked": "an unpacked 4- or 8-bit weight",
    "activations": "activations",
    "logits": "logits, a chunk at a time",
    "working": "recomputation and the like",
    "reserve": "CUDA context, fragmentation",
}


@click.command(
    context_settings={"max_content_width": 80},
    epilog=f"{EXITS}, {FOUND} where it does not fit.",
)
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
    """What a run needs: tokens, memory, time, and what would make it fit.

    \b
        axolotl amopo plan config.yml --gpu h100-80gb --gpus 8

    Only the model's config is read: of a local folder, of the models that the
    examples name, or from the hub. Tokens, FLOPs and time are those of pairs of
    --prompt-tokens (the instruction included) and --response-tokens each, by
    default HelpSteer's means; memory is that of the largest pair that
    sequence_len lets through.
    """
    with told(), libraries(quiet=quiet, as_json=as_json):
        from axolotl_amopo.commands.plan.load import plan_config

        made, advice = plan_config(config, gpus=gpus, **options)
    if as_json:
        changes = [{"change": text} | other.to_json() for text, other in advice]
        click.echo(json.dumps(made.to_json() | {"changes": changes}))
    elif not quiet:
        show(made, advice)
    if made.fits is False:
        sys.exit(FOUND)


def show(made: "Plan", advice: list[tuple[str, "Plan"]]) -> None:
    """Print a plan for people, 80 columns wide."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=80, highlight=False)
    card, devices = made.card, made.sharding.devices
    where = f", {devices} x {card.name}" if card else (f", {devices} GPUs" if devices > 1 else "")
    how = f" ({made.sharding.name})" if made.sharding.name not in ("none", "ddp") else ""
    console.print(f"[bold]{made.model}[/]: {made.training}{where}{how}")
    facts = Table.grid(padding=(0, 2))
    share = made.trainable / made.parameters
    facts.add_row("parameters", f"{made.parameters:,}, {made.trainable:,} trained ({share:.2%})")
    ratio = made.tokens_per_step_unshared / made.tokens_per_step
    facts.add_row(
        "a step",
        f"{made.pairs_per_step} pairs under {made.prompts} prompts, {made.flops_per_step:.3g} FLOP",
    )
    facts.add_row(
        "tokens",
        f"{made.tokens_per_step:,} ({made.layout} layout); "
        f"{made.tokens_per_step_unshared:,} if prompts were not shared ({ratio:.2f} x)",
    )
    if made.seconds_per_epoch is not None:
        hours = made.seconds_per_epoch / 3600
        facts.add_row(
            "an epoch",
            f"{made.epoch_pairs:,} pairs, {made.steps_per_epoch:,} steps, {hours:.3g} hours at "
            f"{made.utilisation:.0%} of {card.tflops:g} TFLOP/s",
        )
    console.print(facts)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, size in made.memory.items():
        if size:
            table.add_row(WHAT[name], f"{size / GIB:.2f}")
    table.add_row("[bold]all[/]", f"[bold]{made.total / GIB:.2f}[/]")
    console.print(f"\nGiB on each device with pairs that fill sequence_len ({made.sequence_len}):")
    console.print(table)
    if made.fits is None:
        return
    verdict = "[green]It fits[/]" if made.fits else "[red]It does not fit[/]"
    console.print(f"\n{verdict}: {made.summary()}", soft_wrap=True)
    for text, other in advice:
        outcome = "it would fit" if other.fits else "it still would not fit"
        console.print(f"  with {text} {outcome}: {other.total / GIB:.1f} GiB", soft_wrap=True)
    if not made.fits and not advice:
        console.print("  nothing that the plan knows makes it fit")
