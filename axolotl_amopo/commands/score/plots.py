"""Draw scores as SVG for the page."""

from collections.abc import Iterator

import matplotlib as mpl
import numpy as np
from markupsafe import Markup

from axolotl_amopo.commands.kit import plots as kit
from axolotl_amopo.commands.score.report import (
    Prompting,
    ScoredPairs,
    ScoreReport,
    ScoreRow,
    percent,
)


def draw_plots(
    report: ScoreReport, scored: ScoredPairs, prompting: Prompting
) -> list[tuple[str, Markup]]:
    """Return captions and SVG of one kind of prompt."""
    with mpl.rc_context(kit.PAGE_STYLE):
        return list(_plots(report, scored, prompting))


def _plots(
    report: ScoreReport, scored: ScoredPairs, prompting: str
) -> Iterator[tuple[str, Markup]]:
    rows = [row for row in report.block(prompting) if next(iter(row.models.values())).n]
    if not rows:
        return
    models = list(report.paths)
    colours = dict(zip(models, kit.COLOURS[0 if report.base else 1 :] * len(models), strict=False))
    yield "Accuracy with 95 % intervals", accuracies(rows, colours)
    for row in rows:
        k = [one.name for one in report.block(prompting)].index(row.name)
        margins = {model: scored.oriented(model, prompting, k) for model in models}
        yield f"{row.name}: margins; right of 0 the model agrees", histograms(margins, colours)
    calibrated = [row for row in rows if len(next(iter(row.models.values())).by_gap) > 1]
    for row in calibrated:
        yield f"{row.name}: accuracy by how far the ratings are apart", calibration(row, colours)
    if prompting == "own" and report.agreement:
        names = [row.name for row in report.block(prompting)]
        yield "Pairs that two ratings order alike, %", matrix(report.agreement.ratings, names)
        for model, values in report.agreement.models.items():
            yield f"Pairs that {model} orders alike under two prompts, %", matrix(values, names)


def accuracies(rows: list[ScoreRow], colours: dict[str, str]) -> Markup:
    """Draw each rating's accuracy and interval, a dot per model."""
    height = 0.32 * len(rows) * len(colours) + 0.2 * len(rows) + 0.9
    axes = kit.canvas(height)
    step = 0.7 / len(colours)
    for i, (model, colour) in enumerate(colours.items()):
        places = np.arange(len(rows)) + (i - (len(colours) - 1) / 2) * step
        for place, row in zip(places, rows, strict=True):
            one = row.models[model]
            low, high = one.interval
            axes.plot([100 * low, 100 * high], [place] * 2, color=colour, linewidth=2)
            axes.annotate(
                percent(one.accuracy), (101, place), va="center", fontsize=9, annotation_clip=False
            )
        values = [100 * row.models[model].accuracy for row in rows]
        axes.plot(values, places, "o", color=colour, label=kit.plain_label(model))
    axes.axvline(50, color=kit.INK, linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5), xlabel="% of pairs")
    axes.set_yticks(range(len(rows)), [kit.plain_label(row.name, 18) for row in rows])
    kit.legend(axes)
    return kit.page_svg(axes)


def histograms(margins: dict[str, np.ndarray], colours: dict[str, str]) -> Markup:
    """Draw how often which margin is there, an outline per model."""
    axes = kit.canvas(2.3)
    everything = np.concatenate(list(margins.values()))
    # Of the middle 98 %, or one pair far out would leave the others a single bar.
    low, high = np.percentile(everything, [1, 99])
    edges = np.linspace(min(low, 0), max(high, 0), 22)
    if edges[0] == edges[-1]:
        edges = np.linspace(-1, 1, 22)
    for model, values in margins.items():
        counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
        axes.stairs(counts, edges, color=colours[model], fill=True, alpha=0.18)
        axes.stairs(
            counts, edges, color=colours[model], linewidth=1.6, label=kit.plain_label(model)
        )
    axes.axvline(0, color=kit.INK, linewidth=0.8, linestyle=":")
    axes.set(xlabel="margin", ylabel="pairs")
    kit.legend(axes)
    return kit.page_svg(axes)


def calibration(row: ScoreRow, colours: dict[str, str]) -> Markup:
    """Draw accuracy over the ratings' gap, a line per model."""
    axes = kit.canvas(2.3)
    for model, colour in colours.items():
        bins = row.models[model].by_gap
        places = [(one.low + one.high) / 2 for one in bins]
        axes.plot(
            places,
            [100 * one.accuracy for one in bins],
            "o-",
            color=colour,
            label=kit.plain_label(model),
            clip_on=False,
        )
    for place, one in zip(places, bins, strict=True):
        axes.annotate(
            f"n {one.n}", (place, 3), ha="center", fontsize=9, color=kit.INK, annotation_clip=False
        )
    axes.axhline(50, color=kit.INK, linewidth=0.8, linestyle=":")
    axes.set(ylim=(0, 100), xlabel="gap of the ratings, of 0 to 1", ylabel="% of pairs")
    axes.margins(x=0.1)
    kit.legend(axes)
    return kit.page_svg(axes)


def matrix(values: list[list[float | None]], names: list[str]) -> Markup:
    """Draw shares [K, K] as a coloured table."""
    axes = kit.canvas(0.45 * len(names) + 1.3)
    shares = np.array(values, dtype=float)
    axes.imshow(shares, cmap="RdBu", vmin=0, vmax=1, alpha=0.55, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        axes.text(j, i, "-" if np.isnan(share) else f"{100 * share:.0f}", ha="center", va="center")
    short = [kit.plain_label(name, 18) for name in names]
    axes.set_yticks(range(len(names)), short)
    axes.set_xticks(range(len(names)), short, rotation=30, ha="right")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return kit.page_svg(axes)
