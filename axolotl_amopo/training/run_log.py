"""`_amopo_log.jsonl` in the output folder: what was trained, and everything that was logged.

`axolotl amopo report` reads it, also while the run goes on. It only grows, one JSON object a line:

    {"begin": 0, "time": ..., "run": {...}}                     at each start of training
    {"step": 0, "time": ..., "run": {"sharing": {...}}}         once the layout is chosen
    {"step": 10, "epoch": 0.2, "time": ..., "loss": ..., ...}   whenever something is logged

A run that begins at a step replaces what stands before it about later steps.
"""

import json
import platform
import time
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

import axolotl_amopo
from axolotl_amopo.config.block import INTERNAL, AMoPOConfig
from axolotl_amopo.config.through_axolotl import stamped
from axolotl_amopo.objectives.describe import describe
from axolotl_amopo.objectives.settings import admitted
from axolotl_amopo.training.runs import LOG as FILE
from axolotl_amopo.training.sampler import pairs_in

VERSIONS_OF = ("axolotl", "torch", "transformers", "peft", "trl")


class RunLog(TrainerCallback):
    """Writes the log, on the main process alone.

    Args:
        run: what was trained, see `describe_run`.
        trainer: an `AMoPOTrainer`, asked for the layout that it chooses at its first batch.
    """

    def __init__(self, run: dict[str, Any], trainer: Any):
        self.run = run
        self.trainer = trainer
        self.path: Path | None = None
        self.choice_is_logged = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.path = Path(args.output_dir) / FILE
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.choice_is_logged = False
            run = self.run | {"max_steps": state.max_steps}
            append(self.path, {"begin": state.global_step, "time": time.time(), "run": run})

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.path:
            return
        choice = self.trainer.choice
        if choice and not self.choice_is_logged:
            line = {"step": state.global_step, "time": time.time()}
            append(self.path, line | {"run": {"sharing": choice._asdict()}})
            self.choice_is_logged = True
        if state.log_history:
            # Not `logs`: transformers' PrinterCallback, for one, takes entries out of it.
            entry = {"step": state.global_step, "epoch": state.epoch, "time": time.time()}
            append(self.path, entry | state.log_history[-1])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.path = None


def append(path: Path, entry: dict[str, Any]) -> None:
    """Add a line to a file of JSON objects."""
    line = json.dumps(entry, default=float)
    # A killed run may have left half a line, which the next must not hang on to.
    with path.open("a+b") as file:
        if file.tell() and not _ends_with_newline(file):
            line = "\n" + line
        file.write(f"{line}\n".encode())


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, 2)
    return file.read(1) == b"\n"


def describe_run(
    cfg: Any, config: AMoPOConfig, train: Dataset, test: Dataset | None
) -> dict[str, Any]:
    """What is trained on what, as plain values.

    Args:
        cfg: axolotl's validated config.
        config: its `amopo:` block.
        train, test: prepared rows; each carries the facts that `stamp` put there.
    """
    path = Path(cfg.axolotl_config_path or "")
    facts = [fact for dataset in (train, test) if dataset is not None for fact in stamped(dataset)]
    unique = {json.dumps(fact, sort_keys=True): fact for fact in facts}
    return {
        "model": cfg.base_model,
        "adapter": cfg.adapter,
        "prompts": config.criteria,
        "amopo": config.model_dump(mode="json", exclude=INTERNAL),
        "objective": describe_objective(config),
        "rl_beta": cfg.rl_beta,
        "train_pairs": pairs_in(train),
        "eval_pairs": pairs_in(test) if test is not None else 0,
        "train_examples": len(train),
        "eval_examples": len(test) if test is not None else 0,
        "data": list(unique.values()),
        "versions": versions(),
        "config": path.read_text(encoding="utf-8") if path.is_file() else None,
    }


def versions() -> dict[str, str]:
    """Return the versions of the package, of Python, and of what a run's numbers hang on."""
    own = {"axolotl-amopo": axolotl_amopo.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in VERSIONS_OF}


def describe_objective(config: AMoPOConfig) -> dict[str, Any]:
    """Return what a reader of a run's numbers must know of its objective, without torch to ask it.

    That is its method's name, what `Description` has, and the settings that it admits, each by the
    key that switches it on.
    """
    objective = config.make_objective()
    settings = [fields(kind)[0].name for kind in admitted(config.objective)]
    return {"method": objective.paper.name, **describe(objective)._asdict(), "settings": settings}
