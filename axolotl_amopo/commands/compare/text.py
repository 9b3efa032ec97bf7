"""Write comparisons for people at a terminal, and the tables of the page."""

from collections.abc import Iterator

from rich.markup import escape

from axolotl_amopo.commands.compare.compare import ComparisonReport, PlannedRuns, duration
from axolotl_amopo.commands.compare.comparison import CONFLICT, LENGTH, MEAN, WORST
from axolotl_amopo.commands.compare.statistics import Cell, Prompting, Table
from axolotl_amopo.commands.kit.text import TextTable, percent, print_tables, terminal

PROMPTS: dict[Prompting, str] = {
    "own": "under the prompts that each was trained with",
    "plain": "without any instruction",
}
TITLES = {
    MEAN: "mean over dimensions",
    WORST: "worst dimension",
    CONFLICT: "pairs where dimensions disagree",
    LENGTH: "mean over dimensions, length-controlled",
}
ABOUT = (
    "Accuracy: % of held-out pairs ordered as rated, seeds averaged, folds put together. CI: 95 %, "
    "bootstrap over prompts. p: two models swapped prompt by prompt at random. Holm: corrected "
    "over the comparisons that compare.yml names. sd: over seeds."
)
GIB = 1024**3


def title_of(table: Table) -> str:
    """Return a table's title."""
    what = TITLES.get(table.measure, table.measure)
    return f"{what}, {PROMPTS[table.prompting]}"


def tables(report: ComparisonReport) -> Iterator[TextTable]:
    """Yield all tables: the means at a glance, one per measure, and what runs cost."""
    for prompting in dict.fromkeys(table.prompting for table in report.tables):
        own = [table for table in report.tables if table.prompting == prompting]
        headings = ["accuracy, %", *(table.measure for table in own)]
        rows = [[name, *(value(table.cells.get(name)) for table in own)] for name in report.names]
        yield TextTable(f"At a glance, {PROMPTS[prompting]}", headings, rows)
    for table in report.tables:
        yield measure_table(report, table)
    if report.costs:
        yield cost_table(report)


def measure_table(report: ComparisonReport, table: Table) -> TextTable:
    """Return a measure's table, a row per variant."""
    rows = []
    for name in report.names:
        cell = table.cells.get(name)
        if cell is None or cell.value is None:
            rows.append([marked(report, name), *["-"] * 7])
            continue
        change = cell.change
        cells = [
            value(cell),
            between(cell.interval, sign=False),
            percent(cell.run_deviation, 1, ""),
        ]
        if change:
            corrected = "-" if change.p_holm is None else p_value(change.p_holm)
            cells += [f"{100 * change.difference + 0.0:+.1f}", between(change.interval, sign=True)]
            cells += [p_value(change.p), corrected]
        else:
            cells += ["-"] * 4
        rows.append([marked(report, name), *cells])
    headings = ["", "%", "95 % CI", "sd", f"- {report.baseline}", "95 % CI", "p", "Holm"]
    title = f"{title_of(table)} ({table.pairs} pairs, {table.prompts} prompts)"
    return TextTable(title, headings, rows)


def cost_table(report: ComparisonReport) -> TextTable:
    """Return what an average run of each variant cost."""
    rows = [
        [
            marked(report, name),
            str(cost.runs),
            duration(cost.seconds),
            f"{cost.steps:g}",
            f"{cost.pairs:g}",
            f"{cost.tokens:,.0f}",
            f"{cost.peak_bytes / GIB:.2f} GiB",
        ]
        for name in report.names
        if (cost := report.costs.get(name))
    ]
    headings = ["a run's mean", "runs", "training", "steps", "pairs", "tokens", "peak memory"]
    return TextTable("Cost", headings, rows)


def marked(report: ComparisonReport, name: str) -> str:
    """Return a name, with a star where its budget is not the baseline's."""
    cost = report.costs.get(name)
    return f"{name}*" if cost and cost.differs else name


def value(cell: Cell | None) -> str:
    """Return a cell's accuracy in percent."""
    return percent(cell.value if cell else None, 1, "")


def between(interval: tuple[float, float] | None, *, sign: bool) -> str:
    """Return the ends of an interval in percent."""
    if interval is None:
        return "-"
    form = "+.1f" if sign else ".1f"
    low, high = (format(100 * end + 0.0, form) for end in interval)
    return f"{low} to {high}"


def p_value(p: float) -> str:
    """Return a p-value as tables have it."""
    return "<.001" if p < 0.001 else f"{p:.3f}"


def headlines(report: ComparisonReport) -> list[str]:
    """Return lines that say what was compared."""
    lines = [
        f"{report.done} of {report.planned} runs; {report.pairs} held-out pairs of "
        f"{report.prompts} prompts",
        f"differences are against {report.baseline}; {report.named} comparisons named beforehand",
    ]
    if report.checked:
        same = report.checked - len(report.differs)
        lines.append(f"{same} of {report.checked} checked runs agree with the real commands")
    if any(cost.differs for cost in report.costs.values()):
        lines.append(f"*: trained on another budget than {report.baseline}")
    return lines


def print_comparison(report: ComparisonReport) -> None:
    """Print the tables and the notes."""
    console = terminal()
    for line in headlines(report):
        console.print(escape(line))
    print_tables(console, tables(report))
    console.print(f"\n{ABOUT}", style="dim")
    for label, reason in report.failed.items():
        console.print(f"[red]failed[/] {escape(label)}: {escape(reason)}")
    for note in report.notes:
        console.print(f"[yellow]![/] {escape(note)}")


def print_plan(planned: list[PlannedRuns]) -> None:
    """Print the runs that a comparison would make, and what `plan` says of each variant."""
    console = terminal()
    for one in planned:
        left = f", {one.done} complete" if one.done else ""
        runs = f"{one.runs} run{'' if one.runs == 1 else 's'}"
        console.print(f"[bold]{escape(one.name)}[/]: {runs}{left}")
        for key, changed in one.changes.items():
            console.print(f"  {escape(f'{key}: {changed}')}")
        if one.plan:
            total = sum(one.plan["memory"].values())
            console.print(
                f"  plan: {one.plan['tokens_per_step']:,} tokens and "
                f"{one.plan['flops_per_step']:.3g} FLOP per step, {total / GIB:.2f} GiB"
            )
        else:
            console.print(f"  no plan: {one.why_no_plan}", style="dim")
    total = sum(one.runs - one.done for one in planned)
    console.print(f"{total} runs to make")
