"""`torchrun launch_on_cpu.py config.yml`: axolotl's own train entry under DDP with gloo.

On a machine with a CUDA build of torch and no GPU, axolotl's peer-to-peer check dies on the
missing driver unless that question raises AssertionError, as it does in torch's CPU builds; and
axolotl's device map has to be told that there is no device to map to.
"""

import sys

import torch


def no_gpu(*_):
    raise AssertionError("no GPU here")


torch.cuda.can_device_access_peer = no_gpu

if __name__ == "__main__":
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train

    cfg = load_cfg(sys.argv[1])
    cfg.device_map = None
    do_train(cfg, TrainerCliArgs())
