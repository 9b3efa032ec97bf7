"""One training step on tensors that have shapes and no contents.

The model is built from its config in torch's FakeTensorMode, adapters and precision as axolotl
sets them, and our own loss runs forward and backward over made-up pairs. So what a step computes
and keeps is read off the code that will run, for any architecture, in seconds and without memory:
every storage that comes to life is counted until it dies.
"""

import gc
from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import finalize

import torch
from axolotl.loaders.adapter import load_lora
from axolotl.loaders.model import should_convert_embedding_dtypes
from axolotl.loaders.utils import get_linear_embedding_layers
from axolotl.utils.dict import DictDefault
from axolotl.utils.lora_precision import upcast_lora_parameters
from peft import get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.config.references import INITIAL
from axolotl_amopo.example import Example
from axolotl_amopo.model.attention import PACKED_SDPA
from axolotl_amopo.model.batch import make_batch, responses
from axolotl_amopo.model.choose import candidates, cannot_share, without_dropout
from axolotl_amopo.model.forest import Forest
from axolotl_amopo.model.forward import TokenLogps, causal_model, response_logps, teach
from axolotl_amopo.model.layout import LayoutName
from axolotl_amopo.model.parts import Batch, replayed_loss, split_batch, together
from axolotl_amopo.objectives import Outcome, Responses, example_losses
from axolotl_amopo.training.gradients import criterion_losses, directions, shares_of_loss
from axolotl_amopo.training.reference import AdapterOff, Precomputed, initial_reference

# Attention on a CPU, which torch's counter doesn't know: as it counts the GPU's.
FLOPS_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value)
    ),
}
FORMULAS = FlopCounterMode(display=False, custom_mapping=FLOPS_ON_CPU).flop_registry


@dataclass(frozen=True)
class PairShape:
    """Tokens of a pair: each of its K prompts (with its instruction), and each response."""

    prompt: int
    response: int
    # What the K prompts have in common before they differ: the chat template's beginning, or the
    # whole question where the instruction comes after it.
    beginning: int = 0


@dataclass(frozen=True)
class Moment:
    """Bytes that live at one time beside the weights."""

    activations: int  # what the trunk keeps for the backward pass
    logits: int  # what head and loss keep
    working: int  # recomputation, gradients of activations, and the like
    gradients: int  # of weights


@dataclass(frozen=True)
class Step:
    """What one micro batch costs on one device, nothing sharded. Sizes in bytes."""

    layout: LayoutName
    parameters: int
    trainable: int
    weights: int  # in the precision they are kept in; with an adapter, the frozen ones
    trained: int  # weights that are trained; their gradients take as much
    largest_unit: int  # weights of the largest layer, or of all outside the layers
    unpacked: int  # the largest quantised weight as it is unpacked for a product
    # The fullest before and after the first layer's gradients are there: which of them is the
    # fuller depends on how gradients are sharded.
    moments: tuple[Moment, Moment]
    flops: int
    tokens: int  # through the model
    tokens_unshared: int  # the same pairs with a prompt for every response
    parts: int = 1  # that the micro batch runs in, each of them forward once more
    largest_parts: int = 1  # the same of the largest one
    # Where the criteria's gradients are combined: how many are kept apart, and how many backward
    # passes a micro batch needs for them.
    criteria: int = 0
    passes: int = 1
    largest_passes: int = 1
    largest_trained: int = 0  # numbers in the largest weight that is trained
    # What supplies the reference's log-probabilities: "adapter off", a pass that `flops` has, or
    # "precomputed", a pass before training that takes so many.
    reference: str = ""
    reference_flops: int = 0


