"""`amopo.console`: what a training run shows, in place of a dictionary of everything it logs.

    step 40/200 | loss 1.8412 (-0.2110) | learning rate 3e-07 | overall: margin +0.12 (+0.10), ...

On a terminal the same numbers are a table that is drawn anew in its place. In brackets stands the
change since the run's first number of that name, also where the run was resumed. Trackers, the
run's log and the trainer's state get everything, from the trainer itself.
"""

import contextlib
import logging
import math
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

from axolotl.utils.logging import get_logger
from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from axolotl_amopo.training.runs import format_margin, format_metric, logged_numbers

LOG = get_logger(__name__)

KINDS = {"train": "training", "eval": "held out"}
# Per criterion: a metric's key, its name, and 1 where it should rise.
WEIGHT = ("amopo/{}/weight", "weight", 0)
SHARE = ("gradients/{}/share", "gradient share", 0)
METRICS = (("amopo/{}/margin", "margin", 1), ("amopo/{}/accuracy", "accuracy", 1), WEIGHT, SHARE)
FASTEST = 0.1  # seconds between two drawings that only move a bar


def console_callbacks(trainer: Any) -> list[TrainerCallback]:
    """Return the callbacks that show a run, and take away transformers' own, which they replace.

    With `amopo.console: off`, nothing is taken away and the list is empty.
    """
    if trainer.amopo.console == "off":
        return []
    # The one that transformers adds; the second is there where progress bars are turned off.
    bars = not trainer.args.disable_tqdm
    trainer.pop_callback(DEFAULT_PROGRESS_CALLBACK if bars else PrinterCallback)
    reader = Reader(trainer.amopo.criteria, reference="reference" in trainer.objective.needs)
    # Not sys.stdout, which axolotl copies into debug.log: drawings don't belong there.
    console = Console(file=sys.__stdout__, highlight=False)
    if trainer.amopo.console == "table" and bars and sys.stdout.isatty() and console.is_interactive:
        return [LiveTable(reader, console)]
    return [Lines(reader), *([Bar()] if bars else [])]


def close_table(trainer: Any) -> None:
    """Leave the terminal to others, whether training has ended or failed."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, LiveTable):
            callback.close()


class Number(NamedTuple):
    """A number as it is shown."""

    name: str
    value: str  # "-" where it was not logged
    change: str = ""  # since the run's first; "" where this is the first
    better: bool | None = None  # of the change; None where neither direction is better

    def __str__(self) -> str:
        change = f" ({self.change})" if self.change else ""
        return f"{self.name} {self.value}{change}"


class Logged(NamedTuple):
    """Hold what was logged at a step, of training or of an evaluation."""

    kind: str
    step: int
    totals: list[Number]
    criteria: dict[str, list[Number]]  # the same numbers for each; empty where there are none


class Reader:
    """Reads a trainer's log, and keeps the first value of every metric."""

    def __init__(self, criteria: list[str], *, reference: bool):
        """Begin with no values.

        Args:
            criteria: their names.
            reference: whether the objective compares the model with one, see `logged_numbers`.
        """
        self.criteria = criteria
        self.reference = reference
        self.first: dict[tuple[str, str], float] = {}

    def begin(self, history: list[dict[str, float]]) -> None:
        """Forget what was, and read what a resumed run had logged."""
        self.first = {}
        for line in history:
            self.read(line)

    def read(self, line: dict[str, float]) -> Logged | None:
        """Return what is shown of a line of the trainer's log; None for one of another kind."""
        kind, entry = logged_numbers(line, reference=self.reference)
        if kind not in KINDS:
            return None
        totals = [self._number(kind, entry, "loss", "loss", -1)]
        if "learning_rate" in entry:
            totals.append(Number("learning rate", f"{entry['learning_rate']:.3g}"))
        shown = [m for m in METRICS if any(m[0].format(name) in entry for name in self.criteria)]
        if SHARE in shown:  # how much of the step a criterion makes; its loss's weight is constant
            shown = [metric for metric in shown if metric != WEIGHT]
        criteria = {
            name: [self._number(kind, entry, key.format(name), *about) for key, *about in shown]
            for name in self.criteria
            if shown
        }
        return Logged(kind, int(entry["step"]), totals, criteria)

    def _number(
        self, kind: str, entry: dict[str, float], key: str, name: str, direction: int
    ) -> Number:
        value = entry.get(key)
        shown = "-" if value is None else _format(name, value)
        if value is None or not math.isfinite(value):
            return Number(name, shown)
        if (kind, key) not in self.first:
            self.first[kind, key] = value
            return Number(name, shown)
        change = value - self.first[kind, key]
        better = change * direction > 0 if change * direction else None
        return Number(name, shown, _format_change(name, change), better)


