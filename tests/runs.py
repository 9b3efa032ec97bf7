"""Running axolotl from tests: in this process where that proves the same, else as a command."""

import functools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "example_configs" / "quickstart"  # our own small dataset
LAUNCHER = Path(__file__).parent / "launch_on_cpu.py"


@functools.cache
def save_in_this_process() -> None:
    """Let prepared rows be saved without a process that imports everything anew for each few rows.

    `datasets` spawns one wherever it is told a number of processes, and axolotl always tells one.
    """
    from datasets import Dataset

    save = Dataset.save_to_disk

    @functools.wraps(save)
    def saved(*args: Any, num_proc: int | None = None, **options: Any) -> None:
        save(*args, **options)

    Dataset.save_to_disk = saved


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def steering(**changes: Any) -> Any:
    """Return the steering of a model of three dimensions; `changes` replace its fields."""
    from axolotl_amopo.config.instructions import DEFAULT_INSTRUCTION, DEFAULT_OVERALL_INSTRUCTION
    from axolotl_amopo.steering.steering import SteeredDimension, Steering

    values = {
        "prompts": ["overall", "helpfulness", "is_safe", "toxicity"],
        "dimensions": [
            SteeredDimension(name="helpfulness", description="it's {{ odd }} 😀", scale=(1, 5)),
            SteeredDimension(name="is_safe", scale=(0, 1)),
            SteeredDimension(name="toxicity", scale=(-2, 2), direction="lower"),
        ],
        "template": DEFAULT_INSTRUCTION,
        "overall_template": DEFAULT_OVERALL_INSTRUCTION,
    }
    return Steering(**values | changes)


def config(folder: Path, model: Path, data: Path | str, **changes: Any) -> dict[str, Any]:
    """A small config that trains in seconds; `changes` replace or (None) remove keys."""
    values = {
        "base_model": str(model),
        "rl": "amopo",
        "amopo": {"dimensions": ["helpfulness", "honesty"]},
        "datasets": [{"path": str(data), "type": "amopo.rated", "scale": [1, 5]}],
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "output_dir": str(folder / "out"),
        "sequence_len": 512,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 7,
        "bf16": False,
        "val_set_size": 0,
    } | changes
    return {key: value for key, value in values.items() if value is not None}


LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}


def write_config(folder: Path, values: dict[str, Any], name: str = "config.yml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def load(path: Path, **overrides: Any):
    """axolotl's own loading and validation of a config file."""
    from axolotl.cli.config import load_cfg

    save_in_this_process()
    return load_cfg(str(path), **overrides)


def prepare(path: Path, **overrides: Any):
    """What `axolotl train` does before the model is loaded: config, then datasets."""
    from axolotl.common.datasets import load_datasets

    cfg = load(path, **overrides)
    return cfg, load_datasets(cfg=cfg)


def train(path: Path, **overrides: Any):
    """`axolotl train` in this process; returns the trainer."""
    from axolotl.train import train as axolotl_train

    cfg, datasets = prepare(path, **overrides)
    return axolotl_train(cfg=cfg, dataset_meta=datasets)[2]


def command(*arguments: str, cwd: Path, check: bool = True, **environment: str):
    """A whole command in the environment of these tests."""
    bin_folder = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"} | environment
    done = subprocess.run(
        arguments, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    if check and done.returncode:
        raise AssertionError(f"{arguments} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done


def script(path: str, *arguments: str) -> None:
    """Run a script in this process as a command would; for `fork_server`."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as ended:  # of a console script, which ends the process
        if ended.code:
            raise


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
