"""The page and its plots in a folder."""

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import track

from axolotl_amopo.commands.report.page import marker, page
from axolotl_amopo.commands.report.plots import Board
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.training.runs import Run

PAGE = "index.html"


def names(runs: list[Run]) -> dict[str, Run]:
    """Runs by their names, or where two have the same one by their folders.

    Raises:
        AMoPOError: where a run is named twice.
    """
    counts = Counter(run.name for run in runs)
    named = {run.name if counts[run.name] == 1 else str(run.folder): run for run in runs}
    if len(named) < len(runs):
        raise AMoPOError(f"A run stands there twice: {', '.join(str(run.folder) for run in runs)}.")
    return named


def write(runs: dict[str, Run], folder: Path, *, force: bool = False, quiet: bool = False) -> Path:
    """Write the page, and its plots as SVG and PNG beside it.

    Returns:
        The page's path.

    Raises:
        AMoPOError: where something else is in the way, or can't be written.
    """
    path, mark = folder / PAGE, marker(list(runs.values()), folder)
    try:
        if folder.is_dir() and any(folder.iterdir()) and not force:
            page_there = (
                path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
            )
            if mark not in page_there[:1000]:
                raise AMoPOError(
                    f"{folder} is there already and holds something else than the report of this "
                    "run; name another --output, or add --force."
                )
        folder.mkdir(parents=True, exist_ok=True)
        console = Console(stderr=True)
        plots = list(Board(list(runs.values()), list(runs)).plots())
        drawn = [
            (plot, plot.svg(), plot.png())
            for plot in track(
                plots,
                description="Drawing",
                console=console,
                disable=quiet or not console.is_terminal,
                transient=True,
            )
        ]
        # First, for it tells the next call that all else in the folder is its own.
        path.write_text(page(runs, [(p, svg) for p, svg, _ in drawn], mark), encoding="utf-8")
        for plot, svg, png in drawn:
            (folder / f"{plot.name}.svg").write_text(svg, encoding="utf-8")
            (folder / f"{plot.name}.png").write_bytes(png)
    except OSError as error:
        raise AMoPOError(
            f"{error.filename or folder} can't be written ({error.strerror}); name another "
            "--output."
        ) from None
    return path