def _format(name: str, value: float) -> str:
    return f"{value:.4f}" if name == "loss" else format_metric(name, value)


def _format_change(name: str, change: float) -> str:
    match name:
        case "margin":
            return format_margin(change)
        case "accuracy":  # points, of a value in percent
            return f"{100 * change:+z.1f}"
        case "loss":
            return f"{change:+z.4f}"
    return f"{change:+z.3f}"


def describe(line: dict[str, float], logged: Logged | None, max_steps: int) -> str:
    """Return a line of the trainer's log as a line of text.

    Args:
        logged: what a `Reader` has made of it.
    """
    where = f"step {line['step']}/{max_steps}"
    if logged:
        parts = [where if logged.kind == "train" else f"{where}, {KINDS[logged.kind]}"]
        parts += map(str, logged.totals)
        for name, numbers in logged.criteria.items():
            parts.append(f"{name}: {', '.join(map(str, numbers))}")
        return " | ".join(parts)
    if "train_runtime" in line:
        return f"{where}, finished after {timedelta(seconds=round(line['train_runtime']))}"
    others = {name: value for name, value in line.items() if name not in ("step", "epoch")}
    return " | ".join([where, *(f"{name} {_plain(value)}" for name, value in others.items())])


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Bar(ProgressCallback):
    """transformers' progress bar, which no longer prints what is logged."""

    def on_log(self, *_: Any, **__: Any) -> None:
        """Print nothing."""


class Lines(TrainerCallback):
    """Prints a line whenever training logs something, on the main process alone."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training = state.is_world_process_zero
        self.reader.begin(state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.training:
            line = state.log_history[-1]
            # Beside a bar, which `print` would tear.
            tqdm.write(describe(line, self.reader.read(line), state.max_steps))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training = False


class LiveTable(ProgressCallback):
    """Draws the last numbers of training and of the evaluations, and a bar, on the main process.

    What others write to the terminal meanwhile, the table makes room for: it is taken away, the
    lines are written where they would have been, and it is drawn below them. So there is no thread
    and no hidden cursor, and a process that is killed leaves the terminal usable. rich's own `Live`
    prints others' lines to its console, past axolotl's copy of stdout in debug.log, and leaves the
    streams of loggers alone.
    """

    def __init__(self, reader: Reader, console: Console):
        super().__init__()
        self.reader = reader
        self.console = console
        self.streams: contextlib.ExitStack | None = None  # others' that are watched; in training
        self.lock = threading.RLock()
        self.height = 0  # lines that the drawing has on the terminal
        self.drawn = 0.0  # seconds, of a monotonic clock

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.reader.begin(state.log_history)
        self.last: dict[str, Logged] = {}
        # Never started: it would draw, and redirect streams, in a way of its own.
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            auto_refresh=False,
            speed_estimate_period=3600,  # seconds; else a step of half a minute has no estimate
        )
        self.steps = self.bars.add_task("step", total=state.max_steps, completed=state.global_step)
        self.batches: Any = None  # the bar of an evaluation
        self.streams = _watch(self)
        self.draw()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.streams:
            self.bars.update(self.steps, completed=state.global_step)
            self._draw_in_time()

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any
    ) -> None:
        if not self.streams:  # an evaluation without training
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader)
            return
        if self.batches is None:
            self.batches = self.bars.add_task("evaluation", total=len(eval_dataloader))
        self.bars.advance(self.batches)
        self._draw_in_time()

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        super().on_evaluate(args, state, control, **others)
        if self.streams and self.batches is not None:
            self.bars.remove_task(self.batches)
            self.batches = None

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.streams:
            return
        line = state.log_history[-1]
        logged = self.reader.read(line)
        text = describe(line, logged, state.max_steps)
        if logged:
            self.last[logged.kind] = logged
            LOG.debug(text)  # for debug.log, which the table is not in
            self.draw()
        else:
            print(text)  # above the table

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Draw for the last time, and watch the others' streams no more."""
        if self.streams:
            self.draw()
            self.height = 0
            self.streams.close()
            self.streams = None

    def _draw_in_time(self) -> None:
        if time.monotonic() - self.drawn >= FASTEST:
            self.draw()

    def draw(self) -> None:
        """Draw the table in the place of the one that is there."""
        with self.lock:
            with self.console.capture() as drawing:
                self.console.print(self._picture())
            # What has left the terminal at its top can't be drawn over.
            lines = drawing.get().split("\n")[:-1][: self.console.height - 1]
            self._write(self._erasure() + "".join(f"{line}\n" for line in lines))
            self.height, self.drawn = len(lines), time.monotonic()

    @contextlib.contextmanager
    def taken_away(self) -> Iterator[None]:
        """Make room on the terminal for lines of others."""
        with self.lock:
            self._write(self._erasure())
            self.height = 0
            yield
            self.draw()

    def _erasure(self) -> str:
        return f"\x1b[{self.height}F\x1b[J" if self.height else ""  # so many lines up, and delete

    def _write(self, text: str) -> None:
        self.console.file.write(text)
        self.console.file.flush()

    def _picture(self) -> Group:
        parts: list[Any] = [self.bars]
        for kind in KINDS:
            if kind in self.last:
                parts += _section(self.last[kind])
        if any(number.change for one in self.last.values() for number in one.totals):
            parts.append(Text("In brackets: the change since the run's first.", style="dim"))
        return Group(*parts)


