"""Write a comparison as an HTML page."""

from pathlib import Path

from axolotl_amopo.commands.compare.compare import ComparisonReport
from axolotl_amopo.commands.compare.plots import draw_plots
from axolotl_amopo.commands.compare.text import ABOUT, headlines, tables
from axolotl_amopo.commands.kit.page import render_page

TEMPLATE = Path(__file__).with_name("page.html")


def comparison_page(report: ComparisonReport) -> str:
    """Return the page's HTML; what the data and the configs say is escaped."""
    changes = {
        name: ", ".join(f"{key}: {value}" for key, value in keys.items()) or "the base as it is"
        for name, keys in report.changes.items()
    }
    return render_page(
        TEMPLATE,
        report=report,
        headlines=headlines(report),
        tables=list(tables(report)),
        changes=changes,
        plots=draw_plots(report),
        about=ABOUT,
    )
