"""Compare variants of a config: check, make the runs that are missing, and put the tables together.

Example:

    report = compare(read_comparison("compare.yml"))
    report.tables[0].cells["dpo"].change
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from axolotl_amopo.commands.compare.comparison import Comparison, Run
from axolotl_amopo.commands.compare.data import (
    check_values,
    exported_entry,
    make_folds,
    overlap,
    write_yaml,
)
from axolotl_amopo.commands.compare.forks import call, import_once, start
from axolotl_amopo.commands.compare.statistics import (
    Cost,
    Prompting,
    Study,
    Table,
    correct_p,
)
from axolotl_amopo.commands.compare.work import (
    BUSY,
    FAILED,
    Work,
    amopo_here,
    do_work,
    finished,
    note_failure,
)
from axolotl_amopo.config.before_launch import check_before_launch
from axolotl_amopo.errors import AMoPOError, ConfigError

MARKER = "compare.json"
RESULTS = "results.jsonl"
OVERLAP = "overlap.json"
REPORT = "report.json"

Say = Callable[[str], None]
Json = dict[str, Any]


@dataclass
class ComparisonReport:
    """Hold what a comparison found."""

    path: str
    output: Path
    baseline: str
    names: list[str]  # the baseline first
    planned: int  # runs that compare.yml asks for
    done: int
    pairs: int
    prompts: int
    ratings: list[str]
    tables: list[Table]
    costs: dict[str, Cost]
    changes: dict[str, Json]  # the changed keys of each variant
    named: int  # comparisons whose p-values were corrected together
    failed: dict[str, str] = field(default_factory=dict)  # by run: its last lines
    differs: dict[str, list[str]] = field(default_factory=dict)  # from the real commands, by run
    checked: int = 0  # runs that the real commands made too
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> Json:
        """Return what programs read."""
        return asdict(self) | {"output": str(self.output)}

    def table(self, measure: str, prompting: Prompting) -> Table:
        """Return the table of a measure under a kind of prompt."""
        return next(t for t in self.tables if (t.measure, t.prompting) == (measure, prompting))


@dataclass
class PlannedRuns:
    """Hold what `--dry-run` says of a variant."""

    name: str
    runs: int
    done: int
    changes: Json
    plan: Json | None = None  # what `axolotl amopo plan --json` says
    why_no_plan: str = ""


def compare(
    comparison: Comparison,
    *,
    shard: tuple[int, int] = (1, 1),
    only: str | None = None,
    jobs: int = 1,
    check: bool = True,
    launch: Literal["auto", "fork", "command"] = "auto",
    say: Say = lambda text: None,
) -> ComparisonReport:
    """Make the runs of a comparison that are missing, and report on all.

    Args:
        comparison: from `read_comparison`.
        shard: which of how many parts of the runs to make here.
        only: the name of the runs to make here, in which * stands for anything.
        jobs: runs at once.
        check: let the first run of each variant go through the real commands too.
        launch: `fork` runs from this process; `command`, for several GPUs, runs `axolotl train`.
        say: called with a line of text at each step.

    Raises:
        AMoPOError: for a variant or data that can't be used, a folder of something else, or runs
            that were made with another config. Nothing is trained then.
    """
    if only and not any(fnmatchcase(run.label, only) for run in comparison.runs()):
        first = comparison.runs()[0].label
        raise ConfigError(f"--only {only}: no run has that name; write one such as {first}.")
    import_once()
    check_variants(comparison)
    claim(comparison)
    lock = FileLock(comparison.output / "lock")
    with lock:
        prepare_data(comparison, say)
    runs = comparison.runs()
    in_fork = launch == "fork" or (launch == "auto" and not needs_launcher(comparison))
    check_digests(comparison, runs)
    works = list(works_of(comparison, runs, in_fork=in_fork, check=check))
    mine = [
        work
        for number, work in enumerate(works)
        if number % shard[1] == shard[0] - 1 and fnmatchcase(work.about["run"], only or "*")
    ]
    make(mine, jobs, say)
    return report_on(comparison, after_runs=True)


def check_variants(comparison: Comparison) -> None:
    """Let axolotl validate the config of each variant's training and scoring.

    Raises:
        ConfigError: naming the variant.
    """
    base = comparison.base
    if comparison.folds:  # whose files are not there yet
        base = base | {"test_datasets": base["datasets"]}
    whole = replace(comparison, base=base)
    seen = set()
    for run in comparison.runs():
        if run.name in seen:
            continue
        seen.add(run.name)
        unfolded = Run(run.name, None, run.seed, run.variant, run.model)
        ours = [whole.scoring(unfolded, Path("scoring"))]
        if run.variant and run.variant.is_axolotls:
            ours.append(whole.pairing(unfolded, Path("pairing")))
        try:
            for values in ours:  # keys of ours, which need no schema of axolotl's
                check_before_launch(values)
            if run.variant:
                training = whole.training(unfolded, Path("training"))
                training.setdefault("datasets", [exported_entry({}, Path("pairs.jsonl"))])
                call(check_values, training, log=Path(os.devnull))
        except AMoPOError as error:
            raise ConfigError(f"{comparison.path}: {run.name}: {error}") from None


def needs_launcher(comparison: Comparison) -> bool:
    """Return whether runs take several processes, which a fork of this one can't be."""
    distributed = ("deepspeed", "fsdp", "fsdp_config", "use_ray")
    return any(comparison.base.get(key) for key in distributed) or call(_device_count) > 1


