"""Processes that are forked from this one, which has imported axolotl once.

Importing it takes longer than a short run. A forked process has it all, and what a run leaves
behind in modules (axolotl's plugins, its log, a model) ends with the process. This one must never
compute: OpenMP's threads and a GPU's context do not survive a fork.
"""

import functools
import gc
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from axolotl_amopo.commands.kit.launch import end_with_parent
from axolotl_amopo.errors import AMoPOError, wants_traceback

# What takes longest of training and scoring.
IMPORTS = (
    "axolotl.cli.config",
    "axolotl.cli.train",
    "axolotl.common.datasets",
    "axolotl.core.builders",
    "axolotl.train",
    "axolotl_amopo.training.trainer",
    "axolotl_amopo.training.trackers",
    "peft",
)


def import_once() -> None:
    """Import what runs need. No GPU is touched."""
    # Or torch asks the driver whether there is a GPU, after which no fork can use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    for name in IMPORTS:
        importlib.import_module(name)


def start(function: Callable[..., None], *arguments: Any, log: Path) -> BaseProcess:
    """Start a function in a process of its own, and return that.

    Args:
        log: what the process prints is added there.
    """
    process = _process(_run, function, arguments, log)
    process.start()
    return process


def call(function: Callable[..., Any], *arguments: Any, log: Path | None = None) -> Any:
    """Return what a function returns, called in a process of its own.

    Args:
        log: what the process prints is added there; by default it goes where this one prints.

    Raises:
        AMoPOError: of the function's own, or saying how the process ended.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = _process(_answer, sender, function, arguments, log)
    process.start()
    sender.close()
    try:
        kind, value = receiver.recv()
    except EOFError:
        process.join()
        raise AMoPOError(f"a process ended with {process.exitcode}") from None
    finally:
        receiver.close()
    process.join()
    if kind == "error":
        raise AMoPOError(value)
    return value


def _process(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    return multiprocessing.get_context("fork").Process(target=target, args=arguments)


def _run(function: Callable[..., None], arguments: tuple[Any, ...], log: Path | None) -> None:
    _settle(log)
    try:
        function(*arguments)
    except AMoPOError as error:
        if wants_traceback():
            raise
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


def _answer(
    sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], log: Path | None
) -> None:
    _settle(log)
    try:
        answer = ("value", function(*arguments))
    except AMoPOError as error:
        answer = ("error", str(error))
    except BaseException as error:
        traceback.print_exc()
        answer = ("error", f"{type(error).__name__}: {str(error).strip().partition(os.linesep)[0]}")
    sender.send(answer)


def _settle(log: Path | None) -> None:
    """Make a forked process one of its own: it ends with its parent, and prints to its log."""
    end_with_parent()
    save_in_this_process()
    gc.freeze()  # axolotl collects garbage eight times a run, each time among all that was imported
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.disable(logging.NOTSET)
    if log:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        # The ones that were there may be a terminal's or a test's.
        sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
        names = [None, *logging.root.manager.loggerDict]
        for handler in [one for name in names for one in logging.getLogger(name).handlers]:
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)


def save_in_this_process() -> None:
    """Let this process save small datasets by itself, and the same files.

    axolotl always names a number of processes (`save_preprocessed_dataset` of
    utils/data/shared.py), and `Dataset.save_to_disk` spawns them (`mp.get_context("spawn")` in
    arrow_dataset.py), each of which imports everything anew: half the time of a short run.
    """
    from datasets import Dataset

    save = Dataset.save_to_disk

    @functools.wraps(save)
    def saved(*arguments: Any, num_proc: int | None = None, **options: Any) -> None:
        save(*arguments, num_proc=None if num_proc == 1 else num_proc, **options)

    Dataset.save_to_disk = saved
