"""Many nodes: launcher arguments pass through, two nodes without a shared disk train as one, and so
do two workers of Ray."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch
from axolotl.cli import main as axolotl
from axolotl.cli.utils import train as launching
from safetensors.torch import load_file

PROCESSES = (2, 1)  # of each node
WORLD = sum(PROCESSES)
STEPS = 3
ON_RAY = Path(__file__).parent / "ray_on_cpu.py"
TORCHRUN = ["--nnodes=2", "--node_rank", "1", "--rdzv_endpoint", "head:29500"]
TORCHRUN += ["--rdzv_backend=c10d", "--rdzv_id", "7", "--nproc_per_node", "8"]
ACCELERATE = ["--debug", "--num_machines", "2", "--machine_rank", "1", "--num_processes", "16"]
ACCELERATE += ["--main_process_ip", "head", "--main_process_port", "29500"]


@pytest.mark.parametrize(
    ("launcher", "arguments", "started"),
    [
        ("torchrun", TORCHRUN, ["torchrun"]),
        ("accelerate", ACCELERATE, ["accelerate", "launch"]),
    ],
    ids=["torchrun", "accelerate"],
)
@pytest.mark.parametrize(
    "command",
    [["train"], ["amopo", "train"], ["amopo", "train", "--amopo.gamma", "1.5"]],
    ids=["axolotl", "axolotl amopo", "with an override"],
)
def test_launcher_arguments_pass_through(
    command, launcher, arguments, started, tmp_path, monkeypatch
):
    """To the letter, in order, and before the module that they launch. Our command asks accelerate
    to add no traceback of its own."""
    config = tmp_path / "config.yml"
    config.touch()
    executed = []
    monkeypatch.setattr(launching.os, "execvpe", lambda *call: executed.append(call[1]))
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the commands change it
    axolotl.cli.main(
        [*command, str(config), "--launcher", launcher, "--", *arguments], standalone_mode=False
    )
    quiet = ["--quiet"] if launcher == "accelerate" and command[0] == "amopo" else []
    expected = [*started, *quiet, *arguments, "-m", "axolotl.cli.train", str(config)]
    assert [call[: len(expected)] for call in executed] == [expected]


@pytest.fixture(scope="module")
def rows():
    """Of different lengths, one a process and step."""
    source = (runs.QUICKSTART / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in source[: WORLD * STEPS]]
    for i, row in enumerate(rows):
        row["responses"] = row["responses"][:2]
        row["responses"][0]["text"] *= 1 + i % 3
    return rows


def settings(folder: Path, model: Path, rows: list, batch: int, **changes) -> Path:
    """A config in a folder of its own; every path but the model's is relative to it."""
    folder.mkdir()
    runs.write_jsonl(folder / "data.jsonl", rows)
    changes |= {"micro_batch_size": batch, "max_steps": STEPS, "save_strategy": "steps"}
    values = runs.config(Path(), model, "data.jsonl", save_steps=STEPS, **changes)
    return runs.write_config(folder, values)


def same_training(folder: Path, model: Path, rows: list, out: Path, monkeypatch) -> None:
    """Asserts that what a run logged and saved is what one process does with the same batches."""
    state = json.loads((out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    entries = [entry for entry in state["log_history"] if "loss" in entry]
    alone = settings(folder / "alone", model, rows, batch=len(rows) // STEPS)
    monkeypatch.chdir(alone.parent)
    expected = [entry for entry in runs.train(alone).state.log_history if "loss" in entry]
    assert len(expected) == len(entries) == STEPS
    for entry, wanted in zip(entries, expected, strict=True):
        for name in ("loss", "grad_norm", *(n for n in wanted if n.startswith("amopo/"))):
            assert entry[name] == pytest.approx(wanted[name], abs=1e-4), name
    weights = load_file(out / "model.safetensors")
    for name, wanted in load_file(alone.parent / "out" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], wanted, rtol=1e-4, atol=1e-4)


def start(config: Path, node: int, port: int) -> subprocess.Popen:
    """A node of the run, on the loopback device alone."""
    environment = {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with open(config.parent / "log", "w") as log:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                f"--nnodes={len(PROCESSES)}",
                f"--nproc_per_node={PROCESSES[node]}",
                f"--node_rank={node}",
                "--rdzv_backend=c10d",
                "--rdzv_id=amopo",
                f"--rdzv_endpoint=127.0.0.1:{port}",
                "--local_addr=127.0.0.1",
                str(runs.LAUNCHER),
                config.name,
            ],
            cwd=config.parent,
            env=os.environ | environment,
            stdout=log,
            stderr=log,
        )


def test_two_nodes_without_a_shared_disk(tmp_path, tiny_model, rows, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = [tmp_path / f"node{node}" for node in range(len(PROCESSES))]
    nodes = [
        start(settings(folder, tiny_model, rows, batch=1), node, port)
        for node, folder in enumerate(folders)
    ]
    try:
        codes = [node.wait(timeout=240) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    logs = [(folder / "log").read_text(errors="replace") for folder in folders]
    assert codes == [0] * len(PROCESSES), "\n".join(log[-3000:] for log in logs)

    # One process of every node prepares the pairs, the others read what it wrote.
    assert [log.count("Loading raw datasets...") for log in logs] == [1] * len(PROCESSES)
    assert all(any((folder / "prepared").glob("*/*.arrow")) for folder in folders)

    # The model is saved once, by the first node.
    saved = [(folder / "out" / "model.safetensors").is_file() for folder in folders]
    assert saved == [True] + [False] * (len(PROCESSES) - 1)
    same_training(tmp_path, tiny_model, rows, folders[0] / "out", monkeypatch)


@pytest.mark.skipif(
    not importlib.util.find_spec("ray"), reason="needs Ray: pip install 'axolotl[ray]'"
)
def test_two_workers_of_ray(tmp_path, tiny_model, rows, monkeypatch):
    rows = rows[: 2 * STEPS]
    ray = {"use_ray": True, "ray_num_workers": 2, "resources_per_worker": {"CPU": 1}}
    config = settings(tmp_path / "ray", tiny_model, rows, batch=1, **ray)
    done = runs.command(
        sys.executable,
        str(ON_RAY),
        config.name,
        cwd=config.parent,
        ACCELERATE_USE_CPU="true",
        RAY_DEDUP_LOGS="0",
        RAY_USAGE_STATS_ENABLED="0",
    )
    log = done.stdout + done.stderr
    assert log.count("Loading raw datasets...") == 1
    same_training(tmp_path, tiny_model, rows, config.parent / "out", monkeypatch)
