"""Two processes under DDP, FSDP2 and ZeRO-3 give one process's loss and gradients.

On the CPU, through gloo; what is compared stands in `sharded_worker`.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest


def found(folder: Path) -> dict[str, str]:
    """What the processes found wrong, by case and process."""
    return {
        f"{case}, process {path.stem}": fault
        for path in sorted(folder.glob("?.json"))
        for case, fault in json.loads(path.read_text(encoding="utf-8")).items()
        if fault
    }


def needs_deepspeed(kind: str) -> None:
    if kind == "zero3" and find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install 'deepspeed>=0.18.6,<0.20'")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3"])
def test_two_processes_equal_one(kind, tmp_path, forks):
    needs_deepspeed(kind)
    try:
        forks(2, tmp_path, "sharded_worker", "main", kind, str(tmp_path))
    finally:
        wrong = found(tmp_path)
        assert not wrong, f"{kind}: " + "\n".join(map(": ".join, wrong.items()))


@pytest.mark.parametrize("fault", ["positions", "loss"])
@pytest.mark.parametrize("kind", ["ddp", "zero3"])
def test_a_planted_fault_is_found(kind, fault, tmp_path, forks):
    """A response of one process one position off, or the loss of one process a hundredth off."""
    needs_deepspeed(kind)
    forks(2, tmp_path, "sharded_worker", "main", kind, str(tmp_path), fault)
    wrong = found(tmp_path)
    assert len(wrong) == 2  # its one case, on both processes
    assert all(f.count("loss off") == f.count("gradients off") == 3 for f in wrong.values()), wrong
