"""The click command `axolotl amopo online`."""

import shlex
from pathlib import Path

import click

from axolotl_amopo.commands.kit.options import JSON, QUIET, command, library_output, write_json
from axolotl_amopo.errors import visible


@command(needs_axolotl=False)
@click.argument("online_file", metavar="ONLINE_YML", type=click.Path(exists=True, dir_okay=False))
@click.option("--rounds", type=click.IntRange(1), metavar="N", help="Stop after so many rounds.")
@click.option("--dry-run", is_flag=True, help="Show every round's commands; run none.")
@click.option(
    "--force", is_flag=True, help="Go on with a plan that has changed; what is done stays."
)
@JSON
@QUIET
def online(
    online_file: str,
    rounds: int | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Go in rounds: draw responses, rate them, train on them, measure.

    \b
        axolotl amopo online online.yml --dry-run
        axolotl amopo online online.yml

    ONLINE_YML names axolotl's config, raters, prompts, an output folder and the
    number of rounds. Each round draws responses with the model of the round
    before, and each stage is a command on files in the round's folder: look at
    them, or repeat one by hand. Called again, it goes on where it was stopped;
    with more rounds in ONLINE_YML, it goes further.
    """
    with library_output(quiet=False, as_json=True):
        from axolotl_amopo.commands.online.plan import read_online
        from axolotl_amopo.commands.online.stages import run_rounds, stages

        plan = read_online(Path(online_file))
        if rounds:
            plan.file.rounds = min(rounds, plan.file.rounds)
        if not dry_run:
            told = run_rounds(
                plan,
                lambda text: None if quiet else click.echo(visible(text), err=True),
                force=force,
            )
    if dry_run:
        commands = {
            f"round-{k}": [stage.command for stage in stages(plan, k)]
            for k in range(1, plan.file.rounds + 1)
        }
        write_json(commands, as_json=as_json)
        if not as_json and not quiet:
            for name, each in commands.items():
                click.echo(f"{name}:")
                for one in each:
                    click.echo(f"  {visible(shlex.join(one))}")
        return
    write_json(told, as_json=as_json)
    if not (quiet or as_json):
        from axolotl_amopo.commands.online.text import print_rounds

        print_rounds(plan, told)
