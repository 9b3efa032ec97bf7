"""Say what the results say: tables with intervals, paired differences, plots.

    python experiments/world/summary.py experiments/world/plans/*.yml > experiments/world/summary.md
    python experiments/world/summary.py --choose experiments/world/plans/tune.yml > tuned.yml

Every number comes from `results.jsonl`. A value is a mean over seeds with its 95 % interval (of
Student's t). A difference is that of runs with the same seed, hence with the same questions and the
same rated answers; its p-value is that of a paired t-test, corrected by Holm's method over all the
differences of the plan's compared measures. Plots go to `plots/` beside the results.

`--choose` prints the learning rate and the beta with the highest mean `score` of each objective:
what `tuned.yml` holds.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import language
import numpy as np
import results
import run
import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure
from results import Plan
from scipy import stats

from axolotl_amopo.commands.kit.plots import STYLE, svg_element

Rows = Mapping[str, Mapping[int, dict[str, Any]]]  # by variant and seed

SHOWN = (
    "score",
    "worst",
    "ungrammatical",
    "words",
    "repetition",
    "entropy",
    "kl",
    "ordering",
    "steer",
    "pull",
    "front",
)
TUNED = ("learning_rate", "rl_beta")
CONFIDENCE = 0.95


class Mean(NamedTuple):
    """A mean over seeds."""

    value: float
    half: float  # half of its 95 % interval; NaN of one seed
    count: int

    def __str__(self) -> str:
        if not self.count:
            return "-"
        shown = ",.0f" if abs(self.value) >= 1000 else ".3f"
        return f"{self.value:{shown}}" + (f" ± {self.half:{shown}}" if self.count > 1 else "")


class Difference(NamedTuple):
    """A variant against another one, in one measure."""

    variant: str
    against: str
    measure: str
    mean: Mean
    p: float  # of a paired t-test; NaN where it says nothing
    corrected: float = float("nan")


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean of values and half of its 95 % interval."""
    count = len(values)
    if not count:
        return Mean(float("nan"), float("nan"), 0)
    if count == 1:
        return Mean(values[0], float("nan"), 1)
    error = float(np.std(values, ddof=1)) / count**0.5
    quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1))
    return Mean(float(np.mean(values)), quantile * error, count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected by Holm's method; NaN stay and don't count.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p == p)
    corrected, highest = [float("nan")] * len(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        corrected[i] = highest
    return corrected


def values_of(rows: Mapping[int, dict[str, Any]], measure: str) -> dict[int, float]:
    """Return a measure by seed, where the run has it; `seconds` and `tokens` are measures too."""
    found = {
        seed: row["seconds"]["train"]
        if measure == "seconds"
        else row["measures"].get("train/tokens" if measure == "tokens" else measure)
        for seed, row in rows.items()
    }
    return {seed: value for seed, value in found.items() if value is not None}


def differences(plan: Plan, rows: Rows) -> list[Difference]:
    """Return variants against what they are compared with, p-values corrected over all."""
    found = []
    for variant, other in plan.against.items():
        for measure in plan.measures:
            mine, theirs = values_of(rows[variant], measure), values_of(rows[other], measure)
            pairs = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
            if not pairs:
                continue
            p = float("nan")
            if len(pairs) > 1 and np.std(pairs) > 0:
                p = float(stats.ttest_1samp(pairs, 0.0).pvalue)
            found.append(Difference(variant, other, measure, mean_of(pairs), p))
    corrected = holm([one.p for one in found])
    return [one._replace(corrected=p) for one, p in zip(found, corrected, strict=True)]


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, rule, *lines))


def section(plan: Plan, rows: Rows) -> str:
    """Return what there is to say of a plan."""
    done = {variant: of for variant, of in rows.items() if of}
    made, wanted = sum(map(len, done.values())), len(plan.variants) * len(plan.seeds)
    parts = [f"## {plan.question}", f"`plans/{plan.path.name}`: {made} of {wanted} runs."]
    if not done:
        return "\n\n".join(parts)
    measured = {name for of in done.values() for row in of.values() for name in row["measures"]}
    trained = sorted({d for v in done for d in _dimensions(plan, v)}, key=_place)
    shown = [name for name in SHOWN if name in measured]
    shown[2:2] = [f"best/{name}" for name in trained]
    extra = [name for name in plan.measures if name not in shown]
    shown += [*extra, "tokens", "seconds"]
    parts.append(
        table(
            ["variant", "seeds", *shown],
            [
                [
                    variant,
                    str(len(of)),
                    *(str(mean_of([*values_of(of, name).values()])) for name in shown),
                ]
                for variant, of in done.items()
            ],
        )
    )
    if found := differences(plan, rows):
        parts.append("Differences, same seeds:")
        parts.append(
            table(
                ["variant", "against", "measure", "difference", "seeds", "p", "p, corrected"],
                [
                    [
                        one.variant,
                        one.against,
                        one.measure,
                        str(one.mean),
                        str(one.mean.count),
                        p_text(one.p),
                        p_text(one.corrected),
                    ]
                    for one in found
                ],
            )
        )
    return "\n\n".join(parts)


