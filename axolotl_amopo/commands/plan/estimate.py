"""A step on one device -> memory on each of many, time, and what would make it fit."""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from axolotl.utils.dict import DictDefault
from datasets import Dataset
from transformers import PreTrainedConfig

from axolotl_amopo.commands.plan.cards import GIB, Card
from axolotl_amopo.commands.plan.groups import (
    largest_row,
    made_up_example,
    pairs_in,
    tokens,
    usual_row,
)
from axolotl_amopo.commands.plan.step import (
    Moment,
    PairShape,
    Step,
    micro_batch,
    run_step,
    shaped,
)
from axolotl_amopo.config.block import AMoPOConfig, read_block
from axolotl_amopo.config.devices import deepspeed_settings
from axolotl_amopo.errors import ConfigError

# What a process has on a GPU before the first tensor (CUDA context, cuBLAS workspaces), and what
# the caching allocator wastes on blocks that fit nothing.
CONTEXT_BYTES = int(0.9 * GIB)
FRAGMENTATION = 0.05
# A question this short with two answers that fill `sequence_len` is the largest pair there is.
SHORTEST_PROMPT = 64
# Of a made-up group: as many as UltraFeedback has.
RESPONSES = 4
# Keys that change what is made of a simulated step, and not the step.
NOT_IN_A_STEP = ("optimizer", "gradient_accumulation_steps")
# DeepSpeed's own default, in numbers; what ZeRO-3 keeps gathered at most.
MAX_LIVE_PARAMETERS = 10**9


@dataclass(frozen=True)
class Optimizer:
    """Bytes for every trained number, `dtype` standing for those of the number itself."""

    states: Callable[[int], float]
    during_step: Callable[[int], float] = lambda dtype: 0.0


ADAM = Optimizer(lambda dtype: 2 * dtype)
OPTIMIZERS: dict[str, Optimizer] = {
    # One kernel for all parameters at once, through temporary copies.
    "adamw_torch": Optimizer(lambda dtype: 2 * dtype, lambda dtype: dtype),
    "adamw_torch_fused": ADAM,
    "optimi_adamw": Optimizer(lambda dtype: (3 if dtype == 2 else 2) * dtype),  # Kahan's sum
    "adamw_torch_8bit": Optimizer(lambda dtype: 2 * (1 + 4 / 256)),
    "adamw_torch_4bit": Optimizer(lambda dtype: 1 + 8 / 128),
    "adamw_bnb_8bit": Optimizer(lambda dtype: 2 * (1 + 4 / 256)),
    "adamw_8bit": Optimizer(lambda dtype: 2 * (1 + 4 / 256)),
    "paged_adamw_8bit": Optimizer(lambda dtype: 2 * (1 + 4 / 256)),
    "paged_adamw_32bit": Optimizer(lambda dtype: 8),
    "lion_32bit": Optimizer(lambda dtype: 4),
    "lion_8bit": Optimizer(lambda dtype: 1 + 4 / 256),
    "paged_lion_8bit": Optimizer(lambda dtype: 1 + 4 / 256),
    "rmsprop": Optimizer(lambda dtype: dtype),
    "adagrad": Optimizer(lambda dtype: dtype),
    "adafactor": Optimizer(lambda dtype: 0.01, lambda dtype: 4),
    "sgd": Optimizer(lambda dtype: 0),
    "muon": Optimizer(lambda dtype: dtype),
}


@dataclass(frozen=True)
class Sharding:
    """Over how many devices what is divided."""

    name: str  # none, ddp, fsdp2, zero1, zero2, zero3
    devices: int
    offload_optimizer: bool = False
    offload_weights: bool = False
    keep_gathered: bool = False  # FSDP2 with reshard_after_forward: false
    max_live: int = MAX_LIVE_PARAMETERS  # ZeRO-3

    @property
    def deepspeed(self) -> bool:
        return self.name.startswith("zero")

    @property
    def weights(self) -> int:
        return self.devices if self.name in ("fsdp2", "zero3") else 1

    @property
    def gradients(self) -> int:
        return self.devices if self.name in ("fsdp2", "zero2", "zero3") else 1

    @property
    def states(self) -> int:
        return self.devices if self.name == "fsdp2" or self.deepspeed else 1


