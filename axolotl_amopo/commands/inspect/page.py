"""A report as one HTML page that needs nothing else, for a desk and for a phone."""

from pathlib import Path

from jinja2 import Environment

from axolotl_amopo.commands.inspect.gather import Report
from axolotl_amopo.commands.inspect.show import percent

TEMPLATE = Path(__file__).with_name("page.html")


def page(report: Report) -> str:
    """The page's HTML. What the data says is escaped."""
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, percent=percent).strip() + "\n"
