"""Settings of axolotl's that need a GPU, or a newer one, for a run without."""

import torch
from axolotl.utils.logging import get_logger

from axolotl_amopo.config.devices import trains_in_fp16

LOG = get_logger(__name__)

LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
LIGER = ("rope", "rms_norm", "rms_norm_gated", "layer_norm", "glu_activation", "swiglu")


def suit_a_cpu(cfg: dict) -> None:
    """Turn off in a raw config what needs a GPU, and say so where the YAML asked for it.

    Fused LoRA kernels are switched on by themselves and fail; one flag that is set, whatever its
    value, keeps them off. `bf16: auto` becomes float16, which is a hundred times slower than
    float32 on a CPU. Liger's kernels and the streams of activation offloading are asked for in the
    YAML; they would fail in the first step, with words about drivers.
    """
    _keep_lora_kernels_off(cfg)
    off = [f"liger_{part}" for part in LIGER if cfg.get(f"liger_{part}")]
    if cfg.get("activation_offloading") in (True, "disk"):
        off.append("activation_offloading")
    for key in off:
        cfg[key] = False
    if cfg.get("gradient_checkpointing") in ("offload", "offload_disk"):
        cfg["gradient_checkpointing"] = True
        off.append("the offloading of gradient_checkpointing")
    if off:
        LOG.warning("No GPU here: training without %s; remove them for a CPU.", ", ".join(off))
    if _leaves_precision_open(cfg):
        LOG.info("No GPU here: training in float32 (bf16: true is there for those who want it).")
        cfg["bf16"] = False


def suit_a_gpu_without_bf16(cfg: dict) -> None:
    """Let `bf16: auto` be fp16 in a raw config, for a GPU older than Ampere, such as a T4.

    axolotl asks `torch.cuda.is_bf16_supported()`, which says yes where torch emulates bf16 slowly.
    What fp16 can't train is trained in float32. Triton, in which fused LoRA kernels are written,
    supports compute capability 8.0 and newer (https://github.com/triton-lang/triton#compatibility).
    """
    _keep_lora_kernels_off(cfg)
    if _leaves_precision_open(cfg):
        half = cfg.get("fp16") is None and trains_in_fp16(cfg)
        cfg["bf16"], cfg["fp16"] = False, half
        LOG.info(
            "This GPU has no bf16: training in %s (bf16: true is there for those who want it "
            "emulated).",
            "fp16" if half else "float32",
        )


def has_gpu_without_bf16() -> bool:
    """Return whether torch would emulate bf16 on the GPU that is here."""
    return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)


def _keep_lora_kernels_off(cfg: dict) -> None:
    if all(cfg.get(flag) is None for flag in LORA_KERNELS):
        cfg["lora_mlp_kernel"] = False


def _leaves_precision_open(cfg: dict) -> bool:
    return cfg.get("bf16") in (None, "auto") and not (cfg.get("fp16") or cfg.get("bfloat16"))
