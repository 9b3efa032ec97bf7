"""Processes that train with axolotl and are killed while they write a checkpoint."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parallel_worker
import safetensors.torch
import torch
import transformers.modeling_utils
from peft import peft_model

from axolotl_amopo.training import checkpoints
from axolotl_amopo.training.checkpoints import Checkpoints
from axolotl_amopo.training.trainer import AMoPOTrainer

STEP = 4  # whose checkpoint is not completed
# What changes a disk, as Python's audit hooks name it; torch and safetensors write past them.
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Deadline:
    """Kills this process before its n-th change of the disk, amid it or after it.

    Or amid a file that is named, when the main process has written its last one.
    """

    def __init__(self, moment: str):
        self.left, self.name = (int(moment), "") if moment.isdigit() else (0, moment)
        sys.addaudithook(self.watch)
        torch.save = self.halved(torch.save)
        save = self.halved(safetensors.torch.save_file)
        for module in (safetensors.torch, transformers.modeling_utils, peft_model):
            for name in ("save_file", "safe_save_file"):
                if name in vars(module):
                    setattr(module, name, save)

    def pass_one(self) -> bool:
        """Whether this is the moment."""
        self.left -= 1
        return not self.left

    def watch(self, event: str, arguments: tuple) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and self.pass_one():
            die()

    def halved(self, write: Callable[..., None]) -> Callable[..., None]:
        def written(content: Any, path: Any, *rest: Any, **options: Any) -> None:
            before, halfway, after = self.pass_one(), self.pass_one(), self.pass_one()
            if before:
                die()
            write(content, path, *rest, **options)
            named = Path(path).name == self.name
            if halfway or named:
                os.truncate(path, Path(path).stat().st_size // 2)
            while named and not Path(path).with_name("trainer_state.json").exists():
                time.sleep(0.01)
            if halfway or named or after:
                die()

        return written


def never_seal(write: Callable[..., None]) -> Callable[..., None]:
    def written(folder: Path, content: dict[str, Any]) -> None:
        if content["files"]:
            die()
        write(folder, content)

    return written


def train_until_killed(kind: str, config: str, folder: str, rank: str, moment: str) -> None:
    """One process is killed while the checkpoint of STEP is written.

    Args:
        moment: of `Deadline`, or "seal", before the manifest.
    """
    save = AMoPOTrainer._save_checkpoint

    def watched(trainer: AMoPOTrainer, *arguments: Any) -> None:
        if trainer.state.global_step == STEP and rank == os.environ.get("RANK", "0"):
            if moment == "seal":
                checkpoints._write_manifest = never_seal(checkpoints._write_manifest)
            else:
                Deadline(moment)
        save(trainer, *arguments)

    AMoPOTrainer._save_checkpoint = watched
    parallel_worker.train(kind, config, folder)


def train_apart(kind: str, config: str, folder: str, rank: str, moment: str) -> None:
    """As above, each process on a machine of its own, whose disk is FOLDER/RANK."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    disk = Path(folder, os.environ["RANK"])
    disk.mkdir(exist_ok=True)
    os.chdir(disk)
    train_until_killed(kind, config, folder, rank, moment)


def killed_at_every_moment(config: str, folder: str) -> None:
    """Saves the checkpoint of STEP over and over, each time killed one change of the disk later.

    Each time in a process of its own and on a copy of the output folder, FOLDER/MOMENT; the last
    one is not killed.
    """
    save = AMoPOTrainer._save_checkpoint

    def killed(trainer: AMoPOTrainer, *arguments: Any) -> None:
        if trainer.state.global_step != STEP:
            save(trainer, *arguments)
            return
        moment, status = 0, None
        while status != 0:
            moment += 1
            copy = Path(folder, str(moment))
            shutil.copytree(trainer.args.output_dir, copy)
            child = os.fork()
            if not child:
                trainer.args.output_dir = str(copy)
                trainer._checkpoints = Checkpoints(str(copy), trainer._checkpoints.run)
                Deadline(str(moment))
                save(trainer, *arguments)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status not in (0, -signal.SIGKILL):
                raise AssertionError(f"moment {moment} ended with {status}")
        os._exit(0)

    AMoPOTrainer._save_checkpoint = killed
    parallel_worker.train("one", config, folder)