def run_step(
    cfg: Any,
    config: PreTrainedConfig,
    amopo: AMoPOConfig,
    usual: Batch,
    largest: Batch,
    device: str,
) -> Step:
    """Simulate forward and backward of two micro batches.

    Layers that are all alike cost alike, so few of them run and the rest is extrapolated.

    Args:
        cfg: axolotl's validated config.
        config: the model's.
        usual: the batch whose tokens and FLOPs are counted, as the collator makes it.
        largest: the batch whose memory is.
        device: `cuda` or `cpu`, which decides the layout; nothing runs there.
    """
    if "reference" in amopo.needs:  # see `turn_dropout_off`
        cfg = DictDefault({**cfg, "lora_dropout": 0.0})
    model = model_on_meta(cfg, config)
    causal = causal_model(model)
    layout = _choose(causal, cfg, amopo, torch.device(device))
    reference = _reference(cfg, amopo, model)
    passes, largest_passes = (backward_passes(batch, amopo) for batch in (usual, largest))
    if "gradients" not in amopo.needs:  # steps whose gradients are compared are few
        passes = 1
    kept_apart = "gradients" in amopo.needs or amopo.gradient_cosines
    forest = usual["forest"]
    unshared = sum(forest.count(forest.path(leaf.segment)) for leaf in forest.leaves)
    parts, largest_parts = (_parts(batch, amopo, layout) for batch in (usual, largest))
    # Parts that are all alike cost alike, so each kind runs once.
    kinds: dict[tuple, list[Batch]] = {}
    for part in parts:
        kinds.setdefault(_shape(part), []).append(part)
    # The fullest is when the largest part runs and others have left gradients.
    fullest = [max(largest_parts, key=_tokens)] * min(2, len(largest_parts))

    layers = _layers(causal)
    period = _period(cfg, config, layers)
    # FLOPs grow by the layer from the first on; the fullest moment needs one that is neither first
    # nor last.
    flops_of, moments_of = (period, 2 * period), (2 * period, 3 * period)
    if len(layers) <= 3 * period:
        flops_of = moments_of = (len(layers),)
    # By the number of layers.
    flops, reference_flops = dict.fromkeys(flops_of, 0), dict.fromkeys(flops_of, 0)
    moments: dict[int, list[Counter[str]]] = {}
    for count in sorted({*flops_of, *moments_of}):
        short = build_model(cfg, shortened(config, count))
        simulation = _Simulation(short, cfg, amopo, layout, reference)
        if count in moments_of:
            with LiveMemory(short) as memory:
                replayed = len(largest_parts) > 1
                simulation.step(largest, fullest, largest_passes, memory, replayed=replayed)
            moments[count] = memory.peaks
            short.zero_grad()
        for alike in kinds.values() if count in flops_of else ():
            with CountedFlops() as counter:
                simulation.step(usual, alike[:1], passes, replayed=len(parts) > 1)
            flops[count] += counter.total * len(alike)
            if isinstance(reference, Precomputed):
                with CountedFlops() as counter:
                    simulation.precompute(alike[:1])
                reference_flops[count] += counter.total * len(alike)

    def extrapolate(values: Mapping[int, int]) -> int:
        (first, low), (last, high) = min(values.items()), max(values.items())
        return low + (high - low) * (len(layers) - first) // max(1, last - first)

    def at_peak(phase: int) -> Moment:
        sizes = {
            field.name: {count: peaks[phase][field.name] for count, peaks in moments.items()}
            for field in fields(Moment)
        }
        return Moment(**{kind: max(0, extrapolate(values)) for kind, values in sizes.items()})

    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    kept = parameters if not cfg.adapter else [p for p in parameters if not p.requires_grad]
    quantised = _quantised(causal, cfg)
    # Units that are gathered whole when the model is sharded: a layer each, and the rest.
    units = [sum(map(_bytes, layer.parameters())) for layer in layers]
    units.append(sum(map(_bytes, causal.parameters())) - sum(units))
    return Step(
        layout=layout,
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in trained),
        weights=sum(quantised.get(id(p)) or _bytes(p) for p in kept),
        trained=sum(map(_bytes, trained)),
        largest_unit=max(units),
        unpacked=max((_bytes(p) for p in parameters if id(p) in quantised), default=0),
        moments=(at_peak(0), at_peak(1)),
        flops=extrapolate(flops),
        tokens=sum(map(_tokens, parts)),
        tokens_unshared=unshared,
        parts=len(parts),
        largest_parts=len(largest_parts),
        criteria=len(amopo.criteria) if kept_apart else 0,
        passes=passes,
        largest_passes=largest_passes,
        largest_trained=max(p.numel() for p in trained),
        reference={AdapterOff: "adapter off", Precomputed: "precomputed"}.get(type(reference), ""),
        reference_flops=extrapolate(reference_flops),
    )


def _reference(cfg: Any, amopo: AMoPOConfig, model: nn.Module) -> AdapterOff | Precomputed | None:
    """Return what will supply the log-probabilities of the model as training finds it, if anything.

    Those of other models were taken beforehand, and cost a run nothing.
    """
    if INITIAL not in amopo.references:
        return None
    # Of a trainer it reads these two.
    return initial_reference(SimpleNamespace(axolotl_cfg=cfg, model=model))


