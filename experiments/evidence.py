"""Write the tables and plots of docs/evidence.md from committed lines of results.

    python experiments/evidence.py            # writes what stands between the page's marks
    python experiments/evidence.py --check    # writes nothing; exits with 1 where it would

A mark names a plan of the world and the measures of a table, or the kind of a plot; a file that
`axolotl amopo steer --json` wrote, and the title of one of its tables or plots; or a comparison of
WebNLG's, and how the title of one of its tables begins:

    <!-- table objectives: score worst ungrammatical -->
    <!-- plot steering: steering -->
    <!-- steer online/steered.json: Compromises by weights -->
    <!-- webnlg plain: At a glance -->

What follows a mark up to `<!-- end -->` is replaced. No figure of the page's tables is typed by
hand, and those in its sentences are in its tables.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent / "world"))
sys.path.insert(0, str(Path(__file__).parent / "webnlg"))

import results
import run
import summary
import tables as webnlg_tables
import webnlg
from matplotlib import rc_context
from pydantic import TypeAdapter

from axolotl_amopo.commands.kit.plots import INK
from axolotl_amopo.commands.steer.measure import SteerReport
from axolotl_amopo.commands.steer.plots import draw_plots
from axolotl_amopo.commands.steer.text import tables
from axolotl_amopo.config.files import read_yaml

HERE = Path(__file__).parent
ROOT = HERE.parent
PAGE = ROOT / "docs" / "evidence.md"
IMAGES = ROOT / "docs" / "images"
MARK = re.compile(r"<!-- (table|plot|steer|webnlg) (\S+): ([^>]+?) -->\n.*?<!-- end -->", re.DOTALL)


def written(page: str, rows: dict) -> tuple[str, dict[Path, str]]:
    """Return the page with its blocks made anew, and the plots' files with their contents.

    Args:
        page: the page as it is.
        rows: results by key.

    Raises:
        PlanError: for a mark that names no plan.
        ValueError: for a table or a plot that the results have none of.
    """
    plots: dict[Path, str] = {}

    def drawn(path: Path, caption: str, figure: str) -> str:
        plots[path] = figure
        return f"![{caption}](images/{path.name})"

    def block(mark: re.Match) -> str:
        kind, name, what = mark.groups()
        if kind == "steer":
            report = TypeAdapter(SteerReport).validate_json((HERE / name).read_bytes())
            made = {one.title: summary.table(one.headings, one.rows) for one in tables(report)}
            with rc_context({"svg.hashsalt": name}):
                figures = dict(draw_plots(report))
            if what in figures:
                path = IMAGES / f"evidence-{Path(name).parent}.svg"
                # A page gives its own colours to what it holds; an image stands alone.
                figure = str(figures[what]).replace("currentColor", INK)
                figure = figure.replace("<svg ", '<svg style="background: white" ', 1)
                text = drawn(path, what, f"{figure}\n")
            elif what in made:
                text = made[what]
            else:
                raise ValueError(f"{name}: has none of {what!r}, but {[*made, *figures]}")
        elif kind == "webnlg":
            text = webnlg_table(name, what)
        else:
            plan = results.read_plan(results.HERE / "plans" / f"{name}.yml")
            mine = results.rows_of(plan, run.keys_of(plan), rows)
            if kind == "table":
                text = table(plan, mine, what.split())
            elif figure := summary.figure(plan, mine, what):
                text = drawn(IMAGES / f"evidence-{name}-{what}.svg", plan.question, figure)
            else:
                raise ValueError(f"{name}: its results draw no plot {what!r}")
        return f"<!-- {kind} {name}: {what} -->\n\n{text}\n\n<!-- end -->"

    return MARK.sub(block, page), plots


def webnlg_table(name: str, title: str) -> str:
    """Return a table of a comparison of WebNLG's, and the rest of its title below.

    Raises:
        ValueError: where no table's title begins so, or several do.
    """
    arms = read_yaml(webnlg.HERE / "arms.yml")
    of = webnlg.HERE / "results"
    with TemporaryDirectory() as work:
        comparison = webnlg.read(name, arms, Path(work), of / "tuned.yml")
    report = webnlg_tables.report_on(comparison, webnlg.read_lines(of / f"{name}.jsonl"))
    texts = webnlg.read_lines(of / "texts.jsonl")
    made = [*webnlg_tables.all_tables(comparison, report, texts)]
    found = [one for one in made if one.title.startswith(title)]
    if len(found) != 1:
        raise ValueError(f"{name}: {title!r} begins {len(found)} of {[one.title for one in made]}")
    runs = f"{report.done} of {report.planned} runs"
    return f"{webnlg_tables.markdown(found[0])}\n\n({found[0].title}; {runs}.)"


def table(plan: results.Plan, rows: summary.Rows, measures: Sequence[str]) -> str:
    """Return a table with a line per variant: means, and differences where they are compared."""
    found = {(one.variant, one.measure): one for one in summary.differences(plan, rows)}
    compared = [name for name in measures if any(name == of for _, of in found)]
    head = ["variant", "seeds", *measures, *(f"difference in {name}" for name in compared)]
    lines = []
    for variant, of in rows.items():
        means = [summary.mean_of([*summary.values_of(of, name).values()]) for name in measures]
        line = [variant, str(len(of)), *map(str, means)]
        for name in compared:
            one = found.get((variant, name))
            line.append(f"{one.mean}, p {summary.p_text(one.corrected)}" if one else "")
        lines.append(line)
    against = set(plan.against.values())
    notes = (
        f"Differences: from `{against.pop()}`."
        if len(against) == 1
        else "Differences: "
        + (", ".join(f"`{one}` from `{other}`" for one, other in plan.against.items()) + ".")
    )
    made, wanted = sum(map(len, rows.values())), len(plan.variants) * len(plan.seeds)
    runs = f"{made} runs" if made == wanted else f"{made} of {wanted} runs"
    note = f"{runs}, `plans/{plan.path.name}`."
    if found:
        note = f"{notes} {note}"
    return f"{summary.table(head, lines)}\n\n({note})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="say what differs, write nothing")
    options = parser.parse_args(arguments)
    page = PAGE.read_text(encoding="utf-8")
    text, plots = written(page, results.read_results(results.RESULTS))
    wanted = {PAGE: text} | plots
    differ = [
        path
        for path, content in wanted.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != content
    ]
    for path in differ:
        print(f"{path.relative_to(ROOT)} {'differs' if options.check else 'written'}")
        if not options.check:
            path.write_text(wanted[path], encoding="utf-8")
    return 1 if options.check and differ else 0


if __name__ == "__main__":
    sys.exit(main())
