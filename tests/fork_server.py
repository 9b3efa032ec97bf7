"""Groups of processes for tests, forked from one process that has imported all that takes long.

Reads jobs from stdin, a line of JSON each, and answers each with a line: what went wrong, or "".
A job is {"call": [module, function, arguments ...], "world": number of processes, "folder"}. Its
processes find the names that torchrun sets in their environment, and what they print goes to
FOLDER/RANK.log. As each is forked for one job, a job leaves nothing for the next: axolotl,
accelerate and DeepSpeed keep their state in modules and in the environment.
"""

import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

IMPORTED = "imported.txt"
PATIENCE = 60  # seconds that a process waits for others, who may have gone another way


def become(rank: int, port: int, job: dict) -> None:
    """Run one process of a job; does not return."""
    code, known = 1, set(sys.modules)
    try:
        log = os.open(Path(job["folder"]) / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if (world := job["world"]) > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            names |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in names.items()}
        module, function, *arguments = job["call"]
        getattr(sys.modules[module], function)(*arguments)
        code = 0
        if rank == 0:
            imported = [name for name in sys.modules if name not in known]
            (Path(job["folder"]) / IMPORTED).write_text("\n".join(imported), encoding="utf-8")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: dict) -> str:
    """Fork a job's processes, wait for them, and say what went wrong."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = {}
    for rank in range(job["world"]):
        child = os.fork()
        if not child:
            become(rank, port, job)
        running[child] = rank
    deadline = time.monotonic() + 3 * PATIENCE
    wrong = ""
    while running and not wrong:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            rank = running.pop(child)
            if status:
                wrong = f"process {rank} ended with {os.waitstatus_to_exitcode(status)}"
        elif time.monotonic() > deadline:
            wrong = f"processes {sorted(running.values())} did not end"
        else:
            time.sleep(0.01)
    for child in running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return wrong


def prefetch(names: Path) -> None:
    """Import what a job had to import by itself, so that the next one need not."""
    if names.exists():
        for name in names.read_text(encoding="utf-8").split():
            with suppress(Exception):  # some are no module of their own, or of a test's folder
                importlib.import_module(name)


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["AXOLOTL_NCCL_TIMEOUT"] = str(PATIENCE)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        gc.collect()
        gc.freeze()  # so that the processes share what was imported
        job = json.loads(line)
        print(json.dumps(run(job)), file=answers, flush=True)
        prefetch(Path(job["folder"]) / IMPORTED)
