"""Test what a training run shows: lines, or a table that is drawn anew in its place."""

import io
import logging
import re
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_callback import CallbackHandler

from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.config.parse import parse_block
from axolotl_amopo.training.console import (
    Bar,
    Lines,
    LiveTable,
    Reader,
    close_table,
    console_callbacks,
)

CRITERIA = ["overall", "honesty"]


def logged(step, *, prefix="", loss=None, **metrics):
    """Return a line of the trainer's log; a metric is (of overall, of honesty)."""
    line = {"step": step, "epoch": step / 100} | ({} if loss is None else {f"{prefix}loss": loss})
    for metric, values in metrics.items():
        for name, value in zip(CRITERIA, values, strict=True):
            line[f"{prefix}amopo/{name}/{metric}"] = value
    return line


TRAIN = [
    logged(10, loss=2.0, margin=(0.0, 0.5), accuracy=(0.5, 0.75), weight=(0.5, 0.5))
    | {"learning_rate": 3e-7, "grad_norm": 1.5},
    logged(20, loss=1.75, margin=(0.25, 0.375), accuracy=(0.625, 0.75), weight=(0.25, 0.75))
    | {"learning_rate": 1e-7, "grad_norm": 1.25},
]
HELD_OUT = [
    logged(0, prefix="eval_", loss=2.25, margin=(0.125, 0.25), accuracy=(0.5, 0.5)),
    logged(20, prefix="eval_", loss=2.5, margin=(1.125, 0.75), accuracy=(0.625, 0.25)),
]
END = {"step": 20, "epoch": 0.2, "train_runtime": 3671.4, "train_loss": 1.9, "total_flos": 1e9}
RUN = [HELD_OUT[0], *TRAIN, HELD_OUT[1], END]


def play(callback, lines, *, history=(), main=True, end=True):
    """Let a trainer's state reach a callback as a trainer does; return the state."""
    state = TrainerState(max_steps=200, is_world_process_zero=main, log_history=list(history))
    callback.on_train_begin(None, state, None)
    for line in lines:
        state.global_step = line["step"]
        state.log_history.append(line)
        callback.on_step_end(None, state, None)
        callback.on_log(None, state, None, logs=line)
    if end:
        callback.on_train_end(None, state, None)
    return state


def reader(*, reference=False):
    return Reader(CRITERIA, reference=reference)


def lines_of(capsys, *lines, reference=False, **options):
    play(Lines(reader(reference=reference)), lines, **options)
    return capsys.readouterr().out.splitlines()


class Terminal(io.StringIO):
    """A terminal that is as wide as it must be, for what the table writes."""

    def isatty(self):
        return True

    @property
    def screen(self):
        """Its lines, without colours, as a person sees them."""
        shown = [""]
        for part in re.split(r"(\x1b\[\d+F\x1b\[J|\n)", self.getvalue()):
            if part == "\n":
                shown.append("")
            elif up := re.fullmatch(r"\x1b\[(\d+)F\x1b\[J", part):
                assert int(up[1]) < len(shown)
                shown = [*shown[: len(shown) - 1 - int(up[1])], ""]
            else:
                shown[-1] += re.sub(r"\x1b\[[\d;]*m", "", part)
        return [line.rstrip() for line in shown]


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # of which a console of rich asks, whatever is forced
    return Terminal()


def table(terminal, *, height=25, **options):
    console = Console(force_terminal=True, width=100, height=height, file=terminal)
    return LiveTable(reader(**options), console)


# Lines


