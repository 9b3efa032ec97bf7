"""Checks of what a config asks of processes, GPUs and files against what there is.

axolotl and the libraries below it find most of this too, but only once the model is loaded, which
takes minutes for a large one, and on every process at once.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from axolotl_amopo.config.block import plain
from axolotl_amopo.errors import ConfigError, did_you_mean

SHIPPED = "axolotl's own come with `axolotl fetch deepspeed_configs`"

# Optimizers of bitsandbytes, whose kernels take no sharded tensor. axolotl itself refuses the two
# others, adamw_8bit and adamw_bnb_8bit.
BITSANDBYTES = {
    "ademamix",
    "ademamix_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop_bnb",
    "rmsprop_bnb_32bit",
    "rmsprop_bnb_8bit",
}

# DeepSpeed's settings that transformers wants to be axolotl's, or "auto".
SAME = {
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
}


def check_parallel(cfg: dict) -> None:
    """Refuse what the raw config and the file that it names rule out.

    Raises:
        ConfigError: naming the key and what to write instead.
    """
    _check_deepspeed(cfg)
    _check_fsdp(cfg)
    _check_fp16(cfg)
    if (cfg.get("accelerator_config") or {}).get("even_batches") is False:
        raise ConfigError(
            "accelerator_config.even_batches: false can't work with rl: amopo: a process without "
            "rows lets the others wait; remove it: what fills an epoch up is not counted."
        )


def trains_in_fp16(cfg: dict) -> bool:
    """Return whether what a raw config trains is kept in float32 beside a model in fp16.

    axolotl keeps weights in fp16, and torch's gradient scaler can't train those.
    """
    adapter_in_float32 = cfg.get("adapter") and cfg.get("peft_autocast_adapter_dtype") is not False
    sharded = cfg.get("fsdp_config") or cfg.get("deepspeed")  # which keep copies in float32
    return bool(adapter_in_float32 or sharded)


def _check_fp16(cfg: dict) -> None:
    if cfg.get("fp16") is True and not trains_in_fp16(cfg):
        raise ConfigError(
            "fp16: true trains adapters alone, in float32; write adapter: lora (without "
            "peft_autocast_adapter_dtype: false), or fp16: false with bf16: true or in float32."
        )


def _check_deepspeed(cfg: dict) -> None:
    settings = deepspeed_settings(cfg.get("deepspeed"))
    for theirs, ours in SAME.items():
        block, _, key = theirs.rpartition(".")
        value = (settings.get(block) or {} if block else settings).get(key)
        asked = cfg.get(ours)
        if all(isinstance(number, (int, float)) for number in (value, asked)) and value != asked:
            raise ConfigError(
                f"{ours}: {asked} can't go with {theirs}: {value} in the deepspeed config; write "
                '"auto" there.'
            )
    if settings.get("zero_optimization", {}).get("stage") != 3:
        return
    if cfg.get("peft_use_dora"):
        raise ConfigError(
            "peft_use_dora: true can't work with DeepSpeed ZeRO-3: PEFT takes the norm of weights "
            "that are not there; write peft_use_rslora: true, or take ZeRO-2 or FSDP2."
        )


def deepspeed_settings(value: Any) -> dict[str, Any]:
    """Return what `deepspeed:` holds, or the file that it names; empty without it.

    Raises:
        ConfigError: for a file that isn't there or holds something else.
    """
    if not value:
        return {}
    settings, where = plain(value), "deepspeed"
    if not isinstance(value, dict):
        path = Path(str(value))
        where = f"deepspeed: {path}"
        if not path.is_file():
            looked = "" if path.is_absolute() else f" in {Path.cwd()}, where the command runs"
            raise ConfigError(f"{where}: there is no such file{looked}; {SHIPPED}.")
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{where}: is not JSON ({error}); {SHIPPED}.") from None
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ConfigError(
            f'{where}: is no DeepSpeed config, which has "zero_optimization": {{"stage": N}} with '
            f"N from 0 to 3; {SHIPPED}."
        )
    return settings


def _check_fsdp(cfg: dict) -> None:
    given = cfg.get("fsdp_config") or {}
    fsdp = {key.removeprefix("fsdp_"): value for key, value in given.items()}
    if cfg.get("fsdp_version") and not fsdp:
        raise ConfigError(
            "fsdp_version: shards nothing without an fsdp_config: block; write one, e.g. "
            "fsdp_config: {state_dict_type: FULL_STATE_DICT}."
        )
    kind = fsdp.get("state_dict_type")
    if kind == "LOCAL_STATE_DICT":
        raise ConfigError(
            "fsdp_config.state_dict_type: LOCAL_STATE_DICT does not exist in FSDP2; write "
            "FULL_STATE_DICT or SHARDED_STATE_DICT."
        )
    if kind == "SHARDED_STATE_DICT" and cfg.get("save_only_model"):
        raise ConfigError(
            "save_only_model: true can't go with fsdp_config.state_dict_type: SHARDED_STATE_DICT; "
            "write FULL_STATE_DICT, or remove save_only_model."
        )
    if fsdp and cfg.get("optimizer") in BITSANDBYTES:
        raise ConfigError(
            f"optimizer: {cfg['optimizer']} can't work with fsdp_config: bitsandbytes takes no "
            "sharded tensors; write adamw_torch_8bit."
        )
    if fsdp and cfg.get("adapter") and cfg.get("lora_modules_to_save"):
        raise ConfigError(
            "lora_modules_to_save: can't work with fsdp_config: axolotl 0.21 trains them and then "
            "fails to save them; remove it, or take DDP or DeepSpeed instead."
        )
    checkpointing = cfg.get("gradient_checkpointing") is True and not cfg.get(
        "activation_offloading"
    )
    if fsdp.get("activation_checkpointing") and checkpointing:
        raise ConfigError(
            "gradient_checkpointing: true and fsdp_config.activation_checkpointing: true would "
            "checkpoint twice; keep one of them."
        )


def check_devices(cfg: dict) -> None:
    """Refuse a raw config that asks for more devices than this machine has.

    Raises:
        ConfigError: saying how to start it instead.
    """
    # These commands use none, and a Ray driver doesn't know its workers'.
    if any(cfg.get(key) for key in ("is_preprocess", "merge_lora", "use_ray")):
        return
    here, environment = torch.accelerator.device_count(), os.environ
    available = torch.accelerator.is_available()
    if available and "LOCAL_RANK" in environment and here <= int(environment["LOCAL_RANK"]):
        raise ConfigError(
            f"{environment.get('LOCAL_WORLD_SIZE', 'too many')} processes were started on this "
            f"machine, which has {here} GPUs; start one per GPU: --launcher torchrun -- "
            f"--nproc_per_node {here}, or --num-processes {here} with accelerate."
        )
    # With one GPU axolotl makes up for a launcher; several processes do without any.
    alone = int(environment.get("WORLD_SIZE", 1)) == 1
    if cfg.get("deepspeed") and alone and here > 1 and "MASTER_ADDR" not in environment:
        raise ConfigError(
            f"deepspeed: needs a launcher on a machine with {here} GPUs; start with --launcher "
            "torchrun -- --nproc_per_node gpu, or let one be seen, with CUDA_VISIBLE_DEVICES=0."
        )
    # Without a launcher, `check_processes` has its say about FSDP2; merge-lora may go on.
    sharded = [("deepspeed", alone), ("fsdp_config", "LOCAL_RANK" in environment)]
    for key, refused in sharded:
        if cfg.get(key) and refused and not available:
            raise ConfigError(
                f"{key}: needs a GPU, and torch finds none on this machine; remove it to train on "
                "the CPU."
            )


def check_one_gpu() -> None:
    """Refuse one process that sees several GPUs.

    axolotl would spread the model's layers over them (`device_map: auto`), or transformers copy the
    model to each (`DataParallel`) and cut a batch of pairs.

    Raises:
        ConfigError: saying how to start instead.
    """
    here = torch.accelerator.device_count()
    if here > 1 and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise ConfigError(
            f"one process sees {here} GPUs, and can't train on several (device_map: auto); start "
            "one per GPU with --launcher torchrun -- --nproc_per_node gpu, with FSDP2 or DeepSpeed "
            "ZeRO-3 for a model that is too large for one, or let one be seen, with "
            "CUDA_VISIBLE_DEVICES=0."
        )


def check_processes(cfg: Any) -> None:
    """Refuse sharding that the processes of this training run can't do.

    Raises:
        ConfigError: naming the key, and what to write or how to start instead.
    """
    check_one_gpu()
    if cfg.fsdp_config and "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            "fsdp_config: needs one process per GPU, and this is a single one; start it with "
            "--launcher torchrun -- --nproc_per_node gpu, or remove fsdp_config, which saves "
            "nothing on one GPU."
        )
    world = int(os.environ.get("WORLD_SIZE", 1))
    shard, replicate = cfg.dp_shard_size or 1, cfg.dp_replicate_size or 1
    if shard > 1 and not cfg.fsdp_config:
        raise ConfigError(
            f"dp_shard_size: {shard} shards nothing without an fsdp_config: block; write one, or "
            "remove dp_shard_size."
        )
    if (cfg.expert_parallel_size or 1) > 1:
        return  # a third share of the processes, which axolotl's own check knows
    size = shard * replicate
    if size > 1 and (size != world or (cfg.fsdp_config and shard == 1)):
        raise ConfigError(
            f"dp_shard_size: {shard} times dp_replicate_size: {replicate} must make up the {world} "
            "processes of this run, with dp_shard_size above 1 under FSDP2; write other sizes, or "
            "remove both, and FSDP2 shards over all processes."
        )


def check_layers(cfg: Any) -> None:
    """Refuse a `transformer_layer_cls_to_wrap` that the model doesn't have, from its config.

    Raises:
        ConfigError: naming the layers that it has.
    """
    named = (cfg.fsdp_config or {}).get("transformer_layer_cls_to_wrap")
    if not named:
        return
    # The check before a launch needs `check_parallel` alone, and must not wait for these.
    from axolotl.loaders.utils import load_model_config
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = load_model_config(cfg)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None or config.get_text_config() is not config:
        return  # code from the hub, or a model that sees images as well
    with torch.device("meta"):
        model = model_class(config)
    classes = {type(module).__name__ for module in model.modules()}
    for name in named.split(","):
        if name not in classes:
            raise ConfigError(
                f"fsdp_config.transformer_layer_cls_to_wrap: {model_class.__name__} has no layer "
                f"'{name}'.{did_you_mean(name, classes)} Without the key, the layers that the "
                "model itself names are wrapped."
            )
