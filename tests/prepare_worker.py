"""Processes that prepare data with axolotl: killed amid it, or several at once."""

import copy
import os
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

from axolotl.common.datasets import load_datasets
from runs import load, prepare

from axolotl_amopo.data.cache import set_aside_unfinished

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def in_a_fork(call: Callable[[], object]) -> int:
    """The id of a process that makes a call and ends."""
    child = os.fork()
    if not child:
        code = 1
        try:
            call()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_amid(moment: int, folder: Path) -> None:
    """Kill this process at its n-th change of what is in a folder, a file amid its writing."""
    left = moment

    def watch(event: str, arguments: tuple) -> None:
        nonlocal left
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and str(arguments[0]).startswith(str(folder)):
            left -= 1
            if not left:
                # filelock 4 opens the folder itself, to see whether that works.
                if writes and not Path(arguments[0]).is_dir():
                    with open(arguments[0], "ab") as file:
                        file.truncate(file.tell() // 2)
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def killed_at_every_moment(config: str, over: str) -> None:
    """Prepares over and over, each time killed one change of the disk later; the last time not.

    After each, an undisturbed process must find or make the same rows.

    Args:
        over: "older" where a whole preparation is there already, which `axolotl preprocess`
            writes over; else there is nothing.
    """
    cfg = load(Path(config))
    folder = Path(cfg.dataset_prepared_path)

    def prepared(over: bool) -> list:
        # The config is loaded once, and the plugin does this whenever it is.
        set_aside_unfinished(str(folder))
        own = copy.deepcopy(cfg)
        own.is_preprocess = over
        return load_datasets(cfg=own).train_dataset.to_list()

    expected = prepared(False)
    for moment in count(1):
        if over != "older":
            shutil.rmtree(folder)

        def disturbed(moment: int = moment) -> None:
            die_amid(moment, folder)
            prepared(over == "older")

        def undisturbed() -> None:
            assert prepared(False) == expected

        status = status_of(in_a_fork(disturbed))
        if status not in (0, -signal.SIGKILL):
            raise AssertionError(f"moment {moment} ended with {status}")
        if status_of(in_a_fork(undisturbed)):
            raise AssertionError(f"after moment {moment} the rows are others")
        if status == 0:
            print(f"{moment - 1} moments")
            return


def prepare_at_once(*configs: str) -> None:
    """Each config in a process of its own, all at the same time."""
    children = [in_a_fork(lambda path=path: prepare(Path(path))) for path in configs]
    codes = [status_of(child) for child in children]
    if any(codes):
        raise AssertionError(f"the processes ended with {codes}")
