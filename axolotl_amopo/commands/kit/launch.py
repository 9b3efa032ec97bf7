"""Run commands in processes of their own, and one process at a time in a folder."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO

from filelock import FileLock, Timeout

from axolotl_amopo.errors import AMoPOError

DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
LAST_LINES = 5
LOCK = "lock"  # the file in a folder that one process keeps


def run_command(
    arguments: Sequence[str],
    *,
    out: IO | None = None,
    err: IO | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Run a command of this environment, and return its exit code.

    It has no stdin, and ends with this process.

    Args:
        arguments: `axolotl` or `axolotl-amopo`, and what follows.
        out, err: where it prints; None: where this process prints.
        environment: is added to this process's.
    """
    folder = Path(sys.executable).parent
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        arguments,
        env={**os.environ, "PATH": path, **environment},
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        preexec_fn=end_with_parent,
        check=False,
    )
    return done.returncode


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, where the kernel can (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)


def last_lines(log: Path) -> str:
    """Return the last lines that a run printed."""
    if not log.is_file():
        return "it printed nothing"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([line for line in lines if line.strip()][-LAST_LINES:])


@contextlib.contextmanager
def own_folder(folder: Path, state: str, *, force: bool = False) -> Iterator[None]:
    """Keep a folder, which is made where there is none, for this process alone.

    Args:
        state: the name of the file by which a folder is the command's own.
        force: take one with other things in it, too.

    Raises:
        AMoPOError: where it holds other things, which are left alone, another process is at work
            there, or it can't be made or written to.
    """
    if folder.is_dir() and not (folder / state).exists() and not force:
        ours = (LOCK, f"{state}.unfinished")
        if others := sorted(one.name for one in folder.iterdir() if one.name not in ours):
            raise AMoPOError(f"{folder}: is there and holds {others[0]}; name another output.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / LOCK).acquire(blocking=False)
    except Timeout:
        raise AMoPOError(
            f"{folder}: another process is at work there; wait for it, or end it."
        ) from None
    except OSError as error:
        raise AMoPOError(f"{folder}: can't be made, or written to ({error.strerror}).") from None
    with held:
        yield
