"""Write what steering does as an HTML page."""

from pathlib import Path

from axolotl_amopo.commands.kit.page import render_page
from axolotl_amopo.commands.steer.measure import SteerReport
from axolotl_amopo.commands.steer.plots import draw_plots
from axolotl_amopo.commands.steer.text import ABOUT, headlines, tables

TEMPLATE = Path(__file__).with_name("page.html")


def steer_page(report: SteerReport) -> str:
    """Return the page's HTML; names of models and dimensions are escaped."""
    return render_page(
        TEMPLATE,
        report=report,
        headlines=headlines(report),
        tables=list(tables(report)),
        plots=draw_plots(report),
        about=ABOUT,
    )
