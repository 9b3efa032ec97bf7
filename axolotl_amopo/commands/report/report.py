"""Report on training runs: read their logs, compare before and after, write a page with plots.

Example:

    report = write_report([Path("outputs/qwen2.5-7b-amopo")])
    report.runs[0].findings
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from axolotl_amopo.commands.report.findings import Finding, Severity, findings, outcome
from axolotl_amopo.commands.report.page import page_marker, report_page
from axolotl_amopo.commands.report.plots import Board, Plot
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.training.runs import COMPARED_METRICS, Change, TrainingRun, read_run

FOLDER = "_amopo_report"  # in a run's folder it is not uploaded, see `runs.LOG`
PAGE = "index.html"
FACTS = "report.json"
PROMPT_METRICS = (*COMPARED_METRICS, "loss", "prob", "reward_chosen", "reward_rejected")
TOTALS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/longer_wins")


@dataclass
class ReportedRun:
    """Hold a run, how its metrics changed, and what was found in its log."""

    name: str  # the run's own, or where two runs have the same one, its folder
    run: TrainingRun
    prompts: dict[str, dict[str, Change]]  # by prompt and metric
    totals: dict[str, Change]  # by metric, of the whole run
    outcome: list[str]  # sentences: which prompts improved, which fell
    findings: list[Finding]  # the worst first

    def to_json(self) -> dict[str, Any]:
        """Return what programs read; None where something was not logged."""
        run = self.run
        return {
            "name": self.name,
            "folder": str(run.folder),
            "log": str(run.file),
            "status": run.status,
            "step": run.step,
            "max_steps": run.max_steps,
            "seconds": run.seconds,
            "resumed_at": run.resumed,
            "basis": "evaluation" if run.by_evaluation else "training",
            "prompts": {name: _ends(changes) for name, changes in self.prompts.items()},
            "totals": _ends(self.totals),
            "outcome": self.outcome,
            "findings": [asdict(finding) for finding in self.findings],
        }


@dataclass
class TrainingReport:
    """Hold what `axolotl amopo report` found in runs, and where it wrote the page."""

    page: Path
    runs: list[ReportedRun]

    @property
    def severities(self) -> set[Severity]:
        """Return the severities of all findings."""
        return {finding.severity for one in self.runs for finding in one.findings}

    def to_json(self) -> dict[str, Any]:
        """Return what programs read."""
        return {"page": str(self.page), "runs": [one.to_json() for one in self.runs]}


def write_report(
    folders: Sequence[Path],
    output: Path | None = None,
    *,
    force: bool = False,
    progress: Callable[[Sequence[Plot]], Iterable[Plot]] = lambda plots: plots,
) -> TrainingReport:
    """Read runs, and write a page with their plots.

    Beside it each plot stands as SVG and PNG, and what programs read in `report.json`.

    Args:
        folders: the output folders of runs, finished or in progress.
        output: the folder of the page; by default `_amopo_report` in the only run's folder, or for
            several runs in the current one.
        force: overwrite what is in `output`; another report of the same runs always is.
        progress: passes the plots on, one by one as they are drawn.

    Raises:
        AMoPOError: for a folder without a log of an AMoPO run, a run that is named twice, or an
            `output` that holds something else or can't be written.
        DataError: for a line of a log that can't be read.
    """
    if output is None:
        output = (folders[0] if len(folders) == 1 else Path()) / FOLDER
    named = name_runs([read_run(folder) for folder in folders])
    runs = [describe_run(name, run) for name, run in named.items()]
    report = TrainingReport(output / PAGE, runs)
    _write(report, force, progress)
    return report


def name_runs(runs: list[TrainingRun]) -> dict[str, TrainingRun]:
    """Return runs by their names, or where two have the same one by their folders.

    Raises:
        AMoPOError: where a run is named twice.
    """
    counts = Counter(run.name for run in runs)
    named = {run.name if counts[run.name] == 1 else str(run.folder): run for run in runs}
    if len(named) < len(runs):
        raise AMoPOError(f"A run stands there twice: {', '.join(str(run.folder) for run in runs)}.")
    return named


def describe_run(name: str, run: TrainingRun) -> ReportedRun:
    """Return a run with its changes and findings."""
    return ReportedRun(
        name=name,
        run=run,
        prompts={
            prompt: {metric: run.change(f"amopo/{prompt}/{metric}") for metric in PROMPT_METRICS}
            for prompt in run.prompts
        },
        totals={metric: run.change(metric) for metric in TOTALS},
        outcome=outcome(run),
        findings=findings(run),
    )


def _ends(changes: dict[str, Change]) -> dict[str, dict[str, float | None]]:
    return {
        metric: {"before": change.before, "after": change.after}
        for metric, change in changes.items()
    }


def _write(
    report: TrainingReport,
    force: bool,
    progress: Callable[[Sequence[Plot]], Iterable[Plot]],
) -> None:
    path, folder, runs = report.page, report.page.parent, report.runs
    marker = page_marker([one.run for one in runs], folder)
    try:
        if folder.is_dir() and any(folder.iterdir()) and not force:
            page_there = (
                path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
            )
            if marker not in page_there[:1000]:
                raise AMoPOError(
                    f"{folder} is there already and holds something else than the report of this "
                    "run; name another --output, or add --force."
                )
        folder.mkdir(parents=True, exist_ok=True)
        plots = list(Board([one.run for one in runs], [one.name for one in runs]).plots())
        drawn = [(plot, plot.svg(), plot.png()) for plot in progress(plots)]
        # The page goes first: its marker tells the next call that the folder's files are its own.
        path.write_text(report_page(runs, [(p, svg) for p, svg, _ in drawn], marker), "utf-8")
        for plot, svg, png in drawn:
            (folder / f"{plot.name}.svg").write_text(svg, encoding="utf-8")
            (folder / f"{plot.name}.png").write_bytes(png)
        (folder / FACTS).write_text(f"{json.dumps(report.to_json())}\n", encoding="utf-8")
    except OSError as error:
        raise AMoPOError(
            f"{error.filename or folder} can't be written ({error.strerror}); name another "
            "--output."
        ) from None
