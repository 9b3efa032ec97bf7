"""axolotl's hooks, and nothing else: what `rl: amopo` turns into inside axolotl 0.21.

axolotl knows a closed list of `rl:` values, so `register`, which sees the raw config before it is
validated, takes `rl: amopo` out and turns the `amopo:` block on. axolotl then builds its causal
trainer and loads data the way it always does, with our trainer class, collator and dataset
formats in their places. In a run without `rl: amopo` every hook returns what the base class does;
where it has datasets of `type: amopo.ric`, they get their rows, and the model its steering file.

Imports stand in the hooks: axolotl loads this module in every run on the machine.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin, PluginManager

from axolotl_amopo.errors import print_sentences


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
        from axolotl_amopo.config.take_over import (
            has_supervised_rows,
            is_asked_for,
            is_taken_over,
            suit_inference,
            take_over,
            take_over_rows,
        )

        supervised = has_supervised_rows(cfg)
        self.enabled = self._is_first() and (is_asked_for(cfg) or is_taken_over(cfg) or supervised)
        if self.enabled:
            from axolotl_amopo.config.redact import redact_logged_config

            print_sentences()
            logging.getLogger("axolotl.cli.config").addFilter(redact_logged_config)
        suit_inference(cfg)
        if self.enabled and (supervised or is_asked_for(cfg)):
            # These two load the config alone; `inference` has taken `rl: amopo` away.
            with_data = not (cfg.get("merge_lora") or cfg.get("inference"))
            (take_over_rows if supervised else take_over)(cfg, with_data=with_data)
            if with_data:
                from axolotl_amopo.data.cache import set_aside_unfinished

                set_aside_unfinished(cfg.get("dataset_prepared_path"))

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
        from axolotl_amopo.config.axolotl_keys import check_models_router
        from axolotl_amopo.config.block import read_block
        from axolotl_amopo.config.devices import check_layers, check_one_gpu
        from axolotl_amopo.config.redact import redact_config_file
        from axolotl_amopo.config.references import check_references
        from axolotl_amopo.training.samples import check_settings
        from axolotl_amopo.training.sharing import check_before_loading

        # Everything reads it there from now on: the run's log and card, and axolotl's callbacks,
        # which send the file to trackers.
        cfg.axolotl_config_path = redact_config_file(cfg.axolotl_config_path)
        if not cfg.merge_lora:  # which may use the memory of several
            check_one_gpu()  # again, for `axolotl evaluate`
            check_references(cfg, read_block(cfg))
        check_layers(cfg)
        check_models_router(cfg)
        check_settings(read_block(cfg))
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
            if self._is_ours(cfg):
                from axolotl_amopo.training.steering_file import SteeringFile

                return [SteeringFile(cfg, trainer.train_dataset)]
            return []
        from axolotl_amopo.training.console import console_callbacks
        from axolotl_amopo.training.eval_table import EvalTable
        from axolotl_amopo.training.run_log import RunLog, describe_run
        from axolotl_amopo.training.samples import Samples
        from axolotl_amopo.training.trackers import Trackers

        run = describe_run(cfg, trainer.amopo, trainer.train_dataset, trainer.eval_dataset)
        trackers = Trackers(trainer)
        shown: list = [EvalTable(trainer, trackers)] if trainer.amopo.eval_table else []
        if trainer.amopo.generate_samples:
            trainer.samples = Samples(trainer, trackers)
            shown.append(trainer.samples)
        return [*console_callbacks(trainer), RunLog(run, trainer), trackers, *shown]

    def post_lora_merge(self, cfg: Any, adapter_path: str, output_path: str) -> None:
        from axolotl_amopo.steering.steering import FILE

        facts = Path(adapter_path) / FILE
        if self._is_ours(cfg) and facts.is_file():
            shutil.copy(facts, output_path)

    def get_collator_cls_and_kwargs(
        self, cfg: Any, is_eval: bool = False
    ) -> tuple[type, dict[str, Any]] | None:
        if not self._runs(cfg):
            return None
        import torch

        from axolotl_amopo.config.block import read_block
        from axolotl_amopo.training.collator import AMoPOCollator

        wanted = {"token_counts": "token_counts" in read_block(cfg).needs}
        # axolotl pads to 64 unless told otherwise, which is a fifth of a short pair. A GPU likes
        # multiples of 8, and products in 8 bits take multiples of 16 alone.
        if cfg.pad_to_sequence_len or cfg.pad_to_multiple_of:
            return AMoPOCollator, wanted
        multiple = 8 if torch.accelerator.is_available() else 1
        return AMoPOCollator, wanted | {"pad_to_multiple_of": 16 if cfg.fp8 else multiple}

    def _runs(self, cfg: Any) -> bool:
        return self.enabled and bool(cfg.amopo and cfg.amopo.enabled)

    def _is_ours(self, cfg: Any) -> bool:
        # Also a run of axolotl's own on rows of `type: amopo.ric`.
        return self.enabled and bool(cfg.amopo)
