"""Text for people at a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from axolotl_amopo.errors import visible


def percent(share: float | None, decimals: int = 0, sign: str = "%") -> str:
    """Return a share of 0 to 1 in percent, "-" for None."""
    return "-" if share is None else f"{100 * share:.{decimals}f}{sign}"


def rater_name(provenance: Mapping[str, Any]) -> str:
    """Return which rater it was, in a few words."""
    kind = provenance["rater"]
    return f"{kind.replace('_', ' ')} {provenance.get(kind) or provenance.get('model')}"


def terminal(*, colours: bool | None = None) -> Console:
    """Return a console of 80 columns on stdout.

    Args:
        colours: whether to use them; None leaves that to rich.
    """
    console = Console(width=80, highlight=False, force_terminal=colours)
    console.push_render_hook(_Harmless())
    return console


class _Harmless(RenderHook):
    """Write control characters out in all that is printed: data and models may hold them."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Visible(one) for one in renderables]


class _Visible:
    def __init__(self, inner: ConsoleRenderable):
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.inner, options):
            # Those with a control are rich's own commands to the terminal.
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def bars_console() -> Console:
    """Return the console of progress bars: stderr, so that stdout holds results alone.

    It is the stderr of now. `Console(stderr=True)` would look for it at each drawing, and find the
    copy for debug.log that axolotl puts before it (utils/tee.py): a copy with a lock, which waits
    for itself when a bar of tqdm's is flushed through rich.
    """
    return Console(file=sys.stderr)


@contextlib.contextmanager
def progress_bars(
    text: str, *, disable: bool
) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Give a function that begins a bar, of a name and a total, and returns what advances it.

    Args:
        text: what stands before a bar, with {} for the name.
        disable: show nothing.
    """
    with Progress(console=bars_console(), disable=disable) as bars:

        def begin(name: str, total: int) -> Callable[[int], None]:
            task = bars.add_task(text.format(name), total=total)
            return lambda done: bars.advance(task, done)

        yield begin


def plain_table(*, headings: bool = True) -> Table:
    """Return a table without lines between its cells."""
    return Table(box=None, pad_edge=False, show_header=headings)


class TextTable(NamedTuple):
    """Hold a table before it is drawn; its first column has names, the others numbers."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def print_tables(console: Console, tables: Iterable[TextTable]) -> None:
    """Print tables with their titles."""
    for table in tables:
        console.print()
        console.print(f"[bold]{escape(table.title)}[/]")
        drawn = plain_table()
        for number, heading in enumerate(table.headings):
            justify = "right" if number else "left"
            drawn.add_column(escape(heading), justify=justify, overflow="fold")
        for cells in table.rows:
            drawn.add_row(*map(escape, cells))
        console.print(drawn)