def _device_count() -> int:
    import torch

    return torch.accelerator.device_count()


def claim(comparison: Comparison) -> None:
    """Make the output folder, or take one that a comparison made.

    Raises:
        ConfigError: where it holds something else.
    """
    folder = comparison.output
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output: {folder} is a file; name a folder.")
    marker = folder / MARKER
    if folder.is_dir() and any(folder.iterdir()) and not marker.is_file():
        raise ConfigError(
            f"output: {folder} is there already and holds something else than a comparison; name "
            "another."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not marker.is_file():
        made = {"made_by": "axolotl amopo compare", "compare": comparison.path}
        marker.write_text(json.dumps(made) + "\n", encoding="utf-8")


def prepare_data(comparison: Comparison, say: Say) -> None:
    """Make folds, or count how many held-out prompts are trained on too."""
    log = comparison.output / "data.log"
    if comparison.folds:
        count = call(make_folds, comparison, log=log)
        say(f"{comparison.folds.count} folds of {count} prompts")
        return
    run = next(run for run in comparison.runs() if run.variant)
    values = comparison.scoring(run, comparison.output / "scoring")
    parts = [
        values | {"test_datasets": None, "datasets": values[key]}
        for key in ("datasets", "test_datasets")
    ]
    found = call(overlap, *parts, log=log)
    (comparison.output / OVERLAP).write_text(json.dumps(found) + "\n", encoding="utf-8")


def works_of(
    comparison: Comparison, runs: list[Run], *, in_fork: bool, check: bool
) -> Iterator[Work]:
    """Yield the work of each run; the first of each variant is checked."""
    first = set()
    for run in runs:
        folder = comparison.folder(run)
        variant = run.variant
        exported = bool(variant and variant.is_axolotls)
        yield Work(
            about=about(run) | {"config": comparison.config_digest(run)},
            folder=folder,
            digest=comparison.run_digest(run),
            measure=comparison.measure,
            scoring=comparison.scoring(run, folder),
            training=comparison.training(run, folder) if variant else None,
            pairing=comparison.pairing(run, folder) if exported else None,
            entry=comparison.base["datasets"][0] if exported else None,
            model=run.model,
            in_fork=in_fork,
            check=check and variant is not None and run.name not in first,
        )
        first.add(run.name)


def about(run: Run) -> Json:
    """Return what a line of the results says of which run it is."""
    keys = run.variant.changes if run.variant else {"model": run.model}
    return {"name": run.name, "fold": run.fold, "seed": run.seed, "run": run.label, "keys": keys}


def check_digests(comparison: Comparison, runs: list[Run]) -> None:
    """Refuse to mix runs of different configs; new variants, seeds and folds are only added.

    Raises:
        ConfigError: naming the runs that compare.yml has changed.
    """
    other = []
    for run in runs:
        line = finished(comparison.folder(run))
        if line and line["digest"] != comparison.run_digest(run):
            other.append(run.label)
    if other:
        raise other_config(comparison, other)


def other_config(comparison: Comparison, labels: list[str]) -> ConfigError:
    """Return the error that names runs of other configs than compare.yml now has."""
    shown = ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
    return ConfigError(
        f"{comparison.path}: {shown}: made with another config, other data or another measure than "
        f"it asks for now; name another output, or delete their folders in "
        f"{comparison.output / 'runs'}. (New names, seeds and folds can be added.)"
    )


def make(works: list[Work], jobs: int, say: Say) -> None:
    """Make the runs that are not complete, `jobs` at a time; one that fails leaves the others."""
    waiting = [work for work in works if not finished(work.folder)]
    if len(waiting) < len(works):
        say(f"{len(works) - len(waiting)} of {len(works)} runs are complete already")
    total, ended = len(waiting), 0
    running: dict[Any, tuple[Any, Work, float]] = {}
    clock = Clock(waiting, jobs)
    while waiting or running:
        while waiting and len(running) < jobs:
            work = waiting.pop(0)
            work.folder.mkdir(parents=True, exist_ok=True)
            process = start(do_work, work, log=work.folder / "log.txt")
            running[process.sentinel] = process, work, time.monotonic()
        for sentinel in connection.wait(list(running)):
            process, work, begun = running.pop(sentinel)
            process.join()
            ended += 1
            seconds = time.monotonic() - begun
            clock.add(work, seconds)
            left = clock.left(waiting)
            head = f"[{ended}/{total}] {work.about['run']}"
            tail = f"; about {duration(left)} left" if waiting else ""
            if process.exitcode == 0:
                say(f"{head}: done in {duration(seconds)}{tail}")
            elif process.exitcode == BUSY:
                say(f"{head}: another process is making it{tail}")
            else:
                reason = note_failure(work, process.exitcode)
                indented = reason.replace("\n", "\n    ")
                say(f"{head}: FAILED, see {work.folder / 'log.txt'}{tail}\n    {indented}")


class Clock:
    """Estimate how long runs take: each as those of its name took, a new one as all did."""

    def __init__(self, works: list[Work], jobs: int):
        self.jobs = jobs
        self.took: dict[tuple[str, bool], list[float]] = {}

    def add(self, work: Work, seconds: float) -> None:
        """Take down a run that ended."""
        self.took.setdefault((work.about["name"], work.check), []).append(seconds)

    def left(self, works: list[Work]) -> float:
        """Return the seconds that runs will take."""
        known = [seconds for took in self.took.values() for seconds in took]
        usual = sum(known) / len(known)
        made = 0.0
        for work in works:
            took = self.took.get((work.about["name"], work.check), [usual])
            made += sum(took) / len(took)
        return made / self.jobs


def duration(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def report_on(comparison: Comparison, *, after_runs: bool = False) -> ComparisonReport:
    """Gather the lines of complete runs, write them down, and put the tables together.

    Nothing is trained. A line comes from its run's folder, or where that is not here from
    `results.jsonl`: so several machines' files can be joined into one.

    Args:
        after_runs: the runs' folders were checked; a line of another config is one whose folder
            was deleted to make it anew.

    Raises:
        AMoPOError: where no run is complete, or runs are of another config.
    """
    runs, output = comparison.runs(), comparison.output
    there = read_lines(output / RESULTS)
    lines, other, failed = [], [], {}
    for run in runs:
        line = finished(comparison.folder(run)) or there.get(run.label)
        if line and line["config"] != comparison.config_digest(run):
            other.append(run.label)
            line = None
        if line:
            lines.append(line)
        elif (comparison.folder(run) / FAILED).is_file():
            text = (comparison.folder(run) / FAILED).read_text(encoding="utf-8")
            failed[run.label] = json.loads(text)["failed"]
    if other and not after_runs:
        raise other_config(comparison, other)
    notes = list(comparison.notes)
    if (output / OVERLAP).is_file():
        found = json.loads((output / OVERLAP).read_text(encoding="utf-8"))
        if found["shared"]:
            notes.append(
                f"{found['shared']} of {found['heldout']} held-out prompts are trained on too: "
                "what is measured on them may be learnt by heart."
            )
    unknown = sorted(set(there) - {run.label for run in runs})
    if unknown:
        notes.append(f"{len(unknown)} runs that compare.yml no longer names are left out.")
        lines_kept = [*lines, *(there[label] for label in unknown)]
    else:
        lines_kept = lines
    if not lines:
        reasons = "; ".join(f"{label}: {text}" for label, text in failed.items())
        raise AMoPOError(f"{output}: no run is complete{': ' if reasons else ''}{reasons}")
    write_lines(output / RESULTS, lines_kept)
    if len(lines) < len(runs):
        notes.append(f"{len(lines)} of {len(runs)} runs are complete.")
    made = make_report(comparison, lines, notes, len(runs), failed)
    (output / REPORT).write_text(json.dumps(made.to_json()) + "\n", encoding="utf-8")
    return made


def make_report(
    comparison: Comparison,
    lines: list[Json],
    notes: list[str],
    planned: int,
    failed: dict[str, str],
) -> ComparisonReport:
    """Return the report on lines of results, which are all that it is made from."""
    study = Study(lines, comparison.baseline)
    measure = comparison.measure
    kinds: list[Prompting] = ["own", "plain"] if measure.prompts == "both" else [measure.prompts]
    tables = [table for kind in kinds for table in study.tables(kind, measure.seed)]
    named = correct_p(tables, comparison.comparisons)
    costs = study.costs()
    for name, cost in costs.items():
        if cost.differs:
            notes.append(
                f"{name}: its budget is not {comparison.baseline}'s ({', '.join(cost.differs)})."
            )
    counts: dict[str, int] = {}
    for line in lines:
        counts[line["name"]] = counts.get(line["name"], 0) + 1
    if comparison.baseline not in counts:
        notes.append(f"{comparison.baseline}, the baseline, has no complete run: no differences.")
    if study.prompt_count < 30:
        notes.append(f"{study.prompt_count} prompts: intervals are rough.")
    differs = {line["run"]: line["differs"] for line in lines if line.get("differs")}
    for run, sentences in differs.items():
        notes.append(f"{run}: forked and by the real commands differ: {'; '.join(sentences)}.")
    return ComparisonReport(
        path=comparison.path,
        output=comparison.output,
        baseline=comparison.baseline,
        names=[name for name in comparison.names() if name in counts],
        planned=planned,
        done=len(lines),
        pairs=sum(len(places) for places in study.places.values()),
        prompts=study.prompt_count,
        ratings=study.names,
        tables=tables,
        costs=costs,
        changes={line["name"]: line["keys"] for line in lines},
        named=named,
        failed=failed,
        differs=differs,
        checked=sum("differs" in line for line in lines),
        notes=[*notes, *study.notes],
    )


def read_lines(path: Path) -> dict[str, Json]:
    """Return lines of results by their run."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return {line["run"]: line for line in lines}


def write_lines(path: Path, lines: list[Json]) -> None:
    """Write lines of results, whole or not at all."""
    new = path.with_name(f"_{path.name}")
    new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    new.replace(path)


def dry_run(comparison: Comparison, gpu: str | None = None) -> list[PlannedRuns]:
    """Return the runs of each variant, and what `plan` says of one; nothing is written.

    Args:
        gpu: a card that `plan` knows; by default this machine's CPU.

    Raises:
        AMoPOError: as `compare` does.
    """
    import_once()
    check_variants(comparison)
    made: dict[str, PlannedRuns] = {}
    for run in comparison.runs():
        one = made.setdefault(run.name, PlannedRuns(run.name, 0, 0, about(run)["keys"]))
        one.runs += 1
        one.done += finished(comparison.folder(run)) is not None
        if one.runs > 1:
            continue
        if run.variant is None:
            one.why_no_plan = "a model that is there"
        elif run.variant.is_axolotls:
            one.why_no_plan = "plan knows rl: amopo alone"
        else:
            one.plan = call(_plan, run.variant.values, gpu or "cpu", log=Path(os.devnull))
    return list(made.values())


def _plan(values: Json, gpu: str) -> Json:
    with tempfile.TemporaryDirectory() as folder:
        path = write_yaml(Path(folder) / "config.yml", values)
        output = Path(folder) / "plan.json"
        with contextlib.suppress(SystemExit):  # it does not fit, which is an answer too
            amopo_here(["plan", str(path), "--gpu", gpu, "--quiet", "--output", str(output)])
        return json.loads(output.read_text(encoding="utf-8"))
