"""Draw comparisons as SVG for the page."""

from collections.abc import Iterator

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes

from axolotl_amopo.commands.compare.compare import ComparisonReport
from axolotl_amopo.commands.compare.comparison import MEAN
from axolotl_amopo.commands.compare.statistics import Prompting, Table
from axolotl_amopo.commands.compare.text import PROMPTS, title_of
from axolotl_amopo.commands.kit import plots as kit

BASELINE, OTHER = kit.COLOURS[:2]


def draw_plots(report: ComparisonReport) -> list[tuple[str, Markup]]:
    """Return captions and SVG."""
    with mpl.rc_context(kit.PAGE_STYLE):
        return list(_plots(report))


def _plots(report: ComparisonReport) -> Iterator[tuple[str, Markup]]:
    for table in report.tables:
        yield f"{title_of(table)}: accuracy with 95 % intervals", accuracies(report, table)
        if any(cell.change for cell in table.cells.values()):
            yield f"{title_of(table)}: difference to {report.baseline}", differences(report, table)
    kinds: dict[Prompting, None] = dict.fromkeys(table.prompting for table in report.tables)
    for prompting in kinds if report.costs else ():
        caption = f"accuracy over what a run costs, {PROMPTS[prompting]}"
        yield caption, over_cost(report, report.table(MEAN, prompting))


def accuracies(report: ComparisonReport, table: Table) -> Markup:
    """Draw each variant's accuracy and interval."""
    found = [
        (name, cell.value, cell.interval)
        for name in report.names
        if (cell := table.cells.get(name)) and cell.value is not None
    ]
    axes = dots(report, found)
    axes.set_xlabel("% of pairs")
    return kit.page_svg(axes)


def differences(report: ComparisonReport, table: Table) -> Markup:
    """Draw each variant's difference to the baseline and its interval."""
    found = [
        (name, cell.change.difference, cell.change.interval)
        for name in report.names
        if (cell := table.cells.get(name)) and cell.change
    ]
    axes = dots(report, found)
    axes.axvline(0, color=kit.INK, linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"points more than {kit.plain_label(report.baseline, 24)}")
    return kit.page_svg(axes)


def dots(
    report: ComparisonReport, found: list[tuple[str, float, tuple[float, float] | None]]
) -> Axes:
    """Return axes with a dot and an interval per variant, in percent."""
    axes = kit.canvas(0.3 * len(found) + 0.8)
    for place, (name, value, interval) in enumerate(found):
        colour = BASELINE if name == report.baseline else OTHER
        if interval:
            axes.plot([100 * end for end in interval], [place] * 2, color=colour, linewidth=2)
        axes.plot([100 * value], [place], "o", color=colour)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_yticks(range(len(found)), [kit.plain_label(name, 18) for name, *_ in found])
    return axes


def over_cost(report: ComparisonReport, table: Table) -> Markup:
    """Draw the mean over dimensions over the tokens of a run."""
    axes = kit.canvas(2.8)
    for name, cost in report.costs.items():
        cell = table.cells.get(name)
        if cell is None or cell.value is None:
            continue
        colour = BASELINE if name == report.baseline else OTHER
        axes.plot([cost.tokens], [100 * cell.value], "o", color=colour)
        place = (cost.tokens, 100 * cell.value)
        label = kit.plain_label(name, 18)
        axes.annotate(label, place, xytext=(4, 4), textcoords="offset points", fontsize=9)
    axes.margins(x=0.2, y=0.2)
    axes.set(xlabel="tokens through the model", ylabel="% of pairs")
    return kit.page_svg(axes)
