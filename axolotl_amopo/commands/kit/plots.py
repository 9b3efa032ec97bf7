"""Matplotlib figures as SVG inside a page."""

import io
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be found, read aloud, and takes a page's font
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# Of plots that stand in a page.
INK = "#1b1f24"  # becomes the page's own colour, dark or light
COLOURS = ("#8a949e", "#2f7fd1", "#d9730d", "#2b9a5b", "#a65bd6", "#c2255c")  # the base's first
PAGE_STYLE = STYLE | {
    "font.family": "sans-serif",
    "font.size": 11,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}
WIDTH = 4.6  # inches, which a phone shows at about their own size
# matplotlib's own entries, a date among them, would make every drawing of a figure another file.
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def svg_element(figure: Figure, **options: Any) -> str:
    """Return a figure as an <svg> element, without the head of an XML file.

    Args:
        options: of matplotlib's `savefig`.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=NO_METADATA, **options)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def canvas(height: float) -> Axes:
    """Return the axes of an empty figure of a page's width, `height` inches high."""
    return Figure(figsize=(WIDTH, height), layout="constrained").subplots()


def legend(axes: Axes) -> None:
    """Add a legend above the axes where several things have a label."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        axes.figure.legend(
            handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=10
        )


def page_svg(axes: Axes) -> Markup:
    """Return the figure as an element that fits the page's width and takes its colours."""
    return Markup(svg_element(axes.figure, transparent=True).replace(INK, "currentColor"))


def plain_label(name: str, longest: int | None = None) -> str:
    """Return a name that matplotlib draws as it is, cut to `longest` characters.

    `$` would start a formula, and a first `_` hide a legend's entry.
    """
    if longest is not None and len(name) > longest:
        name = f"{name[: longest - 1]}…"
    if name.startswith("_"):
        name = f" {name[1:]}"
    return name.replace("$", r"\$")