def backward_passes(batch: Batch, amopo: AMoPOConfig) -> int:
    """Return how many backward passes a micro batch needs; several where gradients are combined,
    or, at some steps, compared (`gradient_cosines`).

    Which of the criteria's gradients are multiples of one another is seen on random numbers, as
    many times as make chance unlikely: where those are, all are.
    """
    combined = "gradients" in amopo.needs
    if not (combined or amopo.gradient_cosines):
        return 1
    forest = batch["forest"]
    shape = forest.examples, forest.prompts, forest.responses
    random = partial(torch.rand, generator=torch.Generator().manual_seed(0))

    def passes() -> int:
        logps = random(*shape, 2).neg().requires_grad_()
        others = random(batch["signs"].shape) < 0.5  # where the other response wins
        given = responses(
            batch
            | {"signs": torch.where(others, -batch["signs"], batch["signs"])}
            | {"ratings": random(batch["ratings"].shape)},
            logps,
            torch.ones_like(logps, dtype=torch.bool),
            weights=torch.ones(batch["points"].shape),
            reference=-random(1, *shape),
        )
        of_criteria = criterion_losses if combined else shares_of_loss
        losses = of_criteria(_outcome(amopo, given), given)
        return len(directions(_gradients_of(losses, logps)))

    return max(passes() for _ in range(10))


def _outcome(amopo: AMoPOConfig, given: Responses) -> Outcome:
    """Return what the objective and its settings make of responses, without draws."""
    outcome = amopo.make_objective()(given, None)
    for setting in amopo.make_settings():
        outcome = setting(outcome, given)
    return outcome


def _gradients_of(losses: Tensor, logps: Tensor) -> Tensor:
    """Return [C, B, K, N, T], the gradient of each criterion's loss."""
    grads = (torch.autograd.grad(one, logps, retain_graph=True)[0] for one in losses)
    return torch.stack(list(grads))


def _parts(batch: Batch, amopo: AMoPOConfig, layout: LayoutName) -> list[Batch]:
    """Return what a batch runs in, as the trainer splits it."""
    parts = split_batch(batch, amopo.max_tokens, one_prompt=amopo.one_prompt_at_a_time)
    # As rows of a tree that shares nothing: it takes the same room.
    return [_unshared(part) for part in parts] if layout == "sequences" else parts


def _tokens(part: Batch) -> int:
    return sum(part["forest"].lengths)


def _shape(part: Batch) -> tuple:
    """Return what decides what a part costs, whichever example it is of."""
    forest = part["forest"]
    leaves = [(leaf.segment, len(leaf.prompts)) for leaf in forest.leaves]
    return tuple(forest.parents), tuple(forest.lengths), tuple(leaves)


class _Simulation:
    """What the trainer does with a micro batch, on a model of fake tensors."""

    def __init__(
        self,
        model: nn.Module,
        cfg: Any,
        amopo: AMoPOConfig,
        layout: LayoutName,
        reference: AdapterOff | Precomputed | None,
    ):
        self.model, self.cfg, self.amopo, self.reference = model, cfg, amopo, reference
        self.laid_out: LayoutName = "packed" if layout == "packed" else "tree"
        causal = causal_model(model)
        if cfg.gradient_checkpointing or (cfg.fsdp_config or {}).get("activation_checkpointing"):
            options = cfg.gradient_checkpointing_kwargs or {"use_reentrant": False}
            causal.gradient_checkpointing_enable(dict(options))
        if layout == "packed":
            causal.set_attn_implementation(PACKED_SDPA)
        model.train()
        teach(model)

    def step(
        self,
        batch: Batch,
        parts: list[Batch],
        passes: int = 1,
        memory: "LiveMemory | None" = None,
        *,
        replayed: bool,
    ) -> None:
        """Run forward and backward.

        Args:
            batch: what the loss is of.
            parts: of the batch, those to run.
            passes: backward ones, where the criteria's gradients are combined.
            memory: is told when a backward pass begins.
            replayed: whether the batch has several parts, each of which then runs forward twice.
        """
        reference = self._reference_sums(batch, parts)
        weights = torch.ones(batch["points"].shape)

        def judge(found: TokenLogps) -> tuple[Responses, Outcome]:
            logps, mask, _ = found
            sums = torch.zeros(1, *logps.shape[:3]) if reference is None else reference
            given = responses(batch, logps, mask, weights=weights, reference=sums)
            return given, _outcome(self.amopo, given)

        def loss_of(found: TokenLogps) -> Tensor:
            given, outcome = judge(found)
            return example_losses(outcome, given).mean()

        def backward(loss: Callable[[], Tensor], **options: bool) -> None:
            value = loss()
            if memory is not None:
                memory.kind = "working"
            gc.freeze()  # so that collecting looks at little
            value.backward(**options)
            gc.unfreeze()

        if replayed:
            loss = replayed_loss(parts, self._forward, loss_of, backward)
            backward(lambda: loss)
            return
        (part,) = parts
        if "gradients" in self.amopo.needs or passes > 1:
            self._combined(part, judge, backward, passes)
            return
        loss = loss_of(self._forward(part))
        backward(lambda: loss)

    def _combined(self, part: Batch, judge: Callable, backward: Callable, passes: int) -> None:
        """Run as many backward passes as the criteria's gradients need, see `CombinedGradients`.

        What is summed up of them is not kept here.
        """
        again = bool(self.cfg.fsdp_config)
        found = self._forward(part)
        logps = found.logps.detach().requires_grad_()
        given, outcome = judge(found._replace(logps=logps))
        of_criteria = criterion_losses if "gradients" in self.amopo.needs else shares_of_loss
        wanted = _gradients_of(of_criteria(outcome, given), logps)
        for number, direction in enumerate(wanted[:passes], start=1):
            loss = (found.logps * direction).sum()
            backward(lambda loss=loss: loss, retain_graph=number < passes and not again)
            self.model.zero_grad()
            if again and number < passes:
                found = self._forward(part)

    def precompute(self, parts: list[Batch]) -> None:
        """Take the reference's log-probabilities of the model as it is, before the first step."""
        with torch.no_grad(), without_dropout(self.model):
            self._run(parts)

    def _reference_sums(self, batch: Batch, parts: list[Batch]) -> Tensor | None:
        if not isinstance(self.reference, AdapterOff):
            return None
        return self.reference.sums(self.model, batch, lambda _: self._run(parts))

    def _run(self, parts: list[Batch]) -> TokenLogps:
        return together([self._forward(part) for part in parts])

    def _forward(self, part: Batch) -> TokenLogps:
        # As accelerate wraps it: the casts of weights last no longer.
        enabled = bool(self.cfg.bf16 or self.cfg.fp16)
        with torch.autocast("cpu", dtype=_dtype(self.cfg), enabled=enabled):
            return response_logps(self.model, part, self.laid_out)


