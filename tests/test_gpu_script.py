"""`benchmarks/gpu.py`, as far as a machine without a GPU goes."""

import json
import math
import subprocess
import sys

import runs


def test_a_dry_run_plans_every_case_and_trains_one(tmp_path):
    arguments = ["--dry-run", "--cases", "lora", "fsdp2", "--steps", "2", "--sequence-len", "128"]
    script = runs.ROOT / "benchmarks" / "gpu.py"
    runs.command(sys.executable, str(script), *arguments, "--output", str(tmp_path), cwd=tmp_path)
    report = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    trained, sharded = report["cases"]["lora"], report["cases"]["fsdp2"]
    assert trained["good"] is True
    assert len(trained["losses"]) == 2 and all(map(math.isfinite, trained["losses"]))
    assert sharded["skipped"] == "needs a GPU" and "losses" not in sharded
    assert sharded["plan"]["sharding"]["name"] == "fsdp2"
    # The pairs are those that a plan's memory is of: none was too long, or much shorter.
    log = (tmp_path / "gpu-lora.log").read_text(encoding="utf-8")
    assert "2 pairs made, 2 kept; nothing left out" in log
    table = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "| fsdp2 |" in table and "none: a dry run" in table
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    again = subprocess.run(
        [sys.executable, script, *arguments, "--output", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 2 and "--force" in again.stderr
