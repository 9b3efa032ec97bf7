"""Measure what commands cost beyond the imports that they can't do without, in the same run.

    python benchmarks/tools.py --model FOLDER [--run FOLDER] [--only "plan 32B" ...] [--rounds 3]
        [--output FOLDER]

Every round starts each command once, in another order, as a process of its own. Beside the wall
clock, which others on the machine lengthen, stand the seconds that a command and its children kept
a core busy (user and system). A command's bare start is what it is measured against:

    nothing     `python -c pass`
    --help      `axolotl --help`, axolotl's own start
    config      `import axolotl.cli.config`, what every command of axolotl's imports

`inspect` prepares 500 prompts made of the quickstart's, with two responses each. `--model` is the
folder of a model, whose tokenizer it takes; `--run` the output folder of a training run, without
which `report` is left out. Medians of the rounds.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "build" / "benchmarks"  # git ignores build/
EXAMPLES = ROOT / "example_configs"
ROWS = 500
HELPED = ("compare", "generate", "inspect", "plan", "report", "score", "train")


class Tool(NamedTuple):
    """Name a command, its arguments, and the bare start that it is measured against."""

    arguments: list[str]
    bare: str = ""
    most: float | None = None  # seconds beyond the bare start that it may take
    exits: int = 0


class Spent(NamedTuple):
    """Hold seconds of one process and its children."""

    wall: float
    cpu: float


def write_inputs(folder: Path, model: str) -> None:
    """Write rows, a config of them, and one whose block has a misspelt key."""
    lines = (EXAMPLES / "quickstart" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(ROWS):
            row = json.loads(lines[number % len(lines)])
            row = {"prompt": f"{number}: {row['prompt']}", "responses": row["responses"][:2]}
            file.write(json.dumps(row) + "\n")
    values = yaml.safe_load((EXAMPLES / "quickstart.yml").read_text(encoding="utf-8"))
    del values["test_datasets"]
    values |= {
        "base_model": model,
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "amopo.rated", "scale": [1, 5]}],
        "val_set_size": 0,
        "eval_strategy": "no",
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
    }
    (folder / "rows.yml").write_text(yaml.safe_dump(values), encoding="utf-8")
    values["amopo"]["dimensionz"] = values["amopo"].pop("dimensions")
    (folder / "typo.yml").write_text(yaml.safe_dump(values), encoding="utf-8")


def tools(folder: Path, run: Path | None) -> dict[str, Tool]:
    """Return what is measured, by name; the bare starts first."""
    ours = ["axolotl-amopo"]
    axolotl = ["axolotl", "amopo"]
    plan = ["plan", str(EXAMPLES / "qwen2.5-32b-8x80gb-fsdp2.yml"), "--gpu", "h100-80gb"]
    found = {
        "nothing": Tool(["python", "-c", "pass"]),
        "--help": Tool(["axolotl", "--help"]),
        "config": Tool(["python", "-c", "import axolotl.cli.config"]),
        "axolotl amopo --help": Tool([*axolotl, "--help"], "--help", 2),
        **{
            f"axolotl amopo {name} --help": Tool([*axolotl, name, "--help"], "--help", 2)
            for name in HELPED
        },
        "typo": Tool([*axolotl, "train", str(folder / "typo.yml")], "--help", 2, exits=1),
        "axolotl-amopo --help": Tool([*ours, "--help"], "nothing"),
        "configs": Tool([*ours, "configs"], "nothing"),
        "inspect 500": Tool([*axolotl, "inspect", str(folder / "rows.yml")], "config", 10),
        "plan 32B": Tool([*axolotl, *plan, "--gpus", "8"], "config", 6),
    }
    if run:
        written = ["report", str(run), "--output", str(folder / "report")]
        found["report"] = Tool([*axolotl, *written], "--help", 4)
        found["axolotl-amopo report"] = Tool([*ours, *written], "nothing")
    return found


def run_once(tool: Tool) -> Spent:
    """Run a command and return what it took.

    Raises:
        AssertionError: where it ends otherwise than it must.
    """
    commands = Path(sys.executable).parent
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    before, began = os.times(), time.perf_counter()
    done = subprocess.run(
        tool.arguments, cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - began, os.times()
    assert done.returncode == tool.exits, f"{tool.arguments}: {done.stderr[-2000:]}"
    cpu = after.children_user + after.children_system
    return Spent(wall, cpu - before.children_user - before.children_system)


def rows_of(
    measured: Mapping[str, Tool], spent: Mapping[str, list[Spent]]
) -> dict[str, dict[str, float | None]]:
    """Return medians in seconds, and how many are beyond the bare start's."""
    middle = {name: Spent(*map(median, zip(*all_, strict=True))) for name, all_ in spent.items()}
    rows = {}
    for name, (wall, cpu) in middle.items():
        bare = middle.get(measured[name].bare)
        beyond = {
            "wall_beyond": wall - bare.wall if bare else None,
            "cpu_beyond": cpu - bare.cpu if bare else None,
        }
        rows[name] = {"wall": wall, "cpu": cpu, **beyond, "most": measured[name].most}
    return rows


def table(measured: Mapping[str, Tool], rows: dict[str, dict[str, float | None]]) -> Table:
    made = Table("command", "beyond", box=box.MARKDOWN)
    columns = {
        "wall": "wall, s",
        "cpu": "CPU, s",
        "wall_beyond": "wall beyond",
        "cpu_beyond": "CPU beyond",
        "most": "allowed",
    }
    for heading in columns.values():
        made.add_column(heading, justify="right")
    for name, row in rows.items():
        cells = (row[key] for key in columns)
        shown = ("-" if value is None else f"{value:.1f}" for value in cells)
        made.add_row(name, measured[name].bare or "-", *shown)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder")
    add("--run", type=Path, help="a training run's output folder")
    add("--only", nargs="+", metavar="NAME", help="these, and the bare starts that they need")
    add("--rounds", type=int, default=3)
    add("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="tools", dir=args.output) as made:
        folder = Path(made).resolve()
        write_inputs(folder, str(Path(args.model).resolve()))
        measured = tools(folder, args.run and args.run.resolve())
        if args.only:
            wanted = {*args.only, *(measured[name].bare for name in args.only)}
            measured = {name: tool for name, tool in measured.items() if name in wanted}
        spent: dict[str, list[Spent]] = {name: [] for name in measured}
        order = list(measured)
        for _ in range(args.rounds):
            rng.shuffle(order)
            for name in order:
                spent[name].append(run_once(measured[name]))
    rows = rows_of(measured, spent)
    facts = {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "command": " ".join(["python", *sys.argv]),
        "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load": f"{os.getloadavg()[1]:.1f} processes in the last 5 minutes",
    }
    report = json.dumps({"header": facts, "rows": rows, "spent": spent}, indent=1)
    (args.output / "tools.json").write_text(report + "\n", encoding="utf-8")
    console = Console(width=120)
    for name, value in facts.items():
        console.print(f"- {name}: {value}", highlight=False, soft_wrap=True)
    console.print(table(measured, rows), highlight=False)


if __name__ == "__main__":
    main()
