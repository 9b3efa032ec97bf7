"""Supply the log-probabilities of reference models: `amopo.reference`.

`initial` is the model as training found it. Where a new adapter is trained, which starts at zero,
that is the model with its adapter off: one more forward pass per step, and nothing to keep.
Otherwise (full fine-tuning, an adapter that goes on from another) its log-probabilities are taken
once, when training starts and the model is wrapped but nothing has moved, and kept in every
checkpoint; a run that is resumed reads them there, for by then the weights have moved.

Another model's are read from the file in which `axolotl amopo reference` has put them, and kept in
every checkpoint as well.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from zipfile import BadZipFile

import numpy as np
import torch
from accelerate.utils import gather_object
from axolotl.utils.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axolotl_amopo.config.references import INITIAL, file_of, path_of
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.model.choose import without_dropout
from axolotl_amopo.model.forest import Forest
from axolotl_amopo.model.forward import TokenLogps, unwrap

if TYPE_CHECKING:
    from axolotl_amopo.training.trainer import AMoPOTrainer

LOG = get_logger(__name__)

# Ways of PEFT's to begin an adapter in which it adds nothing, and leaves the base as it is.
# (axolotl 0.21 doesn't pass false on.)
STARTS_AT_ZERO = (None, True, False, "gaussian")

#: Runs what a batch runs in, and returns log-probabilities of the whole batch.
Run = Callable[[dict[str, Any]], TokenLogps]


def turn_dropout_off(model: nn.Module) -> None:
    """Turn dropout off for good: a policy that drops is another than its reference at step 0."""
    rates = {n: m for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p}
    # The attention's own, which transformers' models keep as a number.
    numbers = [m for m in model.modules() if getattr(m, "attention_dropout", None)]
    for module in rates.values():
        module.p = 0.0
    for module in numbers:
        module.attention_dropout = 0.0
    why = "the objective compares the model with its reference, without dropout"
    if any("lora_dropout" in name for name in rates):
        LOG.warning("lora_dropout has no effect: %s; write lora_dropout: 0.", why)
    elif rates or numbers:  # nothing that the user wrote
        LOG.info("AMoPO: the model's own dropout is off: %s.", why)


class AdapterOff:
    """The base model below an adapter, in the same wrapped model."""

    def sums(self, model: nn.Module, batch: dict[str, Any], run: Run) -> Tensor:
        """Return [1, B, K, N], the reference's summed log-probabilities in nats."""
        peft = unwrap(model)
        assert isinstance(peft, PeftModel)
        with torch.no_grad(), peft.disable_adapter(), without_dropout(model):
            return _sums(run(batch)).unsqueeze(0)


