"""A report for people: at a terminal of 80 columns, and as Markdown."""

from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table as Printed

from axolotl_amopo.commands.score.measure import SIMILAR_RATIO
from axolotl_amopo.commands.score.report import (
    FORMULAS,
    TITLES,
    Report,
    Row,
    p_value,
    percent,
    signed,
)

ABOUT_LENGTH = (
    "better is longer: share of the pairs whose better response is the longer one; prefers longer: "
    "share in which the model prefers that; similar: accuracy where neither response has more than "
    f"{SIMILAR_RATIO:g} times the other's tokens; adjusted: accuracy of what of the margin length "
    "does not explain."
)


class Table(NamedTuple):
    """A table before it is drawn; its first column is a name, the others are numbers."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def tables(report: Report) -> Iterator[Table]:
    """All tables of a report, in order."""
    others = [name for name in report.paths if name != report.base]
    for prompting in dict.fromkeys(row.prompting for row in report.rows):
        rows = report.block(prompting)
        title = TITLES[prompting]
        if report.base is None or not others:
            for model in report.paths:
                yield alone(f"{title}: accuracy of {model}, %", rows, model)
        else:
            for model in others:
                yield compared(f"{title}: accuracy, %", rows, report.base, model)
        yield length(f"{title}: length and accuracy, %", rows, list(report.paths))


def compared(title: str, rows: list[Row], base: str, model: str) -> Table:
    made = []
    for row in rows:
        before, after, change = row.models[base], row.models[model], row.changes.get(model)
        cells = [row.name, str(after.n), percent(before.accuracy), percent(after.accuracy)]
        if change is None:
            cells += ["-"] * 4
        else:
            low, high = change.interval
            cells += [
                signed(change.difference),
                f"{signed(low)} to {signed(high)}",
                p_value(change.p),
                p_value(change.p_holm),
            ]
        made.append(cells)
    headings = ["", "pairs", base, model, "change", "95 % CI", "p", "Holm"]
    return Table(title, headings, made)


def alone(title: str, rows: list[Row], model: str) -> Table:
    made = []
    for row in rows:
        one = row.models[model]
        low, high = one.interval or (None, None)
        between = f"{percent(low)} to {percent(high)}" if one.n else "-"
        made.append([row.name, str(one.n), percent(one.accuracy), between])
    return Table(title, ["", "pairs", "accuracy", "95 % CI"], made)


def length(title: str, rows: list[Row], models: list[str]) -> Table:
    headings = ["", "model", "better is longer", "prefers longer", "similar (n)", "adjusted"]
    made = []
    for row in rows:
        for model in models:
            one = row.models[model]
            first = model == models[0]
            made.append(
                [
                    row.name if first else "",
                    model,
                    percent(one.longer_wins) if first else "",
                    percent(one.longer_preferred),
                    f"{percent(one.similar_accuracy)} ({one.similar_n})",
                    percent(one.adjusted_accuracy),
                ]
            )
    return Table(title, headings, made)


def head(report: Report) -> list[str]:
    """What was scored, and how."""
    of = f" of {report.prompts} prompts" if report.prompts < report.pairs else ""
    return [
        f"{report.pairs} pairs{of} from {report.source}",
        *(f"{name}: {path}" for name, path in report.paths.items()),
        f"reward: {FORMULAS[report.reward]}"
        + (f", rl_beta {report.beta:g}" if report.reward != "sum" else f" ({report.beta:g})"),
    ]


def show(report: Report, console: Console) -> None:
    for line in head(report):
        console.print(escape(line))
    for table in tables(report):
        console.print()
        console.print(f"[bold]{escape(table.title)}[/]")
        drawn = Printed(box=None, pad_edge=False)
        for i, heading in enumerate(table.headings):
            if i == 0:
                drawn.add_column(heading, overflow="ellipsis", no_wrap=True)
            else:
                drawn.add_column(escape(heading), justify="right")
        for cells in table.rows:
            drawn.add_row(*map(escape, cells))
        console.print(drawn)
    console.print(Padding(ABOUT_LENGTH, (1, 0, 0, 0)), style="dim")
    console.print()
    for text in report.summary:
        console.print(f"- {escape(text)}")
    for text in report.notes:
        console.print(f"[yellow]![/] {escape(text)}")


def markdown(report: Report) -> str:
    """The same as a Markdown document."""
    lines = [f"# Scores of {cell(report.config)}", ""]
    lines += [f"- {cell(line)}" for line in head(report)]
    for title, headings, rows in tables(report):
        lines += ["", f"## {cell(title)}", ""]
        lines += ["| " + " | ".join(map(cell, headings)) + " |"]
        lines += ["| --- |" + " ---: |" * (len(headings) - 1)]
        lines += ["| " + " | ".join(map(cell, cells)) + " |" for cells in rows]
    lines += ["", cell(ABOUT_LENGTH), "", "## In words", ""]
    lines += [f"- {cell(text)}" for text in report.summary]
    if report.notes:
        lines += ["", "## To be kept in mind", "", *(f"- {cell(text)}" for text in report.notes)]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """Text that Markdown takes as it is, in a table too."""
    for mark in ("\\", "|", "*", "_", "`", "<", "["):
        text = text.replace(mark, "\\" + mark)
    return text
