"""Preference training of the base model by any objective, with the package's own engine.

`axolotl_amopo.data` pairs and tokenises, `axolotl_amopo.model` runs the model, `OBJECTIVES` has the
losses, `axolotl_amopo.training.gradients` combines gradients. What is here is what axolotl's
trainer is elsewhere: the order of the examples, the reference, the optimizer. A run is described by
an `amopo:` block and axolotl's own keys `rl_beta`, `learning_rate`, `max_steps`, `max_grad_norm`.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import base_model
import torch
from base_model import BaseSettings
from rated import DataSettings
from torch import Tensor

from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.example import Example
from axolotl_amopo.model import choose_layout, make_batch, response_logps, responses, teach
from axolotl_amopo.model.forward import TokenLogps
from axolotl_amopo.objectives import OBJECTIVES, Draw, Objective, example_losses
from axolotl_amopo.objectives.gradients import Gradients
from axolotl_amopo.training.gradients import CombinedGradients, Judged
from axolotl_amopo.training.metrics import Means, example_metrics

INSTRUCTION = "{{ dimension }}{% if rating is not none %} {{ rating }}{% endif %}"
OVERALL_INSTRUCTION = (
    "all{% for d in dimensions %} {{ d.dimension }}"
    "{% if d.weight is defined %} {{ d.weight }}"
    "{% elif d.rating is not none %} {{ d.rating }}{% endif %}{% endfor %}"
)
WARMUP = 0.1  # share of the steps; the learning rate then falls by a cosine to 0


@dataclass(frozen=True)
class RunSettings:
    """All that a run depends on beside its seed. Keys of axolotl and of the `amopo:` block keep
    their names."""

    amopo: dict[str, Any] = field(default_factory=dict)
    rl_beta: float | None = None  # default: the objective's own
    learning_rate: float = 1e-3
    max_steps: int = 100  # 0: the base model as it is
    max_grad_norm: float = 1.0
    # A group of N responses counts as N / 2 pairs, so all objectives see as many responses.
    pairs_per_step: int = 8
    data: DataSettings = field(default_factory=DataSettings)
    base: BaseSettings = field(default_factory=BaseSettings)
    heldout_prompts: int = 64

    @cached_property
    def config(self) -> AMoPOConfig:
        """Return the checked block.

        Raises:
            ValidationError: for a block that the package refuses.
        """
        return block(self.amopo)

    @cached_property
    def objective(self) -> Objective:
        """Return the objective with its hyperparameters."""
        return self.config.make_objective(self.rl_beta)


def block(given: dict[str, Any]) -> AMoPOConfig:
    """Return the `amopo:` block, with instructions in the language's words.

    Objectives without instructions keep none.
    """
    defaults = OBJECTIVES[given.get("objective", "amopo")].defaults
    words = {"overall_instruction": OVERALL_INSTRUCTION}
    if {**defaults, **given}.get("prompts") != "one":
        words["instruction"] = INSTRUCTION
    words = {key: text for key, text in words.items() if key not in defaults}
    return AMoPOConfig.model_validate(words | given)


class Engine:
    """A model and how batches run through it."""

    def __init__(self, model: Any, first: Sequence[Example]):
        """Teach the model, and choose its layout on a few examples."""
        self.model = model
        teach(model)
        self.choice = choose_layout(model, make_batch(first), "auto")

    def run(self, batch: dict[str, Any]) -> TokenLogps:
        """Return a batch's log-probabilities."""
        choice = self.choice
        return response_logps(self.model, batch, choice.layout, own_logits=choice.own_logits)

    @torch.no_grad()
    def sums(self, examples: Sequence[Example], size: int = 32) -> list[Tensor]:
        """Return [K, N] of each example, the summed log-probabilities in nats."""
        self.model.eval()
        made: list[Tensor] = []
        for start in range(0, len(examples), size):
            found = self.run(make_batch(examples[start : start + size]))
            made += (found.logps * found.mask).sum(-1).unbind()
        return made


def references(engine: Engine, run: RunSettings, examples: Sequence[Example]) -> list[list[Tensor]]:
    """Return [R][examples] of [K, N], what the objective compares with; nothing for those without.

    The first reference is the base model, a second one another base model of the same kind.
    """
    needs = run.config.needs
    if "reference" not in needs:
        return []
    found = [engine.sums(examples)]
    if "references" in needs:
        other = base_model.load_base(replace(run.base, seed=run.base.seed + 1))
        found.append(Engine(other, examples[:2]).sums(examples))
    return found


