"""Settings of axolotl's that need a GPU, for a run without one."""

from axolotl.utils.logging import get_logger

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
    if all(cfg.get(flag) is None for flag in LORA_KERNELS):
        cfg["lora_mlp_kernel"] = False
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
    if cfg.get("bf16") in (None, "auto") and not cfg.get("fp16") and not cfg.get("bfloat16"):
        LOG.info("No GPU here: training in float32 (bf16: true is there for those who want it).")
        cfg["bf16"] = False