def sharding(cfg: Any, devices: int) -> Sharding:
    """How a config spreads a model over devices.

    Raises:
        ConfigError: for a DeepSpeed file that isn't one.
    """
    if cfg.deepspeed:
        options = deepspeed_settings(cfg.deepspeed)["zero_optimization"]

        def offloads(key: str) -> bool:
            return (options.get(key) or {}).get("device", "none") != "none"

        live = options.get("stage3_max_live_parameters", MAX_LIVE_PARAMETERS)
        return Sharding(
            f"zero{options['stage']}" if options.get("stage") else "ddp",
            devices,
            offloads("offload_optimizer"),
            offloads("offload_param"),
            max_live=MAX_LIVE_PARAMETERS if live == "auto" else int(live),
        )
    if cfg.fsdp_config:
        offload = bool(cfg.fsdp_config.offload_params)
        kept = cfg.fsdp_config.reshard_after_forward is False
        return Sharding("fsdp2", devices, offload, offload, keep_gathered=kept)
    return Sharding("ddp" if devices > 1 else "none", devices)


def memory(step: Step, cfg: Any, shards: Sharding, card: Card | None) -> dict[str, int]:
    """Bytes on each device by what they are for, at the moment that needs most.

    Args:
        step: of the largest micro batch.
        card: None on a CPU, which has neither a CUDA context nor its allocator.
    """
    n = shards.devices
    full = not cfg.adapter
    # DeepSpeed keeps a float32 copy of what it trains, and AdamW's two states of that.
    optimizer = OPTIMIZERS.get(getattr(cfg.optimizer, "value", cfg.optimizer), ADAM)
    width = step.trained / step.trainable
    half = width == 2
    states = optimizer.states(4 if shards.deepspeed else width) * step.trainable
    if shards.deepspeed and half:
        states += 4 * step.trainable
    states /= shards.states
    during = optimizer.during_step(width) * step.trainable / shards.states
    gathered = 0
    if shards.name == "fsdp2":  # the unit that runs and the one that is fetched
        gathered = (
            step.weights + step.trained * (not full)
            if shards.keep_gathered
            else (2 * step.largest_unit)
        )
    elif shards.name == "zero3":
        gathered = min(2 * shards.max_live, step.weights)
    weights = step.weights / shards.weights
    trained = 0 if full else step.trained / shards.weights
    gradients = step.trained / shards.gradients
    # A unit's gradients, whole, on their way to their owners; or the buckets that are sent.
    sent = min(step.trained, step.largest_unit) if shards.gradients > 1 else 0
    if shards.name == "ddp" and n > 1:
        sent = step.trained
    accumulated = (cfg.gradient_accumulation_steps or 1) > 1  # those of earlier micro batches
    criteria = step.criteria * gradients  # a gradient of each, until the step is made of them
    buckets = sent if n > 1 and shards.name == "ddp" else 0
    if shards.offload_weights:
        weights = trained = gradients = criteria = 0
    if shards.offload_optimizer:
        states = during = 0

    def at(moment: Moment) -> dict[str, float]:
        summed = accumulated and not criteria
        return {
            "criteria": criteria if accumulated or step.largest_passes > 1 else 0,
            "gradients": (gradients if summed else moment.gradients / shards.gradients) + sent,
            "gathered": gathered,
            "unpacked": step.unpacked,
            "activations": moment.activations,
            "logits": moment.logits,
            "working": moment.working,
        }

    # Inner products of one weight after the other are taken in float64; then it gets its gradient.
    largest = step.largest_trained / shards.gradients
    double = {"criteria": criteria, "gradients": buckets}
    double["working"] = step.criteria * (8 + width) * largest
    combined = {"criteria": criteria, "gradients": gradients + buckets}
    combined["working"] = 2 * width * largest
    in_optimizer = {"gradients": gradients + buckets, "working": during}
    ends = [double, combined, in_optimizer] if criteria else [in_optimizer]
    fullest = max([*map(at, step.moments), *ends], key=lambda sizes: sum(sizes.values()))
    lines = {"weights": weights, "adapters": trained, "optimizer": states} | fullest
    if card is not None:
        lines["reserve"] = CONTEXT_BYTES + FRAGMENTATION * sum(lines.values())
    return {name: math.ceil(size) for name, size in lines.items()}