def test_a_line_per_log(capsys):
    assert lines_of(capsys, *RUN) == [
        "step 0/200, held out | loss 2.2500 | overall: margin +0.12, accuracy 50.0% | "
        "honesty: margin +0.25, accuracy 50.0%",
        "step 10/200 | loss 2.0000 | learning rate 3e-07 | "
        "overall: margin +0.00, accuracy 50.0%, weight 0.500 | "
        "honesty: margin +0.50, accuracy 75.0%, weight 0.500",
        "step 20/200 | loss 1.7500 (-0.2500) | learning rate 1e-07 | "
        "overall: margin +0.25 (+0.25), accuracy 62.5% (+12.5), weight 0.250 (-0.250) | "
        "honesty: margin +0.38 (-0.12), accuracy 75.0% (+0.0), weight 0.750 (+0.250)",
        "step 20/200, held out | loss 2.5000 (+0.2500) | "
        "overall: margin +1.12 (+1.00), accuracy 62.5% (+12.5) | "
        "honesty: margin +0.75 (+0.50), accuracy 25.0% (-25.0)",
        "step 20/200, finished after 1:01:11",
    ]


def test_a_resumed_run_is_compared_with_its_first_numbers(capsys):
    (line,) = lines_of(capsys, TRAIN[1], history=[HELD_OUT[0], TRAIN[0]])
    assert "loss 1.7500 (-0.2500)" in line and "accuracy 62.5% (+12.5)" in line


def test_a_run_that_starts_anew_forgets_the_one_before(capsys):
    callback = Lines(reader())
    play(callback, [TRAIN[0]])
    play(callback, [TRAIN[1]])
    assert "(" not in capsys.readouterr().out


def test_nothing_is_shown_elsewhere(capsys, terminal):
    """On other processes, and of an evaluation without training."""
    assert lines_of(capsys, *RUN, main=False) == []
    play(table(terminal), RUN, main=False)
    state = TrainerState(log_history=[HELD_OUT[0]], is_world_process_zero=True)
    for callback in (Lines(reader()), table(terminal)):
        callback.on_log(None, state, None, logs=HELD_OUT[0])
    assert capsys.readouterr().out == terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        pytest.param(logged(1, loss=2.5), "step 1/200 | loss 2.5000", id="single responses"),
        pytest.param(
            {k: v for k, v in logged(1, loss=2.5, margin=(0.5, 1)).items() if "honesty" not in k},
            "step 1/200 | loss 2.5000 | overall: margin +0.50 | honesty: margin -",
            id="a criterion that says nothing",
        ),
        pytest.param(logged(1, loss=0.0), "step 1/200 | loss nan", id="every loss NaN"),
        pytest.param(
            logged(1, loss=1.0, margin=(1e-4, -1e-9)),
            "step 1/200 | loss 1.0000 | overall: margin +0.0001 | honesty: margin -1e-09",
            id="small margins",
        ),
        pytest.param(
            logged(1, loss=1.0, weight=(0.5, 0.5), margin=(1, 1))
            | {"gradients/overall/share": 0.875, "gradients/honesty/share": 0.125},
            "step 1/200 | loss 1.0000 | overall: margin +1.00, gradient share 0.875 | "
            "honesty: margin +1.00, gradient share 0.125",
            id="shares of gradients instead of weights",
        ),
        pytest.param({"step": 1, "a": 0.123456, "b": "x"}, "step 1/200 | a 0.1235 | b x", id="own"),
    ],
)
def test_what_is_not_logged_or_odd(line, expected, capsys):
    assert lines_of(capsys, line) == [expected]


def test_equal_rewards_have_no_accuracy(capsys):
    """As in reports: a model that is its own reference orders nothing."""
    lines = lines_of(capsys, *HELD_OUT, reference=True)
    assert "accuracy" not in lines[0]
    assert "overall: margin +1.12 (+1.00), accuracy 62.5% |" in lines[1]


# The table


def test_a_table_in_its_place(terminal):
    live = table(terminal)
    play(live, RUN[:-1])
    assert terminal.screen == [
        terminal.screen[0],
        "training, step 20: loss 1.7500 (-0.2500), learning rate 1e-07",
        "         margin           accuracy           weight",
        "overall   +0.25  (+0.25)     62.5%  (+12.5)   0.250  (-0.250)",
        "honesty   +0.38  (-0.12)     75.0%  (+0.0)    0.750  (+0.250)",
        "held out, step 20: loss 2.5000 (+0.2500)",
        "         margin           accuracy",
        "overall   +1.12  (+1.00)     62.5%  (+12.5)",
        "honesty   +0.75  (+0.50)     25.0%  (-25.0)",
        "In brackets: the change since the run's first.",
        "",
    ]
    assert re.match(r"step .* 20/200 ", terminal.screen[0])
    green, red = "\x1b[32m(+12.5)", "\x1b[31m(-25.0)"
    assert green in terminal.getvalue() and red in terminal.getvalue()


