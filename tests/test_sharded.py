"""Two processes under DDP, FSDP2 and ZeRO-3 give one process's loss and gradients.

On the CPU, through gloo; what is compared stands in `sharded_worker`.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "sharded_worker.py"


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3"])
def test_two_processes_equal_one(kind, tmp_path):
    if kind == "zero3" and find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install 'deepspeed>=0.18.6,<0.20'")
    logs = [tmp_path / f"{rank}.log" for rank in (0, 1)]
    workers = []
    for rank, log in enumerate(logs):
        names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        workers.append(
            subprocess.Popen(
                [sys.executable, WORKER, kind, tmp_path],
                env=os.environ | names | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )
        )
    try:
        codes = [worker.wait(timeout=300) for worker in workers]
    except subprocess.TimeoutExpired:
        codes = None
    finally:
        for worker in workers:
            worker.kill()

    wrong = [
        f"{case}, process {path.stem}: {fault}"
        for path in sorted(tmp_path.glob("?.json"))
        for case, fault in json.loads(path.read_text(encoding="utf-8")).items()
        if fault
    ]
    assert not wrong, f"{kind}: " + "\n".join(wrong)
    assert codes == [0, 0], "\n".join(log.read_text(encoding="utf-8")[-3000:] for log in logs)