@dataclass(frozen=True)
class Plan:
    """What a run needs; see `estimate`."""

    model: str
    training: str  # full, lora, qlora
    sharding: Sharding
    layout: str
    parameters: int
    trainable: int
    pairs_per_step: int
    prompts: int
    tokens_per_step: int
    tokens_per_step_unshared: int
    flops_per_step: int
    sequence_len: int
    memory: dict[str, int]  # bytes on each device, with the largest examples
    card: Card | None
    utilisation: float
    epoch_pairs: int
    largest: str  # what memory is counted of
    epoch_examples: int  # pairs or groups
    responses: int = 2  # of a usual example
    groups_per_step: int | None = None  # examples, where they are groups
    whole_groups: bool = False  # whether they have all responses of a prompt, not its pairs alone
    parts: int = 1  # that a usual micro batch runs in, for one more forward pass
    largest_parts: int = 1  # the same of the largest one
    criteria: int = 0  # whose gradients are kept apart, to be combined
    passes: int = 1  # backward ones of a usual micro batch
    reference: str = ""  # how it is supplied, see `Step`
    held_out_examples: int = 0  # of which a reference is precomputed too
    flops_before: int = 0  # to precompute it
    epochs: float = 1.0
    max_steps: int | None = None

    @cached_property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool | None:
        return None if self.card is None else self.total <= self.card.bytes

    @property
    def too_many_gradients(self) -> bool:
        """Return whether it does not fit, and a gradient per criterion takes more than weights."""
        return self.fits is False and self.memory.get("criteria", 0) > self.memory["weights"]

    @property
    def steps_per_epoch(self) -> int:
        # A prompt with one response has no pair.
        return math.ceil(self.epoch_pairs / (self.pairs_per_step or self.groups_per_step or 1))

    @property
    def steps(self) -> int:
        steps = math.ceil(self.epochs * self.steps_per_epoch)
        return min(steps, self.max_steps) if self.max_steps else steps

    @property
    def seconds_per_epoch(self) -> float | None:
        return self._seconds(self.steps_per_epoch * self.flops_per_step)

    @property
    def seconds_before(self) -> float | None:
        """Return how long it takes to precompute a reference, before the first step."""
        return self._seconds(self.flops_before)

    @property
    def seconds(self) -> float | None:
        """Return how long the whole run takes."""
        return self._seconds(self.flops_before + self.steps * self.flops_per_step)

    def _seconds(self, flops: int) -> float | None:
        if self.card is None:
            return None
        return flops / (self.card.tflops * 1e12 * self.utilisation * self.sharding.devices)

    @property
    def epoch(self) -> str:
        """Return what an epoch has, in words."""
        if self.whole_groups:
            return f"{self.epoch_examples:,} groups"
        return f"{self.epoch_pairs:,} pairs"

    def summary(self) -> str:
        """What fits into a comment."""
        whole = self.whole_groups
        what = f"{self.groups_per_step} groups" if whole else f"{self.pairs_per_step} pairs"
        text = f"{what} and {self.tokens_per_step:,} tokens a step; {self.total / GIB:.1f}"
        if self.card is None:
            return f"{text} GiB"
        before = f", and {self.seconds_before / 3600:.2g} h before" if self.flops_before else ""
        time = f"{self.seconds_per_epoch / 3600:.2g} h for {self.epoch}{before}"
        return f"{text} of {self.card.bytes / GIB:.1f} GiB; {time}"

    def to_json(self) -> dict[str, Any]:
        derived = ("total", "fits", "steps_per_epoch", "steps")
        times = ("seconds_per_epoch", "seconds_before", "seconds")
        return asdict(self) | {name: getattr(self, name) for name in derived + times}


