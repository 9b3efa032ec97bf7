"""One of several processes that train a config with axolotl, on the CPU through gloo."""

import json
import os
from pathlib import Path

import axolotl.train
import runs
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, is_deepspeed_available
from axolotl.integrations.base import BasePlugin
from launch_on_cpu import no_gpu
from torch.distributed import device_mesh
from transformers import TrainerCallback

from axolotl_amopo.config import take_over
from axolotl_amopo.training import trainer

if is_deepspeed_available():
    import deepspeed

    # Communication through shared memory, which takes minutes to compile; without it, gloo.
    deepspeed.ops.__compatible_ops__ = {}


def train(kind: str, config: str, folder: str, fault: str = "") -> None:
    """axolotl's own `train`, with a planted fault if one is named; leaves FOLDER/RANK.json:

    log: the trainer's log history; collectives: in how many collective operations this process had
    taken part after each pass and at the end of each step.
    """
    rank = os.environ.get("RANK", "0")
    if "RANK" in os.environ:
        pretend(kind)
    if fault:
        plant(fault, int(rank))
    cfg, datasets = runs.prepare(Path(config))
    cfg.device_map = None
    axolotl.train.train(cfg=cfg, dataset_meta=datasets)
    report = {"log": Recorder.log, "collectives": Recorder.collectives}
    Path(folder, f"{rank}.json").write_text(json.dumps(report), encoding="utf-8")


def pretend(kind: str) -> None:
    """What a machine without GPUs has to be told."""
    torch.cuda.can_device_access_peer = no_gpu
    take_over.check_devices = lambda _: None  # refuses FSDP2 without a GPU
    if kind == "ddp":
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return
    # accelerate shards only on kinds of devices that it has a name for; what it does then works on
    # this one too.
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    make = device_mesh.init_device_mesh
    device_mesh.init_device_mesh = lambda _, *shape, **names: make("cpu", *shape, **names)


def plant(fault: str, rank: int) -> None:
    """`padding`: rows that pad a pass count; `draws`: each process has draws of its own."""
    if fault == "draws":
        draw = trainer.Draw
        trainer.Draw = lambda seed, step: draw(seed + rank, step)
        return
    plain = trainer.AMoPOTrainer.get_batch_samples

    def counted(self, *args):
        batches, count = plain(self, *args)
        for batch in batches:
            batch["counts"].fill_(1)
        return batches, count

    trainer.AMoPOTrainer.get_batch_samples = counted


class Recorder(BasePlugin, TrainerCallback):
    """A plugin of axolotl's that writes down what `train` reports."""

    log = ()
    collectives = ()

    def add_callbacks_post_trainer(self, cfg, trainer):
        Recorder.collectives = []
        return [self]

    def on_log(self, args, state, control, **_):
        Recorder.log = state.log_history

    def on_substep_end(self, args, state, control, **_):
        if dist.is_initialized():
            groups = dist.distributed_c10d._world.pg_map
            self.collectives.append(sum(g._get_sequence_number_for_group() for g in groups))

    on_step_end = on_prediction_step = on_substep_end