@dataclass
class Sums:
    """Hold a model's summed log-probabilities of responses, by example."""

    made_by: str  # what they depend on beside the examples, whose ids say what is in them
    known: dict[int, np.ndarray] = field(default_factory=dict)  # by example id, [K, N] in nats

    def write(self, path: Path) -> None:
        """Write a file, whole or not at all."""
        unfinished = path.with_name(f"{path.name}.unfinished")
        with unfinished.open("wb") as file:
            np.savez(
                file,
                ids=np.fromiter(self.known, dtype=np.int64),
                shapes=np.array([sums.shape for sums in self.known.values()]).reshape(-1, 2),
                sums=np.concatenate([np.empty(0), *(s.ravel() for s in self.known.values())]),
                made_by=np.array(self.made_by),
            )
        unfinished.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            AMoPOError: for one that is damaged, or something else.
        """
        try:
            with np.load(path) as file:
                parts = np.split(file["sums"], file["shapes"].prod(1).cumsum()[:-1])
                each = zip(file["ids"], parts, file["shapes"], strict=True)
                known = {int(example): part.reshape(shape) for example, part, shape in each}
                return cls(str(file["made_by"]), known)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise AMoPOError(
                f"{path}: can't be read as log-probabilities of a reference ({error}); remove it."
            ) from None

    def of_batch(self, forest: Forest, examples: list[int]) -> Tensor:
        """Return [1, B, K, N], as a batch needs them.

        Raises:
            KeyError: for an example that is not there.
        """
        made = torch.zeros(1, forest.examples, forest.prompts, forest.responses)
        for b, example in enumerate(examples):
            # Padded to the largest example beside it there, which may not be here.
            known = torch.from_numpy(self.known[example])[: forest.prompts, : forest.responses]
            made[0, b, : known.shape[0], : known.shape[1]] = known
        return made


def facts_of_model(model: str) -> str:
    """Return what tells whether a model's folder is the one that it was; a hub's name as it is."""
    files = sorted(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for kind in ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
        for file in Path(model).glob(kind)
    )
    return hashlib.sha256(repr((model, files)).encode()).hexdigest()[:16]


class Precomputed:
    """Sums that were taken before the first step: of the model as it was, or of another one."""

    def __init__(self, trainer: "AMoPOTrainer", model: str = INITIAL):
        self.trainer = trainer
        self.model = model
        self.taken: Sums | None = None

    def sums(self, model: nn.Module, batch: dict[str, Any], run: Run) -> Tensor:
        """Return [1, B, K, N], the reference's summed log-probabilities in nats.

        Raises:
            AMoPOError: for an example that was not there when training started.
        """
        ids = batch["example_ids"]
        try:
            assert self.taken is not None
            return self.taken.of_batch(batch["forest"], ids.tolist()).to(ids.device)
        except (KeyError, AssertionError):
            raise AMoPOError(
                "The reference's log-probabilities of an example are not there: they are taken "
                "when training starts, and kept in its checkpoints; evaluate with the output_dir "
                "of a training run on the same rows."
            ) from None

    def compute(self, model: nn.Module, run: Run) -> None:
        """Take the sums of all training and evaluation rows; every process does its share."""
        LOG.info(
            "AMoPO: taking the reference's log-probabilities of %s examples.",
            sum(map(len, self._datasets())),
        )
        found: dict[int, np.ndarray] = {}
        with torch.no_grad(), without_dropout(model):
            for dataset in self._datasets():
                for batch in self._batches(dataset):
                    batch = self.trainer._prepare_inputs(batch)
                    found |= sums_by_example(batch, run(batch))
        self.taken = Sums(self._made_by())
        for share in gather_object([found]):
            self.taken.known |= share

    def _datasets(self) -> list[Dataset]:
        return [d for d in (self.trainer.train_dataset, self.trainer.eval_dataset) if d is not None]

    def _batches(self, dataset: Dataset) -> Iterator[dict[str, Any]]:
        args = self.trainer.args
        rows, world = list(range(len(dataset))), args.world_size
        # All processes make as many passes, for weights that are gathered in each.
        rows += rows[:1] * (-len(rows) % world)
        for indices in batched(rows[args.process_index :: world], args.eval_batch_size):
            yield self.trainer.data_collator([dataset[i] for i in indices])

    def save(self, folder: Path) -> None:
        """Write the sums into a checkpoint's folder."""
        assert self.taken is not None
        self.taken.write(folder / file_of(self.model))

    def load(self, folder: Path) -> None:
        """Read the sums of a checkpoint.

        Raises:
            AMoPOError: where there are none, or of another model.
        """
        path = folder / file_of(self.model)
        if not path.is_file():
            raise AMoPOError(
                f"{folder} has no {path.name}, the log-probabilities of its run's reference; "
                "resume from a checkpoint of a run with the same objective, or start anew."
            )
        taken = Sums.read(path)
        if self.model == INITIAL and taken.made_by != self._made_by():
            raise AMoPOError(
                f"{path} is of another base model or adapter than this config's; resume with the "
                "config that the run began with, or start anew."
            )
        self.taken = taken

    def read(self) -> None:
        """Read another model's sums from where `axolotl amopo reference` has put them.

        Raises:
            AMoPOError: where they are of other rows, or the model has changed since.
        """
        path = path_of(self.trainer.axolotl_cfg, self.model)
        again = f"run `axolotl amopo reference` with this config again{{}}, for {self.model}."
        taken = Sums.read(path)
        if Path(self.model).is_dir() and taken.made_by != facts_of_model(self.model):
            raise AMoPOError(f"{path}: the model has changed since; {again.format(' (--force)')}")
        ids = {example for dataset in self._datasets() for example in dataset["example_id"]}
        if lacking := len(ids - set(taken.known)):
            raise AMoPOError(
                f"{path} lacks {lacking} of this config's {len(ids)} examples; {again.format('')}"
            )
        self.taken = Sums(taken.made_by, {example: taken.known[example] for example in ids})

    def _made_by(self) -> str:
        cfg = self.trainer.axolotl_cfg
        named = [cfg.base_model, cfg.revision_of_model, cfg.adapter, cfg.lora_model_dir]
        return hashlib.sha256(repr([*map(str, named)]).encode()).hexdigest()[:16]