def estimate(
    cfg: Any,
    config: PreTrainedConfig,
    amopo: AMoPOConfig,
    usual: PairShape,
    *,
    responses: int | None = None,
    rows: Dataset | None = None,
    card: Card | None,
    devices: int = 1,
    device: str = "cuda",
    utilisation: float = 0.4,
    epoch_pairs: int = 10_000,
    held_out_pairs: int | None = None,
    steps: dict[str, Step] | None = None,
) -> Plan:
    """Simulate a step at the usual length for its cost, and at the largest for its memory.

    Args:
        cfg: axolotl's validated config.
        usual: tokens of a usual pair, or of a usual group.
        responses: of a made-up group, with `group_by_prompt`.
        rows: prepared ones, of which a group is one; instead of `responses`.
        card: what each process has; None to say nothing about fitting and time.
        device: `cuda` or `cpu`.
        utilisation: share of the card's speed that training reaches.
        epoch_pairs: of the data, whatever is made of them.
        held_out_pairs: by default those that `val_set_size` takes away.
        steps: those of other configs that differ in nothing else, by what a step reads of them;
            another one is added.
    """
    shards = sharding(cfg, devices)
    kind = "pairs"
    if amopo.group_by_prompt:
        example = usual_row(rows) if rows else made_up_example(amopo, responses or RESPONSES)
        count = len(example.responses)
        kind = f"groups of {count} response{'s' * (count > 1)}"
    else:
        example = made_up_example(amopo, 2)
    if rows:
        largest = largest_row(rows, cfg.sequence_len)
        what = (
            f"the data's largest group ({len(largest.responses)} responses, "
            f"{len(largest.prompts)} prompts, {tokens(largest):,} tokens)"
        )
    else:
        largest = shaped(example, largest_pair(cfg.sequence_len, usual))
        what = f"{kind} that fill sequence_len ({cfg.sequence_len})"
    example = shaped(example, usual)
    batches = [micro_batch(one, cfg.micro_batch_size) for one in (example, largest)]
    steps = {} if steps is None else steps
    read = repr({name: value for name, value in cfg.items() if name not in NOT_IN_A_STEP})
    if read not in steps:
        steps[read] = run_step(cfg, config, amopo, *batches, device)
    step = steps[read]
    accumulation = cfg.gradient_accumulation_steps or 1
    micro_batches = accumulation * devices
    training = "qlora" if cfg.load_in_4bit else cfg.adapter or "full"
    pairs = pairs_in(example)
    epoch_examples = math.ceil(epoch_pairs / max(1, pairs))
    if held_out_pairs is None:
        held_out_examples = _held_out(cfg.val_set_size or 0, epoch_examples)
    else:
        held_out_examples = math.ceil(held_out_pairs / max(1, pairs))
    taken = epoch_examples + held_out_examples
    return Plan(
        model=str(cfg.base_model),
        training=training,
        sharding=shards,
        layout=step.layout,
        parameters=step.parameters,
        trainable=step.trainable,
        pairs_per_step=cfg.micro_batch_size * micro_batches * pairs,
        prompts=len(example.prompts),
        tokens_per_step=step.tokens * micro_batches,
        tokens_per_step_unshared=step.tokens_unshared * micro_batches,
        flops_per_step=step.flops * micro_batches,
        sequence_len=cfg.sequence_len,
        memory=memory(step, cfg, shards, card if device == "cuda" else None),
        card=card,
        utilisation=utilisation,
        epoch_pairs=epoch_pairs,
        largest=what,
        epoch_examples=epoch_examples,
        responses=len(example.responses),
        groups_per_step=cfg.micro_batch_size * micro_batches if amopo.group_by_prompt else None,
        whole_groups=amopo.all_responses,
        parts=step.parts,
        largest_parts=step.largest_parts,
        criteria=step.criteria,
        passes=step.passes,
        reference=step.reference,
        held_out_examples=held_out_examples,
        flops_before=step.reference_flops * taken // cfg.micro_batch_size,
        epochs=cfg.num_epochs or 1.0,
        max_steps=cfg.max_steps,
    )


def _held_out(val_set_size: float, trained: int) -> int:
    """Return how many examples are split off for evaluation, beside those that are trained."""
    if val_set_size < 1:
        return round(trained * val_set_size / (1 - val_set_size))
    return int(val_set_size)


