"""Write what steering does for people at a terminal, and the tables of the page."""

from collections.abc import Iterator, Sequence

from rich.markup import escape

from axolotl_amopo.commands.kit.text import TextTable, print_tables, rater_name, terminal
from axolotl_amopo.commands.steer.collect import Asked
from axolotl_amopo.commands.steer.measure import WORDS, Effect, Interval, Steered, SteerReport

ABOUT = (
    "Rank correlation: Spearman's, of the number asked for and the rating obtained, over answers: "
    "1 follows, 0 does not. Where the number is a weight and lower ratings are better, it is of "
    "falling ratings, and so is 'never turns back'. Span: mean rating at the highest number asked "
    "for, less that at the lowest. In brackets 95 % intervals, bootstrap over questions; a star: "
    "the interval is on one side of 0. Volume: share of all compromises that one of the "
    "points beats, 0 to 1."
)


def headlines(report: SteerReport) -> list[str]:
    """Return lines that say what was measured."""
    each = f", {report.samples} answers each" if report.samples > 1 else ""
    lines = [f"{report.prompts} questions{each}"]
    for name in report.dimensions:
        low, high = report.scales[name]
        lower = ", lower is better" if name in report.lower else ""
        lines.append(
            f"{name}: rated {low:g} to {high:g}{lower}, by {rater_name(report.raters[name])}"
        )
    return lines


def tables(report: SteerReport) -> Iterator[TextTable]:
    """Yield all tables: what follows, what else changes, and the compromises."""
    curves = [(model, curve) for model in report.models for curve in model.curves]
    if curves:
        yield TextTable(
            "Asked and obtained",
            ["model", "dimension", "rank correlation", "span", "never turns back"],
            [
                [
                    model.name,
                    curve.dimension,
                    f"{curve.rank_correlation:+.2f} {between(curve.rank_interval)}",
                    effect(curve.span),
                    "yes" if curve.monotone else "no",
                ]
                for model, curve in curves
            ],
        )
    for name in dict.fromkeys(curve.dimension for _, curve in curves):
        own = [(model, curve) for model, curve in curves if curve.dimension == name]
        levels = sorted({level for _, curve in own for level in curve.levels})
        yield TextTable(
            f"{name}: mean rating, over what is asked for",
            ["model", *(f"{level:g}" for level in levels)],
            [
                [model.name, *(at(curve.levels, curve.means, level) for level in levels)]
                for model, curve in own
            ],
        )
    for model in report.models:
        if model.effects:
            yield effects(model)
    yield TextTable(
        "Without any instruction",
        ["model", *report.dimensions, WORDS],
        [
            [model.name, *(f"{one.change:.2f}" for one in model.plain.values())]
            for model in report.models
        ],
    )
    fronts = [(model.name, model.front) for model in report.models if model.front]
    if fronts:
        yield TextTable(
            "Compromises by weights",
            ["model", "points", "volume"],
            [
                [name, str(len(one.points)), f"{one.volume:.3f} {between(one.interval, 3)}"]
                for name, one in fronts
            ],
        )


def effects(model: Steered) -> TextTable:
    """Return what changes in a model's answers with each dimension that is asked for."""
    columns = list(next(iter(model.effects.values())))
    how = "from the lowest to the highest number" if model.curves else "against no instruction"
    return TextTable(
        f"{model.name}: what changes with what is asked for, {how}",
        ["asked for", *columns],
        [
            [asked, *(starred(row[name]) for name in columns)]
            for asked, row in model.effects.items()
        ],
    )


def starred(one: Effect) -> str:
    """Return a change, with a star where its interval is on one side of 0."""
    low, high = one.interval
    return f"{one.change:+.2f}{'*' if low > 0 or high < 0 else ' '}"


def effect(one: Effect) -> str:
    """Return a change and its interval."""
    return f"{one.change:+.2f} {between(one.interval)}"


def between(interval: Interval, decimals: int = 2) -> str:
    """Return an interval's two ends."""
    low, high = interval
    return f"[{low:.{decimals}f}, {high:.{decimals}f}]"


def at(levels: Sequence[float], means: Sequence[float], level: float) -> str:
    """Return the mean at a level, empty where it was not asked for."""
    return f"{means[levels.index(level)]:.2f}" if level in levels else ""


def print_report(report: SteerReport) -> None:
    """Print the tables and the notes."""
    console = terminal()
    for line in headlines(report):
        console.print(escape(line))
    print_tables(console, tables(report))
    console.print(f"\n{ABOUT}", style="dim")
    for note in report.notes:
        console.print(f"[yellow]![/] {escape(note)}")


def print_asks(asked: Sequence[Asked], each: int) -> None:
    """Print what would be asked, and how many answers that takes.

    Args:
        each: answers per ask.
    """
    console = terminal()
    for one in asked:
        console.print(f"[bold]{escape(one.name)}[/]: {len(one.asks)} x {each} answers")
        for ask in one.asks:
            console.print(f"  {escape(ask.name)}")
