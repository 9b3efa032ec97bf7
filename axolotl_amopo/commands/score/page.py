"""Write scores as an HTML page."""

from pathlib import Path

from axolotl_amopo.commands.kit.page import render_page
from axolotl_amopo.commands.score.plots import draw_plots
from axolotl_amopo.commands.score.report import ScoredPairs, ScoreReport
from axolotl_amopo.commands.score.text import ABOUT_LENGTH, headlines, tables

TEMPLATE = Path(__file__).with_name("page.html")


def score_page(report: ScoreReport, scored: ScoredPairs) -> str:
    """Return the page's HTML; what the data and the config say is escaped."""
    by = f"by {report.reward_name}"
    return render_page(
        TEMPLATE,
        report=report,
        headlines=headlines(report),
        tables=list(tables(report)),
        blocks=[
            (f"{title}: {by}", draw_plots(report, scored, kind))
            for kind, title in report.titles.items()
        ],
        about_length=ABOUT_LENGTH,
    )
