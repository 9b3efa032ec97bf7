"""What an optimizer step of each objective costs, relative to SimPO's, through axolotl's trainer.

    python benchmarks/objectives.py --model FOLDER [--objectives simpo dpo raco ...] [--steps 4]
        [--repeats 3] [--threads 2] [--output FOLDER]

The rows are the quickstart's prompts with two responses each and three dimensions, so that each
objective has one example per prompt whatever it makes of them; a step is four prompts, one per
micro batch, with LoRA of rank 16 on all linear layers. An objective is chosen by its name alone, so
its prompts are its defaults: AMoPO reads each response under four prompts, CoS-DPO under as many as
it draws, the others under one. A reference is the model with its adapter off, one more forward
pass. `mrpo` is left out: its second reference is read from a file.

The objectives run in another order every round, in one process; a run's first step warms up and is
not counted. `seconds` is the median of all other steps, `to simpo` and `to dpo` are its ratios.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.train import setup_model_and_trainer
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from axolotl_amopo.objectives import OBJECTIVES

ROOT = Path(__file__).parents[1]
DATA = ROOT / "example_configs" / "quickstart" / "train.jsonl"
OUTPUT = ROOT / "build" / "benchmarks"  # git ignores build/
DIMENSIONS = ["helpfulness", "honesty", "safety"]
PROMPTS = 4  # of a step
CONFIG: dict[str, Any] = {
    "rl": "amopo",
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "sequence_len": 1024,
    "adapter": "lora",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_linear": True,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": PROMPTS,
    "num_epochs": 1,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "learning_rate": 1e-4,
    "save_strategy": "no",
    "logging_steps": 1000,
    "bf16": "auto",
    "seed": 7,
    "val_set_size": 0,
}


class Clock(TrainerCallback):
    """Times the steps of a run."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def write_rows(path: Path, count: int) -> None:
    """Write prompts of the quickstart with two of their responses."""
    lines = DATA.read_text(encoding="utf-8").splitlines()
    with path.open("w", encoding="utf-8") as file:
        for line in lines[:count]:
            row = json.loads(line)
            row["responses"] = row["responses"][:2]
            file.write(json.dumps(row) + "\n")


def step_seconds(folder: Path, model: str, objective: str, steps: int) -> list[float]:
    """Return the seconds of a run's optimizer steps, its first left out."""
    rows = folder / "rows.jsonl"
    values = CONFIG | {
        "base_model": model,
        "amopo": {"objective": objective, "dimensions": DIMENSIONS},
        "datasets": [{"path": str(rows), "type": "amopo.rated", "scale": [1, 5]}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "max_steps": steps + 1,
    }
    path = folder / f"{objective}.yml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    cfg = load_cfg(str(path))
    trainer, *_ = setup_model_and_trainer(cfg, load_datasets(cfg=cfg))
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds[1:]


def table(seconds: dict[str, list[float]]) -> Table:
    made = Table("objective", box=box.MARKDOWN)
    for heading in ("seconds", "to simpo", "to dpo"):
        made.add_column(heading, justify="right")
    medians = {name: median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        ratios = [medians.get(other) for other in ("simpo", "dpo")]
        shown = ["-" if ratio is None else f"{value / ratio:.2f}" for ratio in ratios]
        made.add_row(f"`{name}`", f"{value:.2f}", *shown)
    return made


def main() -> None:
    known = [name for name in OBJECTIVES if name != "mrpo"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder")
    add("--objectives", nargs="+", choices=known, default=known, metavar="NAME")
    add("--steps", type=int, default=4)
    add("--repeats", type=int, default=3)
    add("--threads", type=int, default=os.cpu_count())
    add("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, list[float]] = {name: [] for name in args.objectives}
    order, rng = [*args.objectives], random.Random(0)
    with tempfile.TemporaryDirectory(prefix="objectives", dir=args.output) as folder:
        write_rows(Path(folder) / "rows.jsonl", PROMPTS * (args.steps + 1))
        for _ in range(args.repeats):
            rng.shuffle(order)
            for name in order:
                seconds[name] += step_seconds(Path(folder), args.model, name, args.steps)
    facts = {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "command": " ".join(["python", *sys.argv]),
        "cpu": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": args.threads,
        "torch": torch.__version__,
    }
    report = json.dumps({"header": facts, "seconds": seconds}, indent=1)
    (args.output / "objectives.json").write_text(report + "\n", encoding="utf-8")
    console = Console(width=100)
    for name, value in facts.items():
        console.print(f"- {name}: {value}", highlight=False, soft_wrap=True)
    console.print(table(seconds), highlight=False)


if __name__ == "__main__":
    main()