def largest_pair(sequence_len: int, usual: PairShape) -> PairShape:
    """The pair of most tokens that `sequence_len` lets through."""
    prompt = min(SHORTEST_PROMPT, usual.prompt, sequence_len // 2)
    return PairShape(prompt, sequence_len - prompt, min(usual.beginning, prompt - 1))


def changes(cfg: Any, devices: int) -> Iterator[tuple[str, dict[str, Any], int]]:
    """What to change in a config that doesn't fit: in words, as keys, on how many devices.

    Those that cost least come first.
    """
    sharded = bool(cfg.deepspeed or cfg.fsdp_config)
    micro = cfg.micro_batch_size or 1
    if micro > 1:
        steps = (cfg.gradient_accumulation_steps or 1) * micro
        keys = {"micro_batch_size": 1, "gradient_accumulation_steps": steps}
        yield f"micro_batch_size: 1, gradient_accumulation_steps: {steps}", keys, devices
    checkpointed = (cfg.fsdp_config or {}).get("activation_checkpointing")
    if not (cfg.gradient_checkpointing or checkpointed):
        yield "gradient_checkpointing: true", {"gradient_checkpointing": True}, devices
    for text, key, value in in_parts(cfg):
        yield text, {"amopo": {**cfg.amopo, key: value}}, devices
    if not cfg.adapter and not sharded:
        keys = {"optimizer": "paged_adamw_8bit"}
        yield "optimizer: paged_adamw_8bit", keys, devices
    if cfg.adapter and not cfg.load_in_4bit and not sharded:
        keys = {"adapter": "qlora", "load_in_4bit": True}
        yield "adapter: qlora, load_in_4bit: true", keys, devices
    if devices > 1 and not sharded:
        example = "axolotl amopo configs qwen2.5-7b-8x80gb-fsdp2"
        yield f"FSDP2 (fsdp_version: 2; an example: {example})", FSDP2, devices
    if not cfg.adapter:
        yield f"adapter: lora, lora_r: {LORA['lora_r']}", LORA, devices
    if cfg.sequence_len > 512:
        half = cfg.sequence_len // 2
        yield f"sequence_len: {half}", {"sequence_len": half}, devices
    if not cfg.load_in_4bit:
        more = 2 * devices if sharded or devices > 1 else 8
        keys = {} if sharded else FSDP2
        yield f"{more} GPUs" + (" with FSDP2" if not sharded else ""), keys, more


def in_parts(cfg: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield the keys of the block that let a config's batches run in smaller parts."""
    amopo = read_block(cfg)
    several = amopo.group_by_prompt or amopo.prompt_count * (cfg.micro_batch_size or 1) > 1
    if several and not amopo.one_prompt_at_a_time:
        yield "amopo.one_prompt_at_a_time: true", "one_prompt_at_a_time", True
    if amopo.group_by_prompt and not amopo.max_tokens:
        least = max(cfg.sequence_len, cfg.eval_sequence_len or 0)
        yield f"amopo.max_tokens: {least}", "max_tokens", least


FSDP2 = {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}
LORA = {"adapter": "lora", "lora_r": 32, "lora_alpha": 64, "lora_target_linear": True}


def _changed(cfg: Any, keys: dict[str, Any]) -> DictDefault:
    return DictDefault({**cfg, **keys})  # its own `|` lets the old values win


def advise(cfg: Any, plan: Plan, again: Callable[[Any, int], Plan]) -> list[tuple[str, Plan]]:
    """Changes after which a plan fits: each alone where one suffices, else several together.

    Args:
        again: makes the plan of a changed config on a number of devices. A change for which it
            raises a ConfigError, since training would, is left out.
    """
    if plan.fits is not False:
        return []
    devices = plan.sharding.devices

    def tried(cfg: Any, devices: int) -> Iterator[tuple[str, Any, Plan]]:
        for text, keys, count in changes(cfg, devices):
            changed = _changed(cfg, keys)
            with suppress(ConfigError):
                yield text, changed, again(changed, count)

    if alone := [(text, made) for text, _, made in tried(cfg, devices) if made.fits]:
        return alone
    texts: list[str] = []
    while not plan.fits and len(texts) <= 8:
        found = next(tried(cfg, devices), None)
        if found is None:
            break
        text, cfg, plan = found
        devices = plan.sharding.devices
        texts.append(text)
    return [("; ".join(texts), plan)] if texts else []