def test_bars_of_steps_and_of_an_evaluation(terminal):
    live = table(terminal)
    state = play(live, TRAIN, end=False)
    live.drawn = 0  # else too short a while ago
    live.on_prediction_step(None, state, None, eval_dataloader=range(7))
    assert re.match(r"evaluation .* 1/7 ", terminal.screen[1])
    live.on_evaluate(None, state, None)
    live.on_train_end(None, state, None)
    assert not any("evaluation" in line for line in terminal.screen)


def test_a_low_terminal_loses_the_end_of_the_table(terminal):
    play(table(terminal, height=4), TRAIN)
    assert [line.split(" ")[0] for line in terminal.screen] == ["step", "training,", "", ""]


def test_lines_of_others_stand_above_the_table(terminal, monkeypatch):
    """Printed or logged while it is there, in order and whole; afterwards the streams are free."""
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", stderr := Terminal())
    log, handler = logging.getLogger("axolotl.of_others"), logging.StreamHandler(terminal)
    log.addHandler(handler)
    log.addHandler(logging.lastResort)  # asks for sys.stderr whenever it writes
    live = table(terminal)
    state = play(live, [HELD_OUT[0]], end=False)
    print("one", end="")
    log.warning("logged")
    print(" two")
    print("bar\rbar of others", end="", file=sys.stderr)
    live.on_log(None, state, None, logs=HELD_OUT[0])
    assert terminal.screen[:2] == ["logged", "one two"]
    assert terminal.screen[2].startswith("step ") and len(terminal.screen) == 9
    assert stderr.getvalue() == "logged\n"  # the rest is held back, as it has no end
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[Bar(), live]))
    close_table(trainer)
    log.handlers.clear()
    assert sys.stdout is terminal and sys.stderr is stderr and handler.stream is terminal
    assert stderr.getvalue() == "logged\nbar\rbar of others"
    shown = terminal.screen
    print("after")
    assert terminal.screen == [*shown[:-1], "after", ""]


def test_other_lines_of_the_log_stand_above_the_table(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    play(table(terminal), RUN)
    assert terminal.screen[0] == "step 20/200, finished after 1:01:11"
    assert terminal.screen[1].startswith("step ")


# Which of them


@pytest.mark.parametrize(
    ("chosen", "on_terminal", "bars", "expected"),
    [
        (None, True, True, [LiveTable]),
        ("table", False, True, [Lines, Bar]),
        ("plain", True, True, [Lines, Bar]),
        ("table", True, False, [Lines]),
        ("off", True, True, []),
        ("off", True, False, []),
    ],
)
def test_what_shows_a_run(chosen, on_terminal, bars, expected, terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal if on_terminal else io.StringIO())
    # Where a notebook's kernel was started, say; its own output goes elsewhere.
    monkeypatch.setattr(sys, "__stdout__", terminal)
    config = AMoPOConfig() if chosen is None else AMoPOConfig(console=chosen)
    own = ProgressCallback() if bars else PrinterCallback()
    handler = CallbackHandler([own], None, None, None, None)
    trainer = SimpleNamespace(
        amopo=config,
        args=SimpleNamespace(disable_tqdm=not bars),
        objective=config.make_objective(),
        pop_callback=handler.pop_callback,
    )
    assert [type(callback) for callback in console_callbacks(trainer)] == expected
    assert (own in handler.callbacks) == (chosen == "off")


def test_off_needs_no_quotes():
    assert parse_block(AMoPOConfig, {"console": False}, "amopo").console == "off"