def _section(logged: Logged) -> Iterator[Any]:
    head = Text.assemble((f"{KINDS[logged.kind]}, step {logged.step}:", "bold"))
    for i, number in enumerate(logged.totals):
        head.append("," if i else "").append(f" {number.name} {number.value} ")
        head.append_text(_change(number)).rstrip()
    yield head
    if not logged.criteria:
        return
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("", overflow="ellipsis")
    for number in next(iter(logged.criteria.values())):
        table.add_column(number.name, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
    for name, numbers in logged.criteria.items():
        cells = ((Text(number.value), _change(number)) for number in numbers)
        table.add_row(Text(name), *(cell for pair in cells for cell in pair))
    yield table


def _change(number: Number) -> Text:
    style = {True: "green", False: "red", None: "dim"}[number.better]
    return Text(f"({number.change})" if number.change else "", style=style)


class _Watched:
    """Stands in for a stream that leads to the table's terminal."""

    def __init__(self, stream: Any, table: LiveTable):
        self.stream = stream
        self.table = table
        self.held = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write whole lines where the table stands, and hold back what has no end yet."""
        lines, end, self.held = (self.held + text).rpartition("\n")
        if end:
            with self.table.taken_away():
                self.stream.write(lines + end)
                self.stream.flush()
        return len(text)

    def release(self) -> None:
        """Write what was held back."""
        self.stream.write(self.held)
        self.held = ""


def _watch(table: LiveTable) -> contextlib.ExitStack:
    """Put stand-ins in the places of stdout, stderr and loggers' streams that lead to a terminal.

    Returns what puts them back when it is closed.
    """
    stack = contextlib.ExitStack()

    def stand_in(stream: Any) -> Any:
        watched = _Watched(stream, table)
        stack.callback(watched.release)
        return watched

    for redirect, stream in (
        (contextlib.redirect_stdout, sys.stdout),
        (contextlib.redirect_stderr, sys.stderr),
    ):
        if stream.isatty():
            stack.enter_context(redirect(stand_in(stream)))
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in {h for logger in loggers for h in getattr(logger, "handlers", ())}:
        # One that asks for sys.stderr whenever it writes has its stand-in already.
        stream = getattr(handler, "stream", None)
        if isinstance(handler, logging.StreamHandler) and _is_free_terminal(stream):
            stack.callback(handler.setStream, stream)
            handler.setStream(stand_in(stream))
    return stack


def _is_free_terminal(stream: Any) -> bool:
    return not isinstance(stream, _Watched) and getattr(stream, "isatty", bool)()
