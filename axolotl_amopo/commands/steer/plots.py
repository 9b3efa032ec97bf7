"""Draw what steering does as SVG for the page."""

from collections.abc import Iterator
from itertools import combinations

import matplotlib as mpl
import numpy as np
from markupsafe import Markup

from axolotl_amopo.commands.kit import plots as kit
from axolotl_amopo.commands.steer.measure import Steered, SteerReport
from axolotl_amopo.commands.steer.steer import BASE
from axolotl_amopo.steering.front import pareto

# Pairs of dimensions whose front is drawn.
MOST_FRONTS = 3


def draw_plots(report: SteerReport) -> list[tuple[str, Markup]]:
    """Return captions and SVG."""
    with mpl.rc_context(kit.PAGE_STYLE):
        return list(_plots(report))


def _plots(report: SteerReport) -> Iterator[tuple[str, Markup]]:
    others = iter(kit.COLOURS[1:] * len(report.models))
    colours = {
        model.name: kit.COLOURS[0] if model.name == BASE else next(others)
        for model in report.models
    }
    for name in report.dimensions:
        if any(curve.dimension == name for model in report.models for curve in model.curves):
            yield f"{name}: rating obtained, with 95 % intervals", curves(report, name, colours)
    for model in report.models:
        if model.effects:
            caption = f"{model.name}: what changes, as a share of each scale"
            yield caption, matrix(report, model)
    fronts = [model.front for model in report.models if model.front]
    names = list(dict.fromkeys(name for one in fronts for name in one.dimensions))
    for x, y in [*combinations(names, 2)][:MOST_FRONTS]:
        yield f"Compromises: {x} and {y}", front(report, x, y, colours)


def curves(report: SteerReport, name: str, colours: dict[str, str]) -> Markup:
    """Draw a dimension's mean rating over the number asked for, a line per model."""
    axes = kit.canvas(2.6)
    for model in report.models:
        for curve in (one for one in model.curves if one.dimension == name):
            low, high = np.array(curve.intervals).T
            axes.fill_between(curve.levels, low, high, color=colours[model.name], alpha=0.18)
            label = kit.plain_label(model.name, 18)
            axes.plot(curve.levels, curve.means, "o-", color=colours[model.name], label=label)
    axes.set(xlabel="asked for", ylabel="obtained")
    kit.legend(axes)
    return kit.page_svg(axes)


def matrix(report: SteerReport, model: Steered) -> Markup:
    """Draw how asking for one dimension changes all: a coloured table."""
    axes = kit.canvas(0.45 * len(model.effects) + 1.3)
    widths = [high - low for low, high in (report.scales[name] for name in report.dimensions)]
    shares = np.array(
        [
            [
                row[name].change / width
                for name, width in zip(report.dimensions, widths, strict=True)
            ]
            for row in model.effects.values()
        ]
    )
    axes.imshow(shares, cmap="RdBu", vmin=-1, vmax=1, alpha=0.55, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        axes.text(j, i, f"{share:+.2f}", ha="center", va="center")
    asked = [kit.plain_label(name, 18) for name in model.effects]
    obtained = [kit.plain_label(name, 18) for name in report.dimensions]
    axes.set_yticks(range(len(asked)), asked)
    axes.set_xticks(range(len(obtained)), obtained, rotation=30, ha="right")
    axes.set(ylabel="asked for", xlabel="changes")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return kit.page_svg(axes)


def front(report: SteerReport, x: str, y: str, colours: dict[str, str]) -> Markup:
    """Draw two dimensions of the points that weights reach, and the line of those unbeaten."""
    axes = kit.canvas(3.0)
    for model in report.models:
        if model.front is None or not {x, y} <= {*model.front.dimensions}:
            continue
        first, second = map(model.front.dimensions.index, (x, y))
        points = [(point[first], point[second]) for point in model.front.points]
        colour = colours[model.name]
        label = kit.plain_label(model.name, 18)
        axes.plot(*zip(*points, strict=True), "o", color=colour, alpha=0.7, label=label)
        axes.step(*zip(*pareto(points), strict=True), where="post", color=colour, linewidth=1)
    across, up = kit.plain_label(x, 24), kit.plain_label(y, 24)
    axes.set(xlabel=f"{across}, 0 the worst, 1 the best", ylabel=up)
    kit.legend(axes)
    return kit.page_svg(axes)
