"""Write scores for people: at a terminal, and as Markdown."""

from collections.abc import Iterator
from typing import NamedTuple

from rich.markup import escape
from rich.padding import Padding

from axolotl_amopo.commands.kit.margins import SIMILAR_RATIO
from axolotl_amopo.commands.kit.text import plain_table, terminal
from axolotl_amopo.commands.score.report import (
    ScoreReport,
    ScoreRow,
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


class ScoreTable(NamedTuple):
    """Hold a table before it is drawn; its first column has names, the others numbers."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def tables(report: ScoreReport) -> Iterator[ScoreTable]:
    """Yield all tables of a report, in order."""
    others = [name for name in report.paths if name != report.base]
    for prompting in dict.fromkeys(row.prompting for row in report.rows):
        rows = report.block(prompting)
        title, by = report.titles[prompting], f"by {report.reward_name}"
        if report.base is None or not others:
            for model in report.paths:
                yield accuracy_table(f"{title}: accuracy of {model} {by}, %", rows, model)
        else:
            for model in others:
                yield change_table(f"{title}: accuracy {by}, %", rows, report.base, model)
        yield length_table(f"{title}: length and accuracy {by}, %", rows, list(report.paths))


def change_table(title: str, rows: list[ScoreRow], base: str, model: str) -> ScoreTable:
    """Return a model's accuracy against the base's, a row per rating."""
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
    return ScoreTable(title, headings, made)


def accuracy_table(title: str, rows: list[ScoreRow], model: str) -> ScoreTable:
    """Return a model's accuracy alone, a row per rating."""
    made = []
    for row in rows:
        one = row.models[model]
        low, high = one.interval or (None, None)
        between = f"{percent(low)} to {percent(high)}" if one.n else "-"
        made.append([row.name, str(one.n), percent(one.accuracy), between])
    return ScoreTable(title, ["", "pairs", "accuracy", "95 % CI"], made)


def length_table(title: str, rows: list[ScoreRow], models: list[str]) -> ScoreTable:
    """Return how length and accuracy go together, a row per rating and model."""
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
    return ScoreTable(title, headings, made)


def headlines(report: ScoreReport) -> list[str]:
    """Return lines that say what was scored, and how."""
    of = f" of {report.prompts} prompts" if report.prompts < report.pairs else ""
    whose = ", the objective's own" if report.reward == "objective" else ""
    against = [f"reference: {report.reference}"] if report.reference else []
    return [
        f"{report.pairs} pairs{of} from {report.source}",
        *(f"{name}: {path}" for name, path in report.paths.items()),
        f"reward: rl_beta ({report.beta:g}) x {report.reward_name}{whose}",
        *against,
    ]


def print_scores(report: ScoreReport) -> None:
    """Print the tables, the summary and the notes."""
    console = terminal()
    for line in headlines(report):
        console.print(escape(line))
    for table in tables(report):
        console.print()
        console.print(f"[bold]{escape(table.title)}[/]")
        drawn = plain_table()
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


def to_markdown(report: ScoreReport) -> str:
    """Return the tables, the summary and the notes as a Markdown document."""
    lines = [f"# Scores of {cell(report.config)}", ""]
    lines += [f"- {cell(line)}" for line in headlines(report)]
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
    """Return text that Markdown shows as it is, also in a table."""
    for mark in ("\\", "|", "*", "_", "`", "<", "["):
        text = text.replace(mark, "\\" + mark)
    return text