class References:
    """Supply the log-probabilities of all models that an objective compares with."""

    def __init__(self, each: Sequence[AdapterOff | Precomputed]):
        self.each = each
        self.taken = [one for one in each if isinstance(one, Precomputed)]

    def sums(self, model: nn.Module, batch: dict[str, Any], run: Run) -> Tensor:
        """Return [R, B, K, N] summed log-probabilities in nats."""
        return torch.cat([one.sums(model, batch, run) for one in self.each])

    def compute(self, model: nn.Module, run: Run) -> None:
        """Take what can be taken from this model alone, before it moves."""
        for one in self.taken:
            if one.taken is None:
                one.compute(model, run)

    def save(self, folder: Path) -> None:
        """Write into a checkpoint's folder what a run that is resumed can't take again."""
        for one in self.taken:
            one.save(folder)


class TakeReference(TrainerCallback):
    """Takes a reference when training starts: the model is wrapped, and nothing has moved."""

    def __init__(self, trainer: "AMoPOTrainer"):
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        references, model = self.trainer.references, self.trainer.model_wrapped
        if references is not None:
            references.compute(model, partial(self.trainer.run, model))


def references_in_training(trainer: "AMoPOTrainer", checkpoint: Path | None) -> References:
    """Return what supplies the references of a run that begins, or goes on from a checkpoint.

    Raises:
        AMoPOError: where another model's log-probabilities are not there, or not of these rows.
    """
    each: list[AdapterOff | Precomputed] = []
    for name in trainer.amopo.references:
        one = initial_reference(trainer) if name == INITIAL else Precomputed(trainer, name)
        if isinstance(one, Precomputed) and checkpoint:
            one.load(checkpoint)
        elif isinstance(one, Precomputed) and name != INITIAL:
            one.read()
        each.append(one)
    return References(each)


def initial_reference(trainer: "AMoPOTrainer") -> AdapterOff | Precomputed:
    """Return what supplies the model as training finds it; reads the trainer's config and model."""
    cfg = trainer.axolotl_cfg
    new = not cfg.lora_model_dir and cfg.peft_init_lora_weights in STARTS_AT_ZERO
    off = isinstance(unwrap(trainer.model), PeftModel) and new
    return AdapterOff() if off else Precomputed(trainer)


def references_at_evaluation(trainer: "AMoPOTrainer") -> References:
    """Return what supplies the references of a model that is only evaluated.

    That is what its training has kept, else the model below its adapter, and for other models what
    was taken of them.
    """
    each: list[AdapterOff | Precomputed] = []
    for name in trainer.amopo.references:
        kept = Path(trainer.args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{file_of(name)}")
        newest = max(kept, key=lambda path: path.stat().st_mtime, default=None)
        if newest is None and name == INITIAL and isinstance(unwrap(trainer.model), PeftModel):
            each.append(AdapterOff())
            continue
        one = Precomputed(trainer, name)
        if newest is not None:
            one.load(newest.parent)
        elif name != INITIAL:
            one.read()
        each.append(one)
    return References(each)


def sums_by_example(batch: Mapping[str, Any], found: TokenLogps) -> dict[int, np.ndarray]:
    """Return [K, N] summed log-probabilities in nats of each of a batch's examples, by its id."""
    sums = _sums(found).float().cpu().numpy()  # [B, K, N]
    return dict(zip(batch["example_ids"].tolist(), sums, strict=True))


def _sums(found: TokenLogps) -> Tensor:
    return (found.logps * found.mask).sum(-1)
