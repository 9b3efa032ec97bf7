"""Print ratings, and what they would take, for people at a terminal."""

from collections.abc import Iterator, Mapping

from rich.markup import escape

from axolotl_amopo.commands.kit.text import percent, plain_table, rater_name, terminal
from axolotl_amopo.commands.rate.rate import RatedDimensionReport, RateReport
from axolotl_amopo.raters.base import Estimate

# From this share of equal ratings on, a dimension hardly tells responses apart.
MOSTLY = 0.9


def print_report(report: RateReport, output: str) -> None:
    """Print a table of the ratings, one of how they agree with people's, and notes."""
    console = terminal()
    of = f"{report.responses} responses to {report.prompts} prompts from {report.source}"
    console.print(escape(of))
    console.print()
    console.print("[bold]Ratings[/]")
    table = plain_table()
    table.add_column("", overflow="ellipsis", no_wrap=True)
    table.add_column("rater", overflow="ellipsis", no_wrap=True)
    for heading in ("scale", "rated", "mean", "range"):
        table.add_column(heading, justify="right")
    for one in report.dimensions:
        low, high = one.scale
        cells = [one.name, rater_name(one.rater), f"{low:g} to {high:g}", str(one.tally.rated)]
        cells += [f"{one.mean:.3g}", f"{one.lowest:.3g} to {one.highest:.3g}"]
        table.add_row(*map(escape, cells))
    console.print(table)
    compared = [one for one in report.dimensions if one.agreement]
    if compared:
        console.print()
        console.print("[bold]Agreement with the ratings that people gave[/]")
        table = plain_table()
        table.add_column("", overflow="ellipsis", no_wrap=True)
        headings = ("responses", "rank correlation", "95 % CI", "pairs", "same order, %")
        for heading in headings:
            table.add_column(heading, justify="right")
        for one in compared:
            table.add_row(escape(one.name), *_agreement(one))
        console.print(table)
    console.print()
    for text in totals(report):
        console.print(escape(text))
    for text in notes(report):
        console.print(f"[yellow]![/] {escape(text)}")
    console.print(escape(f"Written: {output}"), soft_wrap=True)


def totals(report: RateReport) -> Iterator[str]:
    """Yield what was asked and paid."""
    tallies = [one.tally for one in report.dimensions]
    if known := sum(one.from_journal for one in tallies):
        yield f"{known} ratings were in the journal, and nobody was asked for them."
    if requests := sum(one.requests for one in tallies):
        given = sum(one.prompt_tokens for one in tallies)
        made = sum(one.completion_tokens for one in tallies)
        cost = sum(one.cost for one in tallies)
        paid = f", cost {cost:.4g}" if cost else ""
        yield f"{requests} answers of judges: {given:,} + {made:,} tokens{paid}."


def notes(report: RateReport) -> Iterator[str]:
    """Yield what should be known before the ratings are used."""
    for one in report.dimensions:
        name, tally = one.name, one.tally
        if tally.missing:
            first = f" The first is {tally.problem}." if tally.problem else ""
            yield (
                f"{name}: {tally.missing} of {tally.responses} responses have no rating; the "
                f"dimension is left out there, which training takes with amopo.missing_ratings: "
                f"mask or drop.{first}"
            )
        if tally.unreadable:
            yield f"{name}: {tally.unreadable} of {tally.requests} answers held no rating."
        if tally.clipped:
            low, high = one.scale
            yield (
                f"{name}: {tally.clipped} values were outside of {low:g} to {high:g}, and count as "
                "the scale's end."
            )
        asked = tally.rated - tally.from_journal
        if 0 < tally.expected < asked:
            yield (
                f"{name}: {tally.expected} ratings are means over probabilities and {asked} in all "
                "were asked for; the others are the numbers that were written."
            )
        value, count = one.commonest
        if tally.rated > 1 and count >= MOSTLY * tally.rated:
            yield f"{name}: {count} of {tally.rated} ratings are {value:.3g}: they prefer nothing."
        elif tally.alike and tally.alike == tally.rated:
            yield (
                f"{name}: all draws of a response are alike; does the server sample, and is "
                "temperature above 0?"
            )


def print_estimate(estimate: Mapping[str, Estimate]) -> None:
    """Print what --dry-run found."""
    console = terminal()
    table = plain_table()
    table.add_column("", overflow="ellipsis", no_wrap=True)
    for heading in ("requests", "prompt tokens, about", "answer tokens, at most", "cost, about"):
        table.add_column(heading, justify="right")
    total = Estimate(*(sum(column) for column in zip(*estimate.values(), strict=True)))
    rows = [*estimate.items(), *([("all", total)] if len(estimate) > 1 else [])]
    for name, one in rows:
        cost = f"{one.cost:.4g}" if one.cost else "-"
        counts = (one.requests, one.prompt_tokens, one.completion_tokens)
        table.add_row(escape(name), *(f"{count:,}" for count in counts), cost)
    console.print(table)
    console.print("Tokens at 4 characters each; nobody was asked.", style="dim")


def _agreement(one: RatedDimensionReport) -> list[str]:
    found = one.agreement
    if found is None:
        return []
    between = "-" if found.interval is None else "{:+.2f} to {:+.2f}".format(*found.interval)
    correlation = "-" if found.rank_correlation is None else f"{found.rank_correlation:+.2f}"
    cells = [str(found.responses), correlation, between, str(found.pairs)]
    return [*cells, percent(found.same_order, 1, "")]
