"""Print what `gather` found at a terminal."""

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text as Styled

from axolotl_amopo.commands.inspect.gather import Entry, Report, ShownExample, Text
from axolotl_amopo.commands.kit.text import percent, plain_table, terminal

BARS = " ▁▂▃▄▅▆▇█"
STYLES = {"special": "dim", "text": "", "instruction": "cyan", "response": "green"}
LONGEST_TEXT = 900  # characters of a text that are printed


def print_inspection(report: Report) -> None:
    """Print each dataset's counts, ratings, lengths and examples, and the warnings."""
    console = terminal()
    for entry in report.entries:
        console.rule(escape(f"{entry.name} ({entry.split})"), align="left")
        _counts(entry, report, console)
        _ratings(entry, console)
        _between(entry, console)
        _tokens(entry, report, console)
        for example in entry.examples:
            _example(example, console)
    console.rule("All together", align="left")
    what = "pairs" if report.entries[0].groups_kept is None else "groups of pairs"
    console.print(f"{report.train_rows} {what} to train on, {report.eval_rows} to evaluate with")
    for warning in report.warnings:
        console.print(f"[yellow]![/] {escape(warning)}", soft_wrap=False)


def _counts(entry: Entry, report: Report, console: Console) -> None:
    console.print(
        f"{entry.rows} rows, {entry.prompts} prompts, {entry.responses} responses; "
        f"{entry.pairs_made} pairs made, {entry.pairs_kept} kept"
        + (f" in {entry.groups_kept} groups" if entry.groups_kept is not None else "")
    )
    for reason, count in sorted(entry.dropped.items()):
        console.print(f"  {count} {reason}")
    levels = report.rating_levels
    console.print(
        f"{entry.prompts_per_example:.3g} different prompts per "
        + ("pair" if entry.groups_kept is None else "group")
        + (f", with ratings rounded to {levels} levels" if levels else "")
    )


def _ratings(entry: Entry, console: Console) -> None:
    table = plain_table()
    for heading in ("dimension", "scale", "better", "ratings"):
        table.add_column(heading)
    table.add_column("missing", justify="right")
    table.add_column("longer wins", justify="right")
    for name, counts in entry.ratings.items():
        low, high = entry.scales[name]
        most = max((count for _, count in counts), default=1)
        bars = "".join(BARS[-(-8 * count // most)] for _, count in counts)
        ends = f"{counts[0][0].split()[0]} {bars} {counts[-1][0].split()[-1]}" if counts else "-"
        table.add_row(
            escape(name),
            f"{low:g} to {high:g}",
            "lower" if name in entry.lower_is_better else "higher",
            ends,
            str(entry.missing[name]),
            percent(entry.longer_wins[name]),
        )
    table.add_row("overall", "", "", "", "", percent(entry.longer_wins["overall"]))
    console.print(Padding(table, (1, 0)))


def _between(entry: Entry, console: Console) -> None:
    if len(entry.ratings) < 2:
        return
    console.print("How often two dimensions name different winners (and how they correlate):")
    table = plain_table()
    table.add_column("")
    names = list(entry.ratings)
    for number, _ in enumerate(names[:-1], start=1):
        table.add_column(str(number), justify="right")
    for i, first in enumerate(names):
        cells = []
        for second in names[:i]:
            r = entry.correlation[first][second]
            shown = "-" if r is None else f"{r:+.2f}"
            cells.append(f"{percent(entry.disagreement[first][second])} ({shown})")
        table.add_row(escape(f"{i + 1} {first}"), *cells)
    console.print(table)
    console.print()


def _tokens(entry: Entry, report: Report, console: Console) -> None:
    spread = ", ".join(f"{name} {value}" for name, value in entry.tokens.items())
    console.print(
        f"Tokens of a pair's longest sequence: {spread}; sequence_len is {report.sequence_len}, "
        f"{entry.too_long} pairs are longer"
    )
    if entry.repeated_prompts or entry.repeated_pairs:
        console.print(
            f"Twice in the data: {entry.repeated_prompts} prompts, {entry.repeated_pairs} pairs"
        )
    console.print()


def _example(example: ShownExample, console: Console) -> None:
    console.rule(escape(example.where), align="left", style="dim")
    titles = ("winner", "loser") if len(example.responses) > 1 else ("response",)
    for title, ratings in zip(titles, example.ratings, strict=True):
        text = ", ".join(
            f"{name} {'-' if rating is None else format(rating, 'g')}"
            for name, rating in ratings.items()
        )
        which = f"{title} overall" if len(titles) > 1 else "its ratings"
        console.print(f"{which}: {escape(text)}")
    first, *others = example.seen
    console.print(f"\n[bold]{escape(first.prompt)}[/]{'' if first.weighs else ' (weighs nothing)'}")
    console.print(styled(first.pieces))
    for title, response in zip(titles, example.responses, strict=True):
        console.print(f"[bold]{title}[/], all of it bears the loss")
        console.print(styled(response))
    for seen in others:
        console.print(
            f"[bold]{escape(seen.prompt)}[/]: the {('first', 'second')[seen.chosen]} wins"
            + ("" if seen.weighs else ", weighs nothing")
        )
        console.print(styled([piece for piece in seen.pieces if piece.kind == "instruction"]))
    console.print()


def styled(pieces: list[Text]) -> Styled:
    """Return pieces of text in their colours, the middle of long ones left out."""
    made = Styled()
    for piece in pieces:
        text = piece.text
        if len(text) > LONGEST_TEXT:
            half = LONGEST_TEXT // 2
            text = f"{text[:half]} [... {len(text) - LONGEST_TEXT} characters ...] {text[-half:]}"
        made.append(text, style=STYLES[piece.kind])
    return made
