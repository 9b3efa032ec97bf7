"""Results -> tables in Markdown, and the choice of learning rate and beta.

Tables of ordering are those of `axolotl amopo compare`. Those of the texts have means over prompts,
seeds averaged before, with 95 % intervals of a bootstrap that draws whole prompts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from texts import PROXIES

from axolotl_amopo.commands.compare.compare import ComparisonReport, make_report
from axolotl_amopo.commands.compare.comparison import MEAN, Comparison
from axolotl_amopo.commands.compare.statistics import RESAMPLES, percentiles
from axolotl_amopo.commands.compare.text import ABOUT, TextTable, headlines
from axolotl_amopo.commands.compare.text import tables as compare_tables
from axolotl_amopo.errors import AMoPOError

Json = dict[str, Any]
Values = dict[str, np.ndarray]  # by prompt: [len(PROXIES)]


def report_on(comparison: Comparison, lines: list[Json]) -> ComparisonReport:
    """Return compare's report on lines of results, without the folder of its runs."""
    planned = comparison.runs()
    known = {run.label for run in planned}
    mine = [line for line in lines if line["run"] in known]
    return make_report(comparison, mine, list(comparison.notes), len(planned), {})


def choose(comparison: Comparison, lines: list[Json]) -> dict[str, dict[str, float]]:
    """Return learning rate and beta of each family: those of the highest mean accuracy.

    Under the prompts that each was trained with; of equal ones the first in arms.yml.

    Raises:
        AMoPOError: where trials are missing.
    """
    cells = report_on(comparison, lines).table(MEAN, "own").cells
    if missing := [one.name for one in comparison.variants if one.name not in cells]:
        raise AMoPOError(f"tune: {len(missing)} trials are missing: {', '.join(missing)}.")
    best: dict[str, tuple[float, dict[str, float]]] = {}
    for variant in comparison.variants:
        family, value = variant.name.rsplit("_", 2)[0], cells[variant.name].value
        if family not in best or value > best[family][0]:
            keys = {key: variant.values[key] for key in ("learning_rate", "rl_beta")}
            best[family] = value, keys
    return {family: keys for family, (_, keys) in best.items()}


def section(comparison: Comparison, lines: list[Json], texts: list[Json]) -> str:
    """Return all that there is to say of a comparison."""
    report = report_on(comparison, lines)
    shown = all_tables(comparison, report, texts)
    if not comparison.folds:  # of the many trials of tuning only what they are chosen by
        shown = (table for table in shown if table.title.startswith("At a glance"))
    parts = [f"## {comparison.output.name}", *headlines(report), ABOUT]
    parts += [f"**{table.title}**\n\n{markdown(table)}" for table in shown]
    return "\n\n".join([*parts, *(f"- {note}" for note in report.notes)])


def all_tables(
    comparison: Comparison, report: ComparisonReport, texts: list[Json]
) -> Iterator[TextTable]:
    """Yield compare's tables and, where models wrote, those of the texts."""
    yield from compare_tables(report)
    if own := [line for line in texts if line["comparison"] == comparison.output.name]:
        yield from text_tables(own, report.names, report.baseline)


def markdown(table: TextTable) -> str:
    """Return a table in Markdown, without its title."""
    rule = ["---", *["---:"] * (len(table.headings) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (table.headings, rule, *table.rows))


def by_prompt(lines: Sequence[Json]) -> Values:
    """Return the proxies of each prompt's texts, averaged over seeds."""
    found: dict[str, list[list[float]]] = {}
    for line in lines:
        columns = zip(*(line[proxy] for proxy in PROXIES), strict=True)
        for prompt, values in zip(line["prompts"], columns, strict=True):
            found.setdefault(prompt, []).append(list(values))
    return {prompt: np.mean(values, axis=0) for prompt, values in found.items()}


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of values, one per prompt, and its 95 % interval."""
    count = len(values)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return float(values.mean()), *percentiles(draws @ values / count)


def text_tables(lines: list[Json], names: list[str], baseline: str) -> Iterator[TextTable]:
    """Yield the tables of a comparison's texts: values, and differences on the same prompts.

    A model is held against the baseline asked alike, and against itself asked `plain`.
    """
    groups: dict[tuple[str, str], list[Json]] = {}
    for line in sorted(lines, key=lambda line: names.index(line["name"])):
        groups.setdefault((line["name"], line["ask"]), []).append(line)
    values = {group: by_prompt(of) for group, of in groups.items()}
    prompts = len({prompt for of in values.values() for prompt in of})
    rows = [[_called(*group), *_cells(list(of.values()))] for group, of in values.items()]
    title = f"What is written ({prompts} prompts): proxies, see texts.py"
    yield TextTable(title, ["asked", *PROXIES], rows)
    rows = []
    for (name, ask), mine in values.items():
        for other in ((baseline, ask), (name, "plain")):
            theirs = values.get(other, {})
            both = [mine[prompt] - theirs[prompt] for prompt in mine if prompt in theirs]
            if other != (name, ask) and both:
                rows.append([f"{_called(name, ask)} - {_called(*other)}", *_cells(both, sign="+")])
    if rows:
        title = "Differences on the same prompts; intervals are not corrected for their number"
        yield TextTable(title, ["", *PROXIES], rows)


def _called(name: str, ask: str) -> str:
    return f"{name} ({ask})"


def _cells(values: Sequence[np.ndarray], sign: str = "") -> list[str]:
    """Return mean and interval of each proxy, from its values by prompt."""
    cells = []
    for column in np.array(values).T:
        mean, low, high = (format(value + 0.0, f"{sign}.3g") for value in mean_interval(column))
        cells.append(f"{mean} ({low} to {high})")
    return cells
