"""axolotl's hooks, and nothing else: what `rl: amopo` turns into inside axolotl 0.21.

axolotl knows a closed list of `rl:` values, so `register`, which sees the raw config before it is
validated, takes `rl: amopo` out and turns the `amopo:` block on. axolotl then builds its causal
trainer and loads data the way it always does, with our trainer class, collator and dataset
formats in their places. In a run without `rl: amopo` every hook returns what the base class does.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.logging import get_logger

from axolotl_amopo.config.block import (
    DEFAULT_BETA,
    AMoPOConfig,
    check_axolotl_keys,
    parse_block,
    plain,
)
from axolotl_amopo.config.overrides import apply_overrides

LOG = get_logger(__name__)


class AMoPOPlugin(BasePlugin):
    """Registered through the `axolotl.plugins` entry point, or named under `plugins:`."""

    def __init__(self):
        super().__init__()
        self.enabled = False

    def register(self, cfg: dict) -> None:
        """Check the raw config and rewrite it into what axolotl can validate.

        Raises:
            ConfigError: for a key that is unknown, out of bounds, or can't go with the others.
            DataError: for a local data file that can't be read.
        """
        from axolotl_amopo.config.datasets import prepare_entries
        from axolotl_amopo.config.devices import check_devices, check_parallel
        from axolotl_amopo.config.files import check_yaml
        from axolotl_amopo.data.cache import set_aside_unfinished

        planned_for = cfg.pop("plan", None)  # `axolotl amopo plan`: a device that isn't here
        asked = cfg.get("rl") == "amopo"
        # On a Ray worker the config comes back validated, with `rl` already taken out.
        again = not asked and bool((cfg.get("amopo") or {}).get("enabled"))
        self.enabled = (asked or again) and self._is_first()
        if cfg.get("inference") and _has_our_datasets(cfg):
            _suit_a_cpu(cfg)  # `axolotl inference` takes `rl` away; the model is all it needs
        if not self.enabled or again:
            return

        check_yaml(cfg.get("axolotl_config_path"))
        apply_overrides(cfg)
        config = parse_block(AMoPOConfig, plain(cfg.get("amopo")), "amopo")
        without_effect = check_axolotl_keys(cfg)
        check_parallel(cfg)
        if not planned_for:
            check_devices(cfg)
        config.enabled = True
        # merge-lora and plan load the config alone; the data may be elsewhere.
        if not (cfg.get("merge_lora") or planned_for):
            config.datasets = prepare_entries(cfg, config)
            set_aside_unfinished(cfg.get("dataset_prepared_path"))

        cfg["rl"] = None
        cfg["amopo"] = config.model_dump(exclude_none=True)
        if cfg.get("rl_beta") is None:
            cfg["rl_beta"] = DEFAULT_BETA
        if planned_for != "cuda":
            _suit_a_cpu(cfg)
        if cfg.get("use_ray"):
            # Or Ray moves its workers to a folder of its own, where relative paths lead nowhere.
            os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
        LOG.info(
            "rl: amopo: prompts %s; weighting %s, winner %s, rl_beta %g, gamma %g. (axolotl logs "
            "its config with `rl` absent: the plugin has taken over from there.)",
            ", ".join(config.prompt_names),
            config.weighting,
            config.winner,
            cfg["rl_beta"],
            config.gamma,
        )
        for key in without_effect:
            LOG.warning("%s has no effect with rl: amopo, which has its own loss.", key)

    def _is_first(self) -> bool:
        # Named under `plugins:` by another path than the entry point's, it is there twice.
        plugins = PluginManager.get_instance().plugins.values()
        return next((p for p in plugins if isinstance(p, AMoPOPlugin)), self) is self

    def get_input_args(self) -> str | None:
        return "axolotl_amopo.config.block.AMoPOArgs" if self.enabled else None

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Loads nothing: the first hook of a training run that knows that it is one."""
        if self._runs(cfg) and not preprocess:
            from axolotl_amopo.config.devices import check_processes

            check_processes(cfg)

    def pre_model_load(self, cfg: Any) -> None:
        if not self._runs(cfg):
            return
        from axolotl_amopo.config.devices import check_layers
        from axolotl_amopo.model.choose import check_before_loading

        check_layers(cfg)
        if cfg.amopo.share_prompt is True:
            check_before_loading(cfg)

    def get_trainer_cls(self, cfg: Any) -> type | None:
        if not self._runs(cfg):
            return None
        from axolotl_amopo.training.trainer import AMoPOTrainer

        return AMoPOTrainer

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        if not self._runs(cfg):
            return None
        import torch

        # transformers refuses bf16 without a GPU unless it is told that this is meant.
        return None if torch.accelerator.is_available() else {"use_cpu": True}

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list:
        if not self._runs(cfg):
            return []
        from axolotl_amopo.training.eval_table import EvalTable
        from axolotl_amopo.training.run_log import RunLog, describe_run
        from axolotl_amopo.training.trackers import Trackers

        run = describe_run(cfg, trainer.amopo, trainer.train_dataset, trainer.eval_dataset)
        trackers = Trackers(trainer)
        table = [EvalTable(trainer, trackers)] if trainer.amopo.eval_table else []
        return [RunLog(run), trackers, *table]

    def post_lora_merge(self, cfg: Any, adapter_path: str, output_path: str) -> None:
        from axolotl_amopo.steering.steering import FILE

        facts = Path(adapter_path) / FILE
        if self._runs(cfg) and facts.is_file():
            shutil.copy(facts, output_path)

    def get_collator_cls_and_kwargs(
        self, cfg: Any, is_eval: bool = False
    ) -> tuple[type, dict[str, Any]] | None:
        if not self._runs(cfg):
            return None
        from axolotl_amopo.training.collator import AMoPOCollator

        # axolotl pads to 64 unless told otherwise, which is a fifth of a short pair. Products in
        # 8 bits take multiples of 16.
        chosen = cfg.pad_to_sequence_len or cfg.pad_to_multiple_of
        return AMoPOCollator, {} if chosen else {"pad_to_multiple_of": 16 if cfg.fp8 else 8}

    def _runs(self, cfg: Any) -> bool:
        return self.enabled and bool(cfg.amopo and cfg.amopo.enabled)


