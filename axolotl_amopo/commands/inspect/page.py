"""Write what `gather` found as an HTML page."""

from pathlib import Path

from axolotl_amopo.commands.inspect.gather import Report
from axolotl_amopo.commands.kit.page import render_page
from axolotl_amopo.commands.kit.text import percent

TEMPLATE = Path(__file__).with_name("page.html")


def inspection_page(report: Report) -> str:
    """Return the page's HTML; texts of the data are escaped."""
    return render_page(TEMPLATE, report=report, percent=percent)
