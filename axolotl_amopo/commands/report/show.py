"""A report for people at a terminal, 80 columns wide, and for programs."""

from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from axolotl_amopo.commands.report.findings import findings, outcome
from axolotl_amopo.training.runs import Run

COMPARED = ("accuracy", "margin", "weight")
COLOURS = {"problem": "red", "warning": "yellow", "note": "cyan"}


def show(runs: dict[str, Run], console: Console) -> None:
    """Print the runs, by their names."""
    for name, run in runs.items():
        console.rule(Text(name), align="left")
        console.print(Text(headline(run)))
        table = Table(box=None, pad_edge=False)
        table.add_column("prompt", overflow="fold")
        for metric in COMPARED:
            table.add_column(metric, justify="right")
            table.add_column("after", justify="right")
        for prompt in run.prompts:
            cells = [number(metric, value) for metric, value in compared(run, prompt)]
            table.add_row(Text(prompt), *cells)
        console.print(Padding(table, (1, 0)))
        console.print(Text(basis(run), style="dim"))
        for sentence in outcome(run):
            console.print(Text(sentence))
        found = findings(run)
        if not found:
            console.print("Nothing looks wrong.", style="dim")
        for finding in found:
            colour = COLOURS[finding.severity]
            console.print(Text.assemble((finding.severity, f"bold {colour}"), f" {finding.text}"))
            console.print(Padding(Text(finding.advice, style="dim"), (0, 0, 0, 2)))
        console.print()


def to_json(run: Run) -> dict[str, Any]:
    """Numbers before and after, and what was found. None where something was not logged."""
    totals = (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/longer_wins",
    )
    per_prompt = (*COMPARED, "loss", "prob", "reward_chosen", "reward_rejected")

    def ends(metric: str) -> dict[str, float | None]:
        change = run.change(metric)
        return {"before": change.before, "after": change.after}

    return {
        "folder": str(run.folder),
        "log": str(run.file),
        "status": run.status,
        "step": run.step,
        "max_steps": run.max_steps,
        "seconds": run.seconds,
        "resumed_at": run.resumed,
        "basis": "evaluation" if run.by_evaluation else "training",
        "prompts": {
            name: {metric: ends(f"amopo/{name}/{metric}") for metric in per_prompt}
            for name in run.prompts
        },
        "totals": {metric: ends(metric) for metric in totals},
        "outcome": outcome(run),
        "findings": [vars(finding) for finding in findings(run)],
    }


def compared(run: Run, prompt: str) -> list[tuple[str, float | None]]:
    """A prompt's metrics, each before and after."""
    changes = {metric: run.change(f"amopo/{prompt}/{metric}") for metric in COMPARED}
    return [
        (metric, value)
        for metric, change in changes.items()
        for value in (change.before, change.after)
    ]


def number(metric: str, value: float | None) -> str:
    """A metric's value as it is written for people."""
    if value is None:
        return "-"
    return {"accuracy": "{:.1%}", "margin": "{:+.2f}"}.get(metric, "{:.3f}").format(value)


def headline(run: Run) -> str:
    """What was trained, in a sentence."""
    about = run.about
    what = str(about.get("model") or "")
    if about.get("adapter"):
        what += f" with {about['adapter']}"
    parts = [what] if what else []
    parts += [
        f"{about[key]} pairs to {purpose}"
        for key, purpose in (("train_pairs", "train on"), ("eval_pairs", "evaluate with"))
        if about.get(key)
    ]
    dimensions = sum(name != "overall" for name in run.prompts)
    parts.append(f"{dimensions} dimension{'' if dimensions == 1 else 's'}")
    parts.append(f"step {run.step}" + (f" of {run.max_steps}" if run.max_steps else ""))
    if run.seconds is not None:
        parts.append(f"in {duration(run.seconds)}")
    return ", ".join([*parts, run.status])


def basis(run: Run) -> str:
    """What "before" and "after" are."""
    if run.by_evaluation:
        first, last = (int(run.evals[i]["step"]) for i in (0, -1))
        return f"Before and after: the evaluations at step {first} and step {last}."
    count = "one evaluation" if run.evals else "no evaluation"
    return (
        f"Before and after: means of the first and the last {run.end} of {len(run.train)} training "
        f"entries, as there was {count}; noisier, and of pairs that were trained on."
    )


def duration(seconds: float) -> str:
    """1:02:03, or 45 s."""
    return f"{seconds:.0f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