def _has_our_datasets(cfg: dict) -> bool:
    return any(str(entry.get("type")).startswith("amopo.") for entry in cfg.get("datasets") or [])


def _suit_a_cpu(cfg: dict) -> None:
    """What of axolotl's needs a GPU, where there is none.

    Fused LoRA kernels are switched on by themselves and fail; one flag that is set, whatever its
    value, keeps them off. `bf16: auto` becomes float16, which is a hundred times slower than
    float32 on a CPU. Liger's kernels and the streams of activation offloading are asked for in the
    YAML; they would fail in the first step, with words about drivers.
    """
    import torch

    if torch.accelerator.is_available() or cfg.get(
        "use_ray"
    ):  # a Ray driver knows no worker's device
        return
    flags = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
    if all(cfg.get(flag) is None for flag in flags):
        cfg["lora_mlp_kernel"] = False
    parts = ("rope", "rms_norm", "rms_norm_gated", "layer_norm", "glu_activation", "swiglu")
    off = [f"liger_{part}" for part in parts if cfg.get(f"liger_{part}")]
    if cfg.get("activation_offloading") in (True, "disk"):
        off.append("activation_offloading")
    for key in off:
        cfg[key] = False
    if cfg.get("gradient_checkpointing") in ("offload", "offload_disk"):
        cfg["gradient_checkpointing"] = True
        off.append("the offloading of gradient_checkpointing")
    if off:
        LOG.warning("No GPU here: training without %s.", ", ".join(off))
    if cfg.get("bf16") in (None, "auto") and not cfg.get("fp16") and not cfg.get("bfloat16"):
        LOG.info("No GPU here: training in float32 (bf16: true is there for those who want it).")
        cfg["bf16"] = False
