"""`python ray_on_cpu.py config.yml`, with `use_ray: true`: axolotl's Ray launcher without a GPU.

axolotl asks Ray for GPUs, and Ray then takes NCCL. On the workers the same is in the way as in
launch_on_cpu.py.
"""

import sys


def on_worker(arguments):
    """Sent to every worker in place of axolotl's function, which it calls."""
    import torch
    from axolotl.cli.train import ray_train_func
    from axolotl.utils import config

    def no_gpu(*_):
        raise AssertionError("no GPU here")

    def normalize_config(cfg):
        normalize(cfg)
        cfg.device_map = None

    torch.cuda.can_device_access_peer = no_gpu
    normalize, config.normalize_config = config.normalize_config, normalize_config
    ray_train_func(arguments)


if __name__ == "__main__":
    import ray.train
    from axolotl.cli import train

    scaling = ray.train.ScalingConfig
    ray.train.ScalingConfig = lambda **options: scaling(**options | {"use_gpu": False})
    train.ray_train_func = on_worker
    ray.init(num_cpus=4, include_dashboard=False)
    train.do_cli(config=sys.argv[1])