def _layers(causal: PreTrainedModel) -> nn.ModuleList:
    return next(module for module in causal.modules() if isinstance(module, nn.ModuleList))


def _period(cfg: Any, config: PreTrainedConfig, layers: nn.ModuleList) -> int:
    """After how many layers they repeat themselves; all of them where they don't."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or [""] * len(layers)
    shapes = [[p.shape for p in layer.parameters()] for layer in layers]
    facts = list(zip(kinds, shapes, strict=True))
    if cfg.peft_layers_to_transform:
        return len(layers)
    return next(p for p in range(1, len(facts) + 1) if facts[p:] == facts[:-p])


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return a model's config with its first layers alone."""
    config = deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def build_model(cfg: Any, config: PreTrainedConfig, device: str = "cpu") -> nn.Module:
    """Return `model_on_meta` with fake tensors, which know a device."""
    model = model_on_meta(cfg, config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device)
        causal_model(model).tie_weights()
    return model


def model_on_meta(cfg: Any, config: PreTrainedConfig) -> nn.Module:
    """Return the model in the precision and with the adapters that axolotl 0.21 gives it.

    Quantised weights stand here in 16 bits, as they are computed with.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=_dtype(cfg), attn_implementation="sdpa"
        )
        # axolotl keeps these in float32; DeepSpeed casts them back.
        if not (should_convert_embedding_dtypes(cfg) or cfg.deepspeed):
            ends = get_linear_embedding_layers(config.model_type)
            for name, module in model.named_modules():
                is_end = any(end in name for end in ends) and hasattr(module, "weight")
                if "norm" in name or is_end:
                    module.to(torch.float32)
        if cfg.adapter:
            model.enable_input_require_grads()
            options = {}
            if cfg.peft_autocast_adapter_dtype is not None:
                options["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
            model = get_peft_model(model, load_lora(model, cfg, config_only=True)[1], **options)
            if cfg.lora_fp32_gradients:
                upcast_lora_parameters(model)
        causal_model(model).tie_weights()
    return model


def _dtype(cfg: Any) -> torch.dtype:
    return torch.bfloat16 if cfg.bf16 else torch.float16 if cfg.fp16 else torch.float32


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _quantised(causal: PreTrainedModel, cfg: Any) -> dict[int, int]:
    """Bytes of the weights that bitsandbytes packs, by the id of the parameter."""
    if not (cfg.load_in_4bit or cfg.load_in_8bit):
        return {}
    weights = [
        module.weight
        for module in causal.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
    ]
    head = causal.get_output_embeddings()
    packed = {}
    for weight in weights:
        if weight is head.weight:
            continue
        # 4 bits: half a byte, a byte for every 64 weights, and a float for every 256 of those;
        # 8 bits: a byte, and a float for every row.
        count, rows = weight.numel(), weight.shape[0]
        packed[id(weight)] = (
            int(count * (1 / 2 + 1 / 64 + 4 / 64 / 256)) if cfg.load_in_4bit else (count + 4 * rows)
        )
    return packed


def shaped(example: Example, shape: PairShape) -> Example:
    """Return an example with made-up tokens, as many as the shape says."""
    rest = shape.prompt - shape.beginning
    return replace(
        example,
        prompts=[[0] * shape.beginning + [1 + x] * rest for x, _ in enumerate(example.prompts)],
        responses=[[0] * shape.response for _ in example.responses],
    )


def micro_batch(example: Example, count: int) -> Batch:
    """Return a batch that has an example so many times, as the collator makes it."""
    return make_batch([example] * count, pad_to_multiple_of=8)


def _unshared(batch: Batch) -> Batch:
    forest = batch["forest"]
    apart = Forest(
        forest.examples,
        forest.prompts,
        forest.responses,
        longest_response=forest.longest_response,
    )
    for leaf in forest.leaves:
        prompt = forest.count(forest.path(leaf.segment)[:-1])
        apart.parents += [-1, len(apart.parents)]
        apart.lengths += [prompt, forest.lengths[leaf.segment]]
        apart.leaves.append(leaf._replace(segment=len(apart.parents) - 1))
    tokens = torch.zeros(1, sum(apart.lengths), dtype=torch.long)
    return batch | {"forest": apart, "input_ids": tokens, "position_ids": tokens}


def _choose(
    causal: PreTrainedModel, cfg: Any, amopo: AMoPOConfig, device: torch.device
) -> LayoutName:
    """The layout that training will choose if nothing unforeseen turns up in its proof."""
    implementation = cfg.attn_implementation or "sdpa"
    config = causal.config.get_text_config()
    if amopo.share_prompt is False or cannot_share(type(causal), config, implementation):
        return "sequences"
    return candidates(implementation, device, bool(cfg.torch_compile))[0]


class CountedFlops(TorchDispatchMode):
    """Count FLOPs by the formulas of torch's FlopCounterMode.

    That one counts per module too, which takes it longer than a step of fake tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        if formula := FORMULAS.get(func.overloadpacket):
            self.total += formula(*args, **kwargs or {}, out_val=result)
        return result


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that live, by kind, and what they were when they were most.

    A storage is `activations` if the trunk's forward makes it, `logits` if what follows in the
    forward does, `gradients` once it is a parameter's, else `working`. Storages of the model are
    not counted.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.kind = "activations"
        self.live: Counter[str] = Counter()
        self.peaks: list[Counter[str]] = [Counter(), Counter()]
        self.phase = 0
        # Those of the model have no kind.
        self._kinds: dict[int, str] = {
            tensor.untyped_storage()._cdata: ""
            for tensor in [*model.parameters(), *model.buffers()]
        }
        causal = causal_model(model)
        trunk = causal.base_model
        self._hooks = [
            trunk.register_forward_pre_hook(self._begin),
            trunk.register_forward_hook(lambda *_: setattr(self, "kind", "logits")),
        ]
        self._hooks += [x.register_forward_pre_hook(self._collect) for x in _layers(causal)]
        in_layers = set(map(id, _layers(causal).parameters()))
        for parameter in model.parameters():
            if parameter.requires_grad:
                hook = partial(self._is_gradient, in_layer=id(parameter) in in_layers)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._kinds:
            return
        size = storage.nbytes()
        self._kinds[key] = self.kind
        self.live[self.kind] += size
        finalize(storage, self._forget, key, size)
        if self.live.total() > self.peaks[self.phase].total():
            self.peaks[self.phase] = self.live.copy()

    def _forget(self, key: int, size: int) -> None:
        self.live[self._kinds.pop(key)] -= size

    def _begin(self, *_: Any) -> None:
        if self.kind == "working":  # the part before this one is done
            gc.collect()
        self.kind = "activations"

    def _collect(self, *_: Any) -> None:
        # Before a layer runs again: what the one behind it has left hangs in cycles here.
        if self.kind == "working":
            gc.collect()

    def _is_gradient(self, parameter: nn.Parameter, in_layer: bool) -> None:
        storage = parameter.grad.untyped_storage()
        key = storage._cdata
        if (kind := self._kinds.get(key)) not in (None, "gradients"):
            self.live[kind] -= storage.nbytes()
            self.live["gradients"] += storage.nbytes()
            self._kinds[key] = "gradients"
        self.phase = max(self.phase, int(in_layer))
