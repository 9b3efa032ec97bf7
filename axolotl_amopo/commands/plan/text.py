"""Print a plan at a terminal."""

from rich.table import Table

from axolotl_amopo.commands.kit.text import plain_table, terminal
from axolotl_amopo.commands.plan.cards import GIB
from axolotl_amopo.commands.plan.estimate import Plan

MEMORY_NAMES = {
    "weights": "weights of the model",
    "adapters": "adapters",
    "optimizer": "optimizer states",
    "criteria": "gradients of each criterion",
    "gradients": "gradients",
    "gathered": "gathered weights",
    "unpacked": "an unpacked 4- or 8-bit weight",
    "activations": "activations",
    "logits": "logits, a chunk at a time",
    "working": "recomputation and the like",
    "reserve": "CUDA context, fragmentation",
}


def print_plan(made: Plan, advice: list[tuple[str, Plan]]) -> None:
    """Print a plan, and each change that would make it fit with its own plan."""
    console = terminal()
    card, devices = made.card, made.sharding.devices
    where = f", {devices} x {card.name}" if card else (f", {devices} GPUs" if devices > 1 else "")
    how = f" ({made.sharding.name})" if made.sharding.name not in ("none", "ddp") else ""
    console.print(f"[bold]{made.model}[/]: {made.training}{where}{how}")
    facts = Table.grid(padding=(0, 2))
    share = made.trainable / made.parameters
    facts.add_row("parameters", f"{made.parameters:,}, {made.trainable:,} trained ({share:.2%})")
    ratio = made.tokens_per_step_unshared / made.tokens_per_step
    what = f"{made.pairs_per_step} pairs under {_number(made.prompts, 'prompt')}"
    if made.groups_per_step is not None:
        each = [_number(made.responses, "response"), _number(made.prompts, "prompt")]
        if not made.whole_groups:
            each.insert(1, _number(made.pairs_per_step // made.groups_per_step, "pair"))
        what = f"{made.groups_per_step} groups ({', '.join(each)} each)"
    facts.add_row("a step", f"{what}, {made.flops_per_step:.3g} FLOP")
    if made.parts > 1:
        facts.add_row(
            "in parts",
            f"{made.parts} per micro batch, one after another, for one more forward pass",
        )
    if made.reference == "adapter off":
        facts.add_row("reference", "the model with its adapter off, one more forward pass")
    if made.criteria:
        passes = _number(made.passes, "backward pass", "es")
        facts.add_row("gradients", f"of {made.criteria} criteria, {passes} per micro batch")
    facts.add_row(
        "tokens",
        f"{made.tokens_per_step:,} ({made.layout} layout); "
        f"{made.tokens_per_step_unshared:,} if prompts were not shared ({ratio:.2f} x)",
    )
    if made.flops_before:
        takes = f"{made.flops_before:.3g} FLOP"
        if made.seconds_before is not None:
            takes += f", about {made.seconds_before / 3600:.3g} hours"
        unit = "pairs" if made.groups_per_step is None else "groups"
        facts.add_row(
            "before a step",
            f"the reference's log-probabilities of {made.epoch} and of "
            f"{made.held_out_examples:,} held-out {unit}, {takes}",
        )
    if made.seconds is not None:
        hours = made.seconds_per_epoch / 3600
        facts.add_row(
            "an epoch",
            f"{made.epoch}, {made.steps_per_epoch:,} steps, about {hours:.3g} "
            f"hours at {made.utilisation:.0%} of {card.tflops:g} TFLOP/s",
        )
        facts.add_row("the run", f"{made.steps:,} steps, about {made.seconds / 3600:.3g} hours")
    console.print(facts)
    table = plain_table(headings=False)
    table.add_column()
    table.add_column(justify="right")
    for name, size in made.memory.items():
        if size:
            table.add_row(MEMORY_NAMES[name], f"{size / GIB:.2f}")
    table.add_row("[bold]all[/]", f"[bold]{made.total / GIB:.2f}[/]")
    part = ", one part at a time" if made.largest_parts > 1 else ""
    console.print(f"\nGiB on each device with {made.largest}{part}:", soft_wrap=True)
    console.print(table)
    if made.fits is None:
        return
    verdict = "[green]It fits[/]" if made.fits else "[red]It does not fit[/]"
    console.print(f"\n{verdict}, by this estimate: {made.summary()}", soft_wrap=True)
    if made.too_many_gradients:
        console.print(
            f"amopo.gradients keeps a gradient of every trained weight for each of {made.criteria} "
            f"criteria, {made.memory['criteria'] / GIB:.1f} GiB here; train an adapter, whose "
            "gradients are small, or with an objective that needs none of them, such as dpo.",
            soft_wrap=True,
        )
    for text, other in advice:
        outcome = "it would fit" if other.fits else "it still would not fit"
        console.print(f"  with {text} {outcome}: {other.total / GIB:.1f} GiB", soft_wrap=True)
    if not made.fits and not advice:
        console.print("  nothing that the plan knows makes it fit")


def _number(count: int, what: str, more: str = "s") -> str:
    return f"{count} {what}{more * (count != 1)}"
