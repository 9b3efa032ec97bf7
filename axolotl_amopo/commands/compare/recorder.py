"""An axolotl plugin that records a run's losses and what it cost, for any `rl:`.

Every config that a comparison writes names it under `plugins:`, so that `axolotl train` leaves the
same record whoever starts it. The file is `_amopo_record.json` in the run's `output_dir`.
"""

import json
import resource
import time
from itertools import batched
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

RECORD = "_amopo_record.json"


class RecorderPlugin(BasePlugin):
    """Add the recorder to a trainer, and nothing else."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        return [Recorder(trainer)]


class Recorder(TrainerCallback):
    """Count what goes through the model between the first pass and the last step.

    Tokens are those that reach the input embeddings, padding and passes of a reference included,
    but for those by which the plugin's trainer proves its layout once. On several processes the
    numbers are of the first one, but for pairs, which are of all.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.tokens = 0
        self.begun: float | None = None
        models = [trainer.model, getattr(trainer, "ref_model", None)]
        self.hooks = [
            model.get_input_embeddings().register_forward_pre_hook(self._count)
            for model in models
            if model is not None
        ]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begin()  # unless a reference was asked first

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        if not state.is_world_process_zero or self.begun is None:
            return
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        record = {
            "losses": [
                [entry["step"], entry["loss"]] for entry in state.log_history if "loss" in entry
            ],
            "seconds": time.monotonic() - self.begun,
            "steps": state.global_step,
            "pairs": state.global_step * per_step * args.world_size * self._pairs_per_example(),
            "tokens": self.tokens,
            "peak_bytes": peak_bytes(),
            "device": self.trainer.model.device.type,
            "processes": args.world_size,
        }
        path = Path(args.output_dir) / RECORD
        path.write_text(json.dumps(record, default=float) + "\n", encoding="utf-8")

    def _pairs_per_example(self) -> float:
        """Return the mean over the training data: a group of the plugin's has several pairs."""
        rows = self.trainer.train_dataset
        if "comparisons" not in rows.column_names:
            return 1.0
        flat = rows["comparisons"]  # first and second of each; a response alone is no pair
        counts = [sum(a != b for a, b in batched(example, 2)) for example in flat]
        return sum(counts) / len(counts)

    def _begin(self) -> None:
        if self.begun is None:
            self.begun = time.monotonic()

    def _count(self, module: Any, inputs: tuple[Any, ...]) -> None:
        self._begin()
        # The plugin's trainer has chosen none while it tries its layouts; others have no choice.
        if getattr(self.trainer, "choice", True) is not None:
            self.tokens += inputs[0].numel()


def peak_bytes() -> int:
    """Return the most memory that was in use: of the GPU, or without one of the process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