def stacked(known: list[list[Tensor]], places: Sequence[int], like: Tensor) -> Tensor | None:
    """Return [R, B, K, N] of the reference, padded as `like` [B, K, N, ...] is."""
    if not known:
        return None
    made = like.new_zeros(len(known), *like.shape[:3])
    for r, sums in enumerate(known):
        for b, place in enumerate(places):
            one = sums[place][: like.shape[1], : like.shape[2]]
            made[r, b, : one.shape[0], : one.shape[1]] = one
    return made


def order(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yield the places of a step's examples, epoch after epoch, each in an order of its own."""
    if count < size:
        raise ValueError(f"{count} examples are fewer than the {size} of a step")
    numbers = random.Random(f"order {seed}")
    while True:
        places = list(range(count))
        numbers.shuffle(places)
        for start in range(0, count - size + 1, size):
            yield places[start : start + size]


def train(engine: Engine, run: RunSettings, examples: list[Example], seed: int) -> dict[str, float]:
    """Train the engine's model; return what was seen on the way: means over all steps.

    `loss` is that of the last tenth of the steps, `tokens` those that ran through the model in
    training and for the reference.
    """
    model, config, objective = engine.model, run.config, run.objective
    settings, needs = config.make_settings(), config.needs
    known = references(engine, run, examples)
    combined: CombinedGradients | None = None
    for setting in settings:
        if isinstance(setting, Gradients) and "gradients" in setting.needs:
            equal = [1 / len(config.criteria)] * len(config.criteria)
            weights = torch.tensor(config.shares or equal, dtype=torch.float64)
            combined = CombinedGradients(as_trainer(model, config), setting, weights)  # type: ignore
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_share, run.max_steps))
    size = run.pairs_per_step
    if config.group_by_prompt:
        size = max(1, 2 * size // run.data.responses)
    batches, means = order(len(examples), size, seed), Means()
    losses: list[float] = []
    tokens = batch_tokens(make_batch(examples)) * len(known)
    model.train()
    for step in range(run.max_steps):
        places = next(batches)
        batch = make_batch([examples[i] for i in places], token_counts="token_counts" in needs)
        tokens += batch_tokens(batch)

        def judge(
            found: TokenLogps, batch: dict[str, Any] = batch, places: list[int] = places,
            draw: Draw = Draw(seed, step),  # noqa: B008
        ) -> Judged:  # fmt: skip
            logps = found.logps
            weights = None
            if config.shares is not None:
                weights = logps.new_tensor(config.shares).expand(len(logps), -1)
            reference = stacked(known, places, logps.detach())
            given = responses(batch, logps, found.mask, weights=weights, reference=reference)
            outcome = objective(given, draw)
            for setting in settings:
                outcome = setting(outcome, given)
            means.add(example_metrics(outcome, given, config.criteria))
            counts = batch["counts"]
            factor = len(counts) / counts.sum()
            loss = (example_losses(outcome, given) * counts).mean() * factor
            return Judged(given, outcome, factor, loss)

        forward = partial(engine.run, batch)
        optimizer.zero_grad()
        if combined:
            loss = combined.loss(forward, judge, _backward, again=False)
        else:
            loss = judge(forward()).loss
        loss.backward()
        if combined:
            combined.collect()
            combined.finish()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    last = losses[-max(1, len(losses) // 10) :]
    kept = {
        name: value
        for name, value in means.take().items()
        if name.rpartition("/")[2] in ("weight", "weight_std")
    }
    if combined:
        kept |= combined.metrics
    return kept | {"loss": sum(last) / len(last), "tokens": float(tokens)}


def as_trainer(model: Any, config: AMoPOConfig) -> Any:
    """Return what `CombinedGradients` reads of a trainer, for one process."""
    accelerator = SimpleNamespace(reduce=lambda values, reduction: values)
    return SimpleNamespace(
        model=model, amopo=config, accelerator=accelerator, is_fsdp_enabled=False
    )


def _backward(loss: Any, *, retain_graph: bool) -> None:
    loss().backward(retain_graph=retain_graph)


def _share(steps: int, step: int) -> float:
    """Return the share of the learning rate at a step."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    left = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * left))


def batch_tokens(batch: dict[str, Any]) -> int:
    """Return the tokens that a batch runs through the model, shared ones once."""
    return batch["input_ids"].numel()
