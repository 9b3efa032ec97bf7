"""`axolotl amopo ...`: commands of ours, and axolotl's with `--amopo.*` overrides."""

import os

import click

from axolotl_amopo.commands.configs import configs
from axolotl_amopo.commands.generate.command import chat, generate, template
from axolotl_amopo.commands.inspect.command import inspect
from axolotl_amopo.commands.plan.command import plan
from axolotl_amopo.commands.report.command import report
from axolotl_amopo.commands.score.command import score
from axolotl_amopo.config.overrides import ENVIRONMENT_VARIABLE, split_overrides, to_json

PASSED_ON = ("preprocess", "train", "evaluate", "inference", "merge-lora")


@click.group()
def amopo() -> None:
    """AMoPO: look at data, plan, see what a run did, and `axolotl COMMAND` with overrides.

    axolotl's own commands know no options of plugins, so `axolotl train --amopo.gamma 1.5` would
    hand the option to the launcher. These take it, and everything that axolotl's command takes:

        axolotl amopo train config.yml --amopo.gamma 1.5 --learning-rate 1e-5
    """


def _passed_on(name: str) -> click.Command:
    @click.command(
        name,
        add_help_option=False,
        # What follows the config is passed on as it is, a launcher's `--` included.
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
        short_help=f"axolotl {name}, with --amopo.KEY VALUE",
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    @click.pass_context
    def command(ctx: click.Context, arguments: tuple[str, ...]) -> None:
        from axolotl.cli.main import cli as axolotl

        overrides, rest = split_overrides(arguments)
        os.environ[ENVIRONMENT_VARIABLE] = to_json(overrides)
        inner = axolotl.commands[name]
        with inner.make_context(name, list(rest), parent=ctx.find_root()) as inner_ctx:
            inner.invoke(inner_ctx)

    return command


for _command in (chat, configs, generate, inspect, plan, report, score, template):
    amopo.add_command(_command)
for _name in PASSED_ON:
    amopo.add_command(_passed_on(_name))
