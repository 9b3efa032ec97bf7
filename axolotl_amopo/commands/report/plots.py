"""Draw one run or several, as SVG for the page, and as SVG and PNG for files beside it."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from axolotl_amopo.commands.kit import plots as kit
from axolotl_amopo.training.runs import TrainingRun, sampled, series

# Paul Tol's "muted" colours, which stay apart for the colour-blind, with grey; black is `overall`.
COLOURS = (
    "#CC6677",
    "#332288",
    "#44AA99",
    "#AA4499",
    "#999933",
    "#88CCEE",
    "#882255",
    "#117733",
    "#DDCC77",
    "#888888",
)
MARKERS = "osD^vP*Xh<>"
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (8, 3)), (0, (3, 4)))
# Wide enough for a page's column, small enough that its letters can be read on a phone.
WIDTH, PANEL, LEGEND_ROW = 4.8, 2.4, 0.19  # inches
LEGEND_WIDTH = 58  # characters beside each other in a legend
MOST_POINTS = 400  # of a line
MOST_RAW_LINES = 5
CONSTANT = 1e-6  # weights that differ by less are the same
STYLE = kit.STYLE | {
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e4e7ea",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
}


@dataclass
class Plot:
    """Hold a figure with its title and caption."""

    name: str  # of its files
    title: str
    caption: str
    figure: Figure

    def svg(self) -> str:
        """Return an <svg> element whose ids begin with its name, so that a page can hold many."""
        with _drawing(self.name):
            svg = kit.svg_element(self.figure)
        self.figure.set_layout_engine("none")  # all is in its place now; a PNG need not find it
        svg = re.sub(r'\bid="', f'id="{self.name}-', svg)
        svg = re.sub(r"url\(#", f"url(#{self.name}-", svg)
        svg = re.sub(r'href="#', f'href="#{self.name}-', svg)
        return svg.replace("<svg ", f'<svg role="img" aria-label="{self.title}" ', 1)

    def png(self) -> bytes:
        """Return the figure as a PNG file of 160 dots per inch."""
        data = io.BytesIO()
        with _drawing():
            self.figure.savefig(data, format="png", dpi=160)
        return data.getvalue()


@contextmanager
def _drawing(salt: str = "") -> Iterator[None]:
    # A name in letters that no font here has is drawn as boxes in the PNG; the warning is dropped.
    with (
        matplotlib.rc_context(STYLE | {"svg.hashsalt": salt or None}),
        warnings.catch_warnings(action="ignore"),
    ):
        yield


def smooth(values: np.ndarray) -> np.ndarray:
    """Return centred means [N] over about a twentieth of the log; NaN stays NaN."""
    half = len(values) // 40
    if not half:
        return values
    found = np.isfinite(values)
    window = np.ones(2 * half + 1)
    sums = np.convolve(np.where(found, values, 0), window, mode="same")
    counts = np.convolve(found, window, mode="same")
    return np.where(found, sums / counts.clip(min=1), np.nan)


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most MOST_POINTS of a line's points: the lowest and highest of each stretch.

    No spike gets lost.
    """
    if len(values) <= MOST_POINTS:
        return steps, values
    kept: set[int] = set()
    for part in np.array_split(np.arange(len(values)), MOST_POINTS // 2):
        held = part[np.isfinite(values[part])]
        part = held if len(held) else part[:1]
        kept |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
    index = sorted(kept)
    return steps[index], values[index]


class Board:
    """Draw the figures of a report; all share the runs, and each prompt's colour and marker.

    Args:
        runs: drawn over each other, each with its own line style.
        names: what to call them, in the same order.
    """

    def __init__(self, runs: list[TrainingRun], names: list[str]):
        self.runs, self.names = runs, names
        prompts = dict.fromkeys(name for run in runs for name in run.prompts)
        self.prompts = list(prompts)
        dimensions = [name for name in self.prompts if name != "overall"]
        self.colours = {n: COLOURS[i % len(COLOURS)] for i, n in enumerate(dimensions)}
        self.colours |= {"overall": "#000000", "": "#20456e"}
        self.markers = {n: MARKERS[i % len(MARKERS)] for i, n in enumerate(self.prompts)}
        self.markers[""] = "o"
        self.couples = [f"{one}-{other}" for one, other in combinations(self.prompts, 2)]
        for i, name in enumerate(self.couples):
            self.colours.setdefault(name, COLOURS[i % len(COLOURS)])
            self.markers.setdefault(name, MARKERS[i % len(MARKERS)])
        self.settings = sampled(entry for run in runs for entry in run.evals)
        for i, name in enumerate(self.settings):
            self.colours.setdefault(name, COLOURS[-1 - i % len(COLOURS)])
            self.markers.setdefault(name, MARKERS[-1 - i % len(MARKERS)])

    def plots(self) -> Iterator[Plot]:
        """Yield all figures for which something was logged."""
        for name, title, caption, draw in (
            ("change", "Before and after", CHANGE, self._change),
            ("loss", "Loss", "", self._total("loss")),
            ("margin", "Margin: reward chosen minus rejected", "", self._each("margin")),
            ("accuracy", "Accuracy: share of pairs with a margin above 0", "", self._accuracy),
            ("weight", "Weight: share of a pair's loss", WEIGHT, self._weight),
            ("share", "How much of each gradient a step has", SHARE, self._share),
            ("cosine", "Cosines between the gradients", COSINE, self._cosine),
            ("prob", "Mean probability of the responses' tokens", "", self._each("prob")),
            ("rewards", "Rewards of the two responses", "", self._rewards),
            ("longer_wins", "Longer response has the higher reward", LENGTH, self._longer),
            ("samples", "The model's own answers to held-out prompts", SAMPLES, self._samples),
            ("learning_rate", "Learning rate", "", self._total("learning_rate")),
            ("grad_norm", "Gradient norm", "", self._total("grad_norm", log=True)),
        ):
            with _drawing():
                figure = draw()
            if figure is not None:
                figure.suptitle(title, x=0.01, ha="left", fontsize=9.5, fontweight="bold")
                yield Plot(name, title, caption, figure)

    def _each(self, metric: str) -> Callable[[], Figure | None]:
        return lambda: self._lines([("", metric)], self.prompts)

    def _total(self, metric: str, log: bool = False) -> Callable[[], Figure | None]:
        def draw() -> Figure | None:
            figure = self._lines([("", metric)], [])
            if figure and log and _spread(figure.axes[0]) > 20:
                figure.axes[0].set_yscale("log")
            return figure

        return draw

    def _accuracy(self) -> Figure | None:
        figure = self._lines([("", "accuracy")], self.prompts)
        if figure:
            _shares(figure.axes[0])
        return figure

    def _longer(self) -> Figure | None:
        figure = self._lines([("", "rewards/longer_wins")], [])
        if figure:
            _shares(figure.axes[0])
        return figure

    def _samples(self) -> Figure | None:
        panels = [("tokens", "tokens"), ("share of 4-grams that are repeated", "repetition")]
        return self._lines(panels, self.settings, "samples/{}/{}") if self.settings else None

    def _weight(self) -> Figure | None:
        if not self._weights_vary():
            return None
        panels = [("mean", "weight"), ("spread over pairs (standard deviation)", "weight_std")]
        figure = self._lines(panels, self.prompts)
        if figure:
            for count in {len(run.prompts) for run in self.runs}:
                figure.axes[0].axhline(1 / count, color="#777777", linestyle=":", linewidth=1)
        return figure

    def _weights_vary(self) -> bool:
        """Return whether any weight changes in a run; the table has those that don't."""
        columns = [
            series(part, f"amopo/{name}/weight")[1]
            for run in self.runs
            for part in (run.train, run.evals)
            for name in run.prompts
        ]
        known = [values[np.isfinite(values)] for values in columns]
        return any(np.ptp(values) > CONSTANT for values in known if len(values))

    def _share(self) -> Figure | None:
        return self._lines([("", "share")], self.prompts, "gradients/{}/{}")

    def _cosine(self) -> Figure | None:
        figure = self._lines([("", "cosine")], self.couples, "gradients/{}/{}")
        if figure:
            figure.axes[0].axhline(0, color="#777777", linestyle=":", linewidth=1)
        return figure

    def _rewards(self) -> Figure | None:
        return self._lines(
            [("chosen", "reward_chosen"), ("rejected", "reward_rejected")], self.prompts
        )

    def _lines(
        self, panels: list[tuple[str, str]], prompts: list[str], key: str = "amopo/{}/{}"
    ) -> Figure | None:
        """Draw metrics over the steps, one panel below the other; None where none was logged.

        Args:
            panels: title and metric of each.
            prompts: draw the metrics of these prompts; empty for metrics of the whole run.
            key: how prompt and metric make the name in the log.
        """
        keys = {
            metric: {name: key.format(name, metric) for name in prompts} or {"": metric}
            for _, metric in panels
        }

        def logged(part: str, metric: str) -> bool:
            entries = [entry for run in self.runs for entry in getattr(run, part)]
            return any(key in entry for entry in entries for key in keys[metric].values())

        panels = [(t, m) for t, m in panels if logged("train", m) or logged("evals", m)]
        if not panels:
            return None
        evaluated = any(logged("evals", metric) for _, metric in panels)
        figure, axes = self._figure(len(panels), prompts, evaluated=evaluated)
        for axis, (title, metric) in zip(axes, panels, strict=True):
            axis.set_title(title)
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            for run, dashes in zip(self.runs, _line_styles(len(self.runs)), strict=True):
                for name, key in keys[metric].items():
                    self._line(axis, run, name, key, dashes)
        axes[-1].set_xlabel("step")
        return figure

    def _line(self, axis: Axes, run: TrainingRun, name: str, key: str, dashes: object) -> None:
        colour = self.colours[name]
        steps, values = series(run.train, key)
        if len(steps) and not np.all(np.isnan(values)):
            raw = len(self.runs) == 1 and (not name or len(self.prompts) <= MOST_RAW_LINES)
            smoothed = values if key == "learning_rate" else smooth(values)
            if raw and smoothed is not values:
                axis.plot(*thin(steps, values), color=colour, alpha=0.22, linewidth=0.7)
            axis.plot(
                *thin(steps, smoothed),
                color=colour,
                alpha=0.6 if raw or not run.evals else 0.35,
                linewidth=1.3,
                linestyle=dashes,
                # A single entry is no line.
                marker="." if len(steps) == 1 else None,
            )
        steps, values = series(run.evals, key)
        if len(steps):
            axis.plot(
                *thin(steps, values),
                color=colour,
                linewidth=1.1,
                linestyle=dashes,
                marker=self.markers[name],
                markersize=4.5,
                markeredgecolor="white",
                markeredgewidth=0.5,
                clip_on=False,
            )

    def _change(self) -> Figure | None:
        """Draw a row per prompt and run: a hollow dot before, a full one after."""
        metrics = [
            metric
            for metric in ("margin", "accuracy")
            if any(
                run.change(f"amopo/{name}/{metric}").after is not None
                for run in self.runs
                for name in run.prompts
            )
        ]
        if not metrics:
            return None
        count = len(self.prompts) * (len(self.runs) + 0.5)
        height = 0.5 + 0.17 * count
        figure, axes = self._figure(len(metrics), [], height)
        for axis, metric in zip(axes, metrics, strict=True):
            axis.set_title(metric)
            for p, name in enumerate(self.prompts):
                for r, (run, dashes) in enumerate(
                    zip(self.runs, _line_styles(len(self.runs)), strict=True)
                ):
                    y = p + (r - (len(self.runs) - 1) / 2) * 0.7 / len(self.runs)
                    change = run.change(f"amopo/{name}/{metric}")
                    if change.after is None:
                        continue
                    style = {"color": self.colours[name], "markersize": 5.5}
                    if change.before is not None:
                        axis.plot(
                            [change.before, change.after],
                            [y, y],
                            linestyle=dashes,
                            linewidth=1.3,
                            **style,
                        )
                        axis.plot(change.before, y, "o", markerfacecolor="white", **style)
                    axis.plot(change.after, y, "o", **style)
            axis.set_yticks(range(len(self.prompts)), [_short(n) for n in self.prompts])
            axis.set_ylim(len(self.prompts) - 0.5, -0.5)
            if metric == "accuracy":
                axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
                axis.axvline(0.5, color="#777777", linestyle=":", linewidth=1)
        return figure

    def _figure(
        self, panels: int, prompts: list[str], height: float = PANEL, evaluated: bool = False
    ) -> tuple[Figure, list[Axes]]:
        """Make an empty figure with a legend of prompts and runs below it."""
        handles = [
            Line2D(
                [],
                [],
                color=self.colours[n],
                marker=self.markers[n],
                markersize=4.5,
                label=_short(n),
            )
            for n in prompts
        ]
        grey: dict[str, Any] = {"color": "#555555", "markersize": 4.5}
        if evaluated:
            handles += [
                Line2D([], [], alpha=0.6, label="training", **grey),
                Line2D([], [], marker="o", linewidth=1.1, label="evaluation", **grey),
            ]
        if len(self.runs) > 1:
            handles += [
                Line2D([], [], linestyle=dashes, label=_short(name), **grey)
                for name, dashes in zip(self.names, _line_styles(len(self.runs)), strict=True)
            ]
        longest = max((len(handle.get_label()) for handle in handles), default=1) + 7
        columns = max(1, min(len(handles), LEGEND_WIDTH // longest))
        rows = -(-len(handles) // columns)
        figure = Figure(
            figsize=(WIDTH, panels * height + rows * LEGEND_ROW + 0.25), layout="constrained"
        )
        axes = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
        if handles:
            figure.legend(handles=handles, loc="outside lower left", ncols=columns)
        return figure, axes


CHANGE = "Hollow: before. Full: after. Dotted: chance."
WEIGHT = "Dotted: all prompts the same."
SHARE = "As solved for each step: mgda's sum to 1, cagrad's are the weights and a correction."
COSINE = "Below 0 a step for one of the two is a step against the other."
LENGTH = "A line that climbs says that the model learns to prefer length."
SAMPLES = (
    "A line per setting that the model is asked for. The first evaluation's model is the base."
)


def _line_styles(count: int) -> list[object]:
    return [DASHES[i % len(DASHES)] for i in range(count)]


def _short(name: str) -> str:
    return kit.plain_label(name, longest=24)


def _spread(axis: Axes) -> float:
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axis.lines])
    values = values[np.isfinite(values) & (values > 0)]
    return float(values.max() / np.median(values)) if len(values) else 1.0


def _shares(axis: Axes) -> None:
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.axhline(0.5, color="#777777", linestyle=":", linewidth=1)
