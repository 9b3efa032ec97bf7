"""The steering file of a model that axolotl's own trainer trains, on rows of `type: amopo.ric`."""

from pathlib import Path
from typing import Any, override

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axolotl_amopo.config.block import read_block
from axolotl_amopo.config.through_axolotl import stamped
from axolotl_amopo.steering.steering import Steering


class SteeringFile(TrainerCallback):
    """Saves `amopo_steering.json` beside the model and every checkpoint.

    Args:
        cfg: axolotl's validated config.
        dataset: the training rows, which know the scales of their dimensions.
    """

    def __init__(self, cfg: Any, dataset: Any):
        self.steering: Steering | None = None
        for facts in stamped(dataset)[:1]:  # none where only evaluation rows are of this type
            lower, kwargs = set(facts["lower_is_better"]), cfg.chat_template_kwargs
            self.steering = Steering.from_config(
                read_block(cfg), facts["scales"], lower, kwargs, cfg.eot_tokens
            )

    @override
    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._save(state, Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._save(state, Path(args.output_dir))  # axolotl saves the trained model there next

    def _save(self, state: TrainerState, folder: Path) -> None:
        if self.steering and state.is_world_process_zero:
            folder.mkdir(parents=True, exist_ok=True)
            self.steering.save(folder)
