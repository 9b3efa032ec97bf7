"""Print a report at a terminal."""

from rich.padding import Padding
from rich.text import Text

from axolotl_amopo.commands.kit.text import plain_table, terminal
from axolotl_amopo.commands.report.findings import headline
from axolotl_amopo.commands.report.report import ReportedRun
from axolotl_amopo.training.runs import (
    compared_metrics,
    explain_change,
    explain_numbers,
    format_metric,
)

COLOURS = {"problem": "red", "warning": "yellow", "note": "cyan"}


def print_report(runs: list[ReportedRun]) -> None:
    """Print each run's headline, table, outcome and findings."""
    console = terminal()
    for one in runs:
        console.rule(Text(one.name), align="left")
        console.print(Text(headline(one.run)))
        table = plain_table()
        table.add_column("prompt", overflow="fold")
        metrics = compared_metrics([one.run])
        for metric in metrics:
            table.add_column(metric, justify="right")
            table.add_column("after", justify="right")
        for prompt, changes in one.prompts.items():
            cells = [
                format_metric(metric, value)
                for metric in metrics
                for value in (changes[metric].before, changes[metric].after)
            ]
            table.add_row(Text(prompt), *cells)
        console.print(Padding(table, (1, 0)))
        about = f"{explain_change(one.run)} {explain_numbers(one.run)}".rstrip()
        console.print(Text(about, style="dim"))
        for sentence in one.outcome:
            console.print(Text(sentence))
        if not one.findings:
            console.print("Nothing looks wrong.", style="dim")
        for finding in one.findings:
            colour = COLOURS[finding.severity]
            console.print(Text.assemble((finding.severity, f"bold {colour}"), f" {finding.text}"))
            console.print(Padding(Text(finding.advice, style="dim"), (0, 0, 0, 2)))
        console.print()
