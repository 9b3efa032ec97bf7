"""Matplotlib figures as SVG inside a page."""

import io
from typing import Any

from matplotlib.figure import Figure

STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be found, read aloud, and takes a page's font
    "axes.spines.top": False,
    "axes.spines.right": False,
}
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


def plain_label(name: str, longest: int | None = None) -> str:
    """Return a name that matplotlib draws as it is, cut to `longest` characters.

    `$` would start a formula, and a first `_` hide a legend's entry.
    """
    if longest is not None and len(name) > longest:
        name = f"{name[: longest - 1]}…"
    if name.startswith("_"):
        name = f" {name[1:]}"
    return name.replace("$", r"\$")
