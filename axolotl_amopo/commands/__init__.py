"""`axolotl amopo ...`: commands of ours, and axolotl's with `--amopo.*` overrides.

axolotl's own start prints a banner to stdout before it imports anything of ours. The console script
`axolotl-amopo` is the same group without it, for programs that read stdout.
"""

import click
from dotenv import load_dotenv

from axolotl_amopo.commands.chat.command import chat
from axolotl_amopo.commands.compare.command import compare
from axolotl_amopo.commands.configs.command import configs
from axolotl_amopo.commands.generate.command import generate
from axolotl_amopo.commands.init.command import init
from axolotl_amopo.commands.inspect.command import inspect
from axolotl_amopo.commands.online.command import online
from axolotl_amopo.commands.passed_on import NAMES, passed_on_command
from axolotl_amopo.commands.plan.command import plan
from axolotl_amopo.commands.rate.command import rate
from axolotl_amopo.commands.reference.command import reference
from axolotl_amopo.commands.report.command import report
from axolotl_amopo.commands.score.command import score
from axolotl_amopo.commands.steer.command import steer
from axolotl_amopo.commands.template.command import template


@click.group()
def amopo() -> None:
    """AMoPO: look at data, plan, see what a run did, and `axolotl COMMAND` with overrides.

    axolotl's own commands know no options of plugins, so `axolotl train --amopo.gamma 1.5` would
    hand the option to the launcher. These take it, and everything that axolotl's command takes:

        axolotl amopo train config.yml --amopo.gamma 1.5 --learning-rate 1e-5

    `axolotl-amopo COMMAND` is the same without axolotl's banner: with --json, stdout is JSON alone.
    An error is one sentence; AXOLOTL_AMOPO_TRACEBACK=1 adds where it was raised.
    """


def main() -> None:
    """Run `axolotl-amopo`."""
    load_dotenv()  # as axolotl's own start does, see `kit.options.Command` too
    amopo(prog_name="axolotl-amopo")


_commands = (chat, compare, configs, generate, init, inspect, online, plan, rate)
_commands += (reference, report, score, steer, template)
for _command in _commands:
    amopo.add_command(_command)
for _name in NAMES:
    amopo.add_command(passed_on_command(_name))
