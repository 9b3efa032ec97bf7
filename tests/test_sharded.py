"""Two processes under DDP, FSDP2 and ZeRO-3 give one process's loss and gradients.

On the CPU, through gloo; what is compared stands in `sharded_worker`.
"""

import json
from importlib.util import find_spec

import pytest


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3"])
def test_two_processes_equal_one(kind, tmp_path, forks):
    if kind == "zero3" and find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install 'deepspeed>=0.18.6,<0.20'")
    try:
        forks(2, tmp_path, "sharded_worker", "main", kind, str(tmp_path))
    finally:
        wrong = [
            f"{case}, process {path.stem}: {fault}"
            for path in sorted(tmp_path.glob("?.json"))
            for case, fault in json.loads(path.read_text(encoding="utf-8")).items()
            if fault
        ]
        assert not wrong, f"{kind}: " + "\n".join(wrong)