def _dimensions(plan: Plan, variant: str) -> list[str]:
    return run.read_settings(plan.variants[variant]).config.dimension_names


def _place(name: str) -> int:
    return language.ATTRIBUTES.index(name)


def p_text(value: float) -> str:
    """Return a p-value as text."""
    return "-" if value != value else f"{value:.3g}"


def plot_differences(plan: Plan, rows: Rows) -> Figure | None:
    """Return a dot with its interval per variant, a panel per compared measure."""
    found = differences(plan, rows)
    measures = [name for name in plan.measures if any(one.measure == name for one in found)]
    if not measures:
        return None
    variants = list(dict.fromkeys(one.variant for one in found))
    figure = Figure(figsize=(2 + 3.2 * len(measures), 1.2 + 0.3 * len(variants)))
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for panel, measure in zip(panels, measures, strict=True):
        for one in found:
            if one.measure == measure:
                half = 0.0 if one.mean.half != one.mean.half else one.mean.half
                place = len(variants) - variants.index(one.variant)
                panel.errorbar(one.mean.value, place, xerr=half, fmt="o", color="C0", capsize=3)
        panel.axvline(0.0, color="grey", linewidth=0.8)
        labels = [f"{variant} - {plan.against[variant]}" for variant in variants]
        panel.set_yticks(range(len(variants), 0, -1), labels)
        panel.set_xlabel(measure)
    figure.tight_layout()
    return figure


def plot_steering(plan: Plan, rows: Rows) -> Figure | None:
    """Return what is obtained when a dimension is asked for, a panel per dimension."""
    curves: dict[str, dict[str, dict[float, list[float]]]] = {}
    for variant, of in rows.items():
        for row in of.values():
            for ask, means in row["means"].items():
                name, equals, number = ask.partition("=")
                if equals:
                    levels = curves.setdefault(name, {}).setdefault(variant, {})
                    levels.setdefault(float(number), []).append(means[name])
    if not curves:
        return None
    names = sorted(curves, key=_place)
    figure = Figure(figsize=(1.5 + 3.0 * len(names), 3.4))
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for variant, levels in curves[name].items():
            span = max(levels) - min(levels)
            asked = [(level - min(levels)) / span for level in sorted(levels)]
            obtained = [float(np.mean(levels[level])) for level in sorted(levels)]
            panel.plot(asked, obtained, marker="o", markersize=3, label=variant)
        panel.set_xlabel(f"{name} asked for, lowest to highest")
        panel.set_ylim(0.9, 5.1)
    panels[0].set_ylabel("obtained, 1 to 5")
    panels[-1].legend(fontsize=6)
    figure.tight_layout()
    return figure


def choose(plan: Plan, rows: Rows) -> dict[str, dict[str, float]]:
    """Return the tuned settings whose lowest score over seeds is the highest, by objective.

    Not the mean: a setting that breaks the model on one seed is none to compare with.
    """
    best: dict[str, tuple[float, dict[str, float]]] = {}
    for variant, of in rows.items():
        if not of:
            continue
        settings = plan.variants[variant]
        objective = settings.get("amopo", {}).get("objective", "amopo")
        score = min(values_of(of, "score").values())
        if objective not in best or score > best[objective][0]:
            best[objective] = score, {key: settings[key] for key in TUNED if key in settings}
    return {objective: chosen for objective, (_, chosen) in best.items()}


def figure(plan: Plan, rows: Rows, kind: str) -> str | None:
    """Return a plot as an SVG file's text, None where the results have nothing to draw."""
    plot = {"differences": plot_differences, "steering": plot_steering}[kind]
    with rc_context({**STYLE, "svg.hashsalt": "the world"}):
        made = plot(plan, rows)
        return None if made is None else svg_element(made) + "\n"


def draw(plan: Plan, rows: Rows, folder: Path) -> list[Path]:
    """Write a plan's plots; return their files."""
    made = []
    for kind in ("differences", "steering"):
        if (text := figure(plan, rows, kind)) is not None:
            folder.mkdir(exist_ok=True)
            path = folder / f"{plan.path.stem}-{kind}.svg"
            path.write_text(text, encoding="utf-8")
            made.append(path)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plans", nargs="+", type=Path, metavar="PLAN.yml")
    parser.add_argument("--choose", action="store_true", help="print tuned.yml of a tuning plan")
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    options = parser.parse_args(arguments)
    rows = results.read_results(options.results)
    for path in results.unique(options.plans):
        plan = results.read_plan(path)
        mine = results.rows_of(plan, run.keys_of(plan), rows)
        if options.choose:
            print(yaml.safe_dump(choose(plan, mine), sort_keys=False), end="")
            continue
        print(section(plan, mine), end="\n\n")
        for plot in draw(plan, mine, options.results.parent / "plots"):
            print(f"![{plot.stem}](plots/{plot.name})", end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
