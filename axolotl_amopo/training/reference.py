"""Supply the log-probabilities of a reference model: `amopo.reference`.

The reference is the model as training found it. Where a new adapter is trained, which starts at
zero, that is the model with its adapter off: one more forward pass per step, and nothing to keep.
Otherwise (full fine-tuning, an adapter that goes on from another) its log-probabilities are taken
once, when training starts and the model is wrapped but nothing has moved, and kept in every
checkpoint; a run that is resumed reads them there, for by then the weights have moved.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from axolotl.utils.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.model.choose import without_dropout
from axolotl_amopo.model.forward import TokenLogps, unwrap

if TYPE_CHECKING:
    from axolotl_amopo.training.trainer import AMoPOTrainer

LOG = get_logger(__name__)

FILE = "amopo_reference.npz"
# Ways of PEFT's to begin an adapter in which it adds nothing, and leaves the base as it is.
# (axolotl 0.21 doesn't pass false on.)
STARTS_AT_ZERO = (None, True, False, "gaussian")

#: Runs what a batch runs in, and returns log-probabilities of the whole batch.
Run = Callable[[dict[str, Any]], TokenLogps]


def turn_dropout_off(model: nn.Module) -> None:
    """Turn dropout off for good: a policy that drops is another than its reference at step 0."""
    rates = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p]
    # The attention's own, which transformers' models keep as a number.
    numbers = [m for m in model.modules() if getattr(m, "attention_dropout", None)]
    for module in rates:
        module.p = 0.0
    for module in numbers:
        module.attention_dropout = 0.0
    if rates or numbers:
        LOG.warning("AMoPO: dropout is off: the objective compares the model with its reference.")


class AdapterOff:
    """The base model below an adapter, in the same wrapped model."""

    def sums(self, model: nn.Module, batch: dict[str, Any], run: Run) -> Tensor:
        """Return [1, B, K, N], the reference's summed log-probabilities in nats."""
        peft = unwrap(model)
        assert isinstance(peft, PeftModel)
        with torch.no_grad(), peft.disable_adapter(), without_dropout(model):
            return _sums(run(batch)).unsqueeze(0)


class Precomputed:
    """Sums that were taken before the first step, by example id."""

    def __init__(self, trainer: "AMoPOTrainer"):
        self.trainer = trainer
        self.known: dict[int, np.ndarray] = {}  # [K, N] each

    def sums(self, model: nn.Module, batch: dict[str, Any], run: Run) -> Tensor:
        """Return [1, B, K, N], the reference's summed log-probabilities in nats.

        Raises:
            AMoPOError: for an example that was not there when training started.
        """
        forest = batch["forest"]
        made = torch.zeros(1, forest.examples, forest.prompts, forest.responses)
        for b, example in enumerate(batch["example_ids"].tolist()):
            if example not in self.known:
                raise AMoPOError(
                    "The reference's log-probabilities of an example are not there: they are "
                    "taken when training starts, and kept in its checkpoints; evaluate with the "
                    "output_dir of a training run on the same rows."
                )
            # Padded to the largest example beside it there, which may not be here.
            known = torch.from_numpy(self.known[example])[: forest.prompts, : forest.responses]
            made[0, b, : known.shape[0], : known.shape[1]] = known
        return made.to(batch["example_ids"].device)

    def compute(self, model: nn.Module, run: Run) -> None:
        """Take the sums of all training and evaluation rows; every process does its share."""
        trainer = self.trainer
        datasets = [d for d in (trainer.train_dataset, trainer.eval_dataset) if d is not None]
        LOG.info(
            "AMoPO: taking the reference's log-probabilities of %s examples.",
            sum(map(len, datasets)),
        )
        found: dict[int, np.ndarray] = {}
        with torch.no_grad(), without_dropout(model):
            for dataset in datasets:
                for batch in self._batches(dataset):
                    batch = trainer._prepare_inputs(batch)
                    sums = _sums(run(batch)).float().cpu().numpy()  # [B, K, N]
                    found |= zip(batch["example_ids"].tolist(), sums, strict=True)
        for share in gather_object([found]):
            self.known |= share

    def _batches(self, dataset: Dataset) -> Iterator[dict[str, Any]]:
        args = self.trainer.args
        rows, world = list(range(len(dataset))), args.world_size
        # All processes make as many passes, for weights that are gathered in each.
        rows += rows[:1] * (-len(rows) % world)
        for indices in batched(rows[args.process_index :: world], args.eval_batch_size):
            yield self.trainer.data_collator([dataset[i] for i in indices])

    def save(self, folder: Path) -> None:
        """Write the sums into a checkpoint's folder."""
        ids = np.fromiter(self.known, dtype=np.int64)
        np.savez(
            folder / FILE,
            ids=ids,
            shapes=np.array([sums.shape for sums in self.known.values()]),
            sums=np.concatenate([sums.ravel() for sums in self.known.values()]),
            run=np.array(self._run()),
        )

    def load(self, folder: Path) -> None:
        """Read the sums of a checkpoint.

        Raises:
            AMoPOError: where there are none, or of another model.
        """
        path = folder / FILE
        if not path.is_file():
            raise AMoPOError(
                f"{folder} has no {FILE}, the log-probabilities of its run's reference; resume "
                "from a checkpoint of a run with the same objective, or start anew."
            )
        with np.load(path) as file:
            if str(file["run"]) != self._run():
                raise AMoPOError(
                    f"{path} is of another base model or adapter than this config's; resume with "
                    "the config that the run began with, or start anew."
                )
            ends = file["shapes"].prod(1).cumsum()[:-1]
            parts = np.split(file["sums"], ends)
            self.known = {
                int(example): part.reshape(shape)
                for example, part, shape in zip(file["ids"], parts, file["shapes"], strict=True)
            }

    def _run(self) -> str:
        """Return what the sums depend on beside the rows, whose ids stand with them."""
        cfg = self.trainer.axolotl_cfg
        named = [cfg.base_model, cfg.revision_of_model, cfg.adapter, cfg.lora_model_dir]
        return hashlib.sha256(repr([*map(str, named)]).encode()).hexdigest()[:16]


class TakeReference(TrainerCallback):
    """Takes a reference when training starts: the model is wrapped, and nothing has moved."""

    def __init__(self, trainer: "AMoPOTrainer"):
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        reference, model = self.trainer.reference, self.trainer.model_wrapped
        if isinstance(reference, Precomputed) and not reference.known:
            reference.compute(model, partial(self.trainer.run, model))


def reference_in_training(trainer: "AMoPOTrainer") -> AdapterOff | Precomputed:
    """Return what supplies the reference of a run that begins or goes on."""
    cfg = trainer.axolotl_cfg
    new = not cfg.lora_model_dir and cfg.peft_init_lora_weights in STARTS_AT_ZERO
    if isinstance(unwrap(trainer.model), PeftModel) and new:
        return AdapterOff()
    return Precomputed(trainer)


def reference_at_evaluation(trainer: "AMoPOTrainer") -> AdapterOff | Precomputed:
    """Return what supplies the reference of a model that is only evaluated.

    That is what its training has kept, or the model below its adapter.
    """
    kept = Path(trainer.args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{FILE}")
    newest = max(kept, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None and isinstance(unwrap(trainer.model), PeftModel):
        return AdapterOff()
    reference = Precomputed(trainer)
    if newest is not None:
        reference.load(newest.parent)
    return reference


def _sums(found: TokenLogps) -> Tensor:
    return (found.logps * found.mask).sum(-1)
