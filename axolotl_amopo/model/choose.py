"""Which layout a model can take: decided from its config, then proven on a few tokens.

A layout that shares prompts is right only where every layer follows the mask and the positions
it is given. The config tells most of the models that don't; all others have to show it, on the
model that is trained, wrapped and patched as it will be:

    numbers    a layout's log-probabilities are those of plain sequences, but for rounding
    leak       other tokens in one response change nothing for the others
    training   forward and backward run in training mode

What rounding explains is measured where it is large. In 16 bits two computations of the same
numbers, such as one with other kernels, differ by hundredths of a nat, and a model of one size or
depth differs from another; so the plain sequences run again, nudged by as much as rounding does.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.example import Example
from axolotl_amopo.model.attention import PACKED_SDPA, layer_types, packed_name
from axolotl_amopo.model.batch import make_batch
from axolotl_amopo.model.forward import causal_model, response_logps, unwrap
from axolotl_amopo.model.layout import LayoutName

# Attention that takes a prepared 4D mask.
MASKED = ("sdpa", "eager", "flex_attention")
# Differences of log-probabilities, in nats: the root of their mean square. What rounding explains
# in 32 bits; a token seen that shouldn't be, or a wrong position, costs tenths.
TOLERANCE = 1e-3
# In 16 bits: so many times what was measured (tests/test_real_model.py has what sound layouts and
# faults show), and what is taken where nothing could be.
NOISE_FACTOR, UNMEASURED = 1.4, 0.15
# So many times what a change in one response moves the others by where nothing is shared.
LEAK_FACTOR = 1.6


class Choice(NamedTuple):
    """How batches go through the model."""

    layout: LayoutName
    own_logits: bool  # whether the logits must be made by the model's own forward
    why_own_logits: str = ""  # empty where they need not
    why_unshared: str = ""  # why prompts are not shared; empty where they are, or shall not be
    why_not_cheaper: str = ""  # why not in a cheaper layout; empty where they are in the cheapest


def choose_layout(
    model: nn.Module,
    batch: dict[str, Any],
    share_prompt: bool | str,
    *,
    agree: Callable[[Tensor], Tensor] = lambda worst: worst,
    autocast: torch.dtype | None = None,
    compiled: bool = False,
) -> Choice:
    """Return the cheapest layout that gives the numbers of plain sequences under the model's own
    forward.

    Args:
        model: as the trainer wraps it, after `teach`.
        batch: any real batch; its tokens are drawn from, so that they mean something to the model.
        share_prompt: `amopo.share_prompt`.
        agree: reduces a number to its maximum over all processes, so that they choose alike.
        autocast: the type that autocast computes in, whatever the weights are; None without it.
        compiled: whether torch.compile runs the model; it would compile every packed batch anew.

    In training mode, with gradients on, a backward pass is part of the proof. It leaves the
    parameters' gradients as they were. Where a GPU gets the `tree` layout, cuDNN's attention is
    turned off: it plans anew for every shape, and nearly every batch is a new one.

    Raises:
        AMoPOError: with `share_prompt` true, where the model can't, and where it can't even run
            plain sequences; says why.
    """
    proof = _Proof(model, batch, agree, autocast)
    why_own_logits = proof.failure("sequences", own_logits=False)
    own_logits = bool(why_own_logits)
    if share_prompt is False:
        return Choice("sequences", own_logits, why_own_logits)

    causal = causal_model(unwrap(model))
    config = causal.config.get_text_config()
    implementation = str(config._attn_implementation)
    reason = cannot_share(type(causal), config, implementation)
    passed_over = ""
    if not reason:
        for layout in candidates(implementation, proof.device, compiled):
            with _Attention(causal, layout) as attention:
                reason = (
                    proof.failure(layout, own_logits)
                    or proof.leak(layout, own_logits)
                    or proof.training(layout, own_logits)
                )
                attention.keep = not reason
            if not reason:
                if layout == "tree" and proof.device.type == "cuda":
                    torch.backends.cuda.enable_cudnn_sdp(False)
                return Choice(layout, own_logits, why_own_logits, why_not_cheaper=passed_over)
            passed_over = reason
    if share_prompt is True:
        raise refusal(reason)
    return Choice("sequences", own_logits, why_own_logits, reason)


def cannot_share(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, implementation: str
) -> str:
    """Return why a model's class, config or attention rules sharing out; empty if nothing does."""
    if model_class._is_stateful:
        return f"{model_class.__name__} carries a state from token to token"
    unknown = set(layer_types(config)) - {"full_attention", "sliding_attention"}
    if unknown:
        return f"{model_class.__name__} has layers of another kind ({', '.join(sorted(unknown))})"
    if implementation not in MASKED and packed_name(implementation) is None:
        return f"attention implementation {implementation} takes no mask"
    return ""


def candidates(
    implementation: str, device: torch.device, compiled: bool = False
) -> list[LayoutName]:
    """Return layouts worth trying with an attention implementation, best first."""
    if implementation not in ("sdpa", PACKED_SDPA):
        return ["packed"] if packed_name(implementation) else ["tree"]
    # A GPU has one kernel for all segments, and on a CPU one call per segment is cheap; elsewhere
    # one call with a mask is preferred.
    packed = device.type in ("cpu", "cuda") and not compiled
    return ["packed", "tree"] if packed else ["tree"]


def refusal(reason: str) -> AMoPOError:
    """Return the error of `share_prompt: true` with a model that can't share prompts."""
    return AMoPOError(
        f"amopo.share_prompt: true can't work with this model: {reason}. Write auto or false, or "
        "choose attn_implementation: sdpa if that is the reason."
    )


class _Attention:
    """The model's attention as a layout needs it; put back unless `keep` is set."""

    def __init__(self, causal: PreTrainedModel, layout: LayoutName):
        self.causal = causal
        self.before = str(causal.config.get_text_config()._attn_implementation)
        self.needed = self.before
        if layout == "packed":
            self.needed = packed_name(self.before) or self.before
        elif self.before == PACKED_SDPA:  # an earlier choice, which this one replaces
            self.needed = "sdpa"
        self.keep = False

    def __enter__(self) -> "_Attention":
        if self.needed != self.before:
            self.causal.set_attn_implementation(self.needed)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.needed != self.before and not self.keep:
            self.causal.set_attn_implementation(self.before)


class _Proof:
    """Compares layouts on a few real tokens: without dropout, and without gradients but for
    `training`."""

    def __init__(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        agree: Callable[[Tensor], Tensor],
        autocast: torch.dtype | None,
    ):
        self.model = model
        self.agree = agree
        self.device = batch["input_ids"].device
        self.causal = causal_model(unwrap(model))
        # By name, and now: under FSDP2 other tensors stand there behind a forward pass.
        self.grads = {name: p.grad for name, p in model.named_parameters()}
        self.computes_in = autocast or self.causal.dtype
        rounding = _rounding(self.computes_in, self.device, self.causal)
        self.example = _sample(batch, responses=4 if rounding else 2)
        self.other = _with_another_response(self.example, batch["input_ids"].unique().tolist())
        try:
            self.reference = self._logps("sequences", True)
            self.allowed = TOLERANCE
            if rounding:
                noise = self._noise(rounding)
                self.allowed = max(TOLERANCE, NOISE_FACTOR * noise if noise else UNMEASURED)
            self.leaks = self._leak("sequences", True)
        except Exception as error:  # whatever a model does
            raise AMoPOError(
                f"The model fails on a small batch of plain sequences, with {_in_a_line(error)}"
            ) from error

    def _run(self, layout: LayoutName, own_logits: bool, example: Example | None = None) -> Tensor:
        """Return log-probabilities [1, K, N, T]; 0 behind a response's end."""
        batch = make_batch([example or self.example], pad_to_multiple_of=16)
        moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return response_logps(
            self.model, moved, layout, own_logits=own_logits, dtype=self.computes_in
        )[0]

    def _logps(self, *args: Any) -> Tensor:
        with torch.no_grad(), without_dropout(self.model):
            return self._run(*args)

    def _noise(self, rounding: float) -> float:
        """Return by how much rounding changes the reference.

        What is nudged at the bottom is rounded otherwise in all layers above, so the size of the
        nudge matters little.
        """
        generator = torch.Generator().manual_seed(0)

        def nudge(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
            signs = torch.randint(0, 2, embedded.shape, generator=generator) * 2 - 1
            factors = 1 + rounding * signs.to(embedded.device, torch.float32)
            return (embedded.float() * factors).to(embedded.dtype)

        handle = self.causal.get_input_embeddings().register_forward_hook(nudge)
        try:
            nudged = [self._logps("sequences", True) for _ in range(2)]
        finally:
            handle.remove()
        squares = [self._distance(logps).square() for logps in nudged]
        return self._agreed(torch.stack(squares).mean().sqrt())

    def _distance(self, logps: Tensor) -> Tensor:
        """Return by how much log-probabilities differ from the reference, all responses together.

        Of a single one, where few tokens decide, rounding alone can show twice as much.
        """
        return self._by_response(logps - self.reference).square().mean().sqrt()

    def _by_response(self, differences: Tensor) -> Tensor:
        """Return [N], the root of the mean square of [1, K, N, T]."""
        lengths = differences.new_tensor([len(ids) for ids in self.example.responses])
        prompts = len(self.example.follows)
        return (differences.square().sum((0, 1, 3)) / (prompts * lengths)).sqrt()

    def failure(self, layout: LayoutName, own_logits: bool) -> str:
        """Return how a layout's numbers differ from the reference; empty where they don't."""
        return self._try(
            lambda: self._distance(self._logps(layout, own_logits)),
            self.allowed,
            f"the {layout} layout gives other log-probabilities"
            if layout != "sequences"
            else "log-probabilities from the head's chunks differ from the model's own",
            f"{layout} layout",
        )

    def leak(self, layout: LayoutName, own_logits: bool) -> str:
        """Return a sentence where other responses see the first one, else nothing.

        A much finer test than the comparison: the same kernels over the same shapes. Only what
        is scaled by the whole batch changes without being seen (8-bit products), in the plain
        sequences too.
        """
        return self._try(
            lambda: self._leak(layout, own_logits),
            max(TOLERANCE / 10, LEAK_FACTOR * self.leaks.nan_to_num().item()),
            f"in the {layout} layout one response sees the other",
            f"{layout} layout",
        )

    def _leak(self, layout: LayoutName, own_logits: bool) -> Tensor:
        before, after = (
            self._logps(layout, own_logits, example) for example in (self.example, self.other)
        )
        return self._by_response(after - before)[1:].max()

    def training(self, layout: LayoutName, own_logits: bool) -> str:
        """Return how a pass in training mode fails; empty where it doesn't, or nobody trains."""
        if not (self.model.training and torch.is_grad_enabled()) or _takes_gradients(self.model):
            return ""

        def run() -> Tensor:
            devices = [self.device] if self.device.type == "cuda" else []
            no_sync: Any = getattr(self.model, "no_sync", nullcontext)  # of DDP
            self._set_grads({})
            try:
                with no_sync(), torch.random.fork_rng(devices):
                    self._run(layout, own_logits).mean().backward()
            finally:
                self._set_grads(self.grads)
            return torch.zeros((), device=self.device)

        return self._try(run, TOLERANCE, "", f"{layout} layout, in training,")

    def _set_grads(self, grads: dict[str, Tensor | None]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.grad = grads.get(name)

    def _try(self, difference: Callable[[], Tensor], allowed: float, what: str, layout: str) -> str:
        reason = ""
        try:
            worst = difference().nan_to_num(torch.inf)
        except Exception as error:  # whatever a model does with a mask it can't take
            worst = torch.tensor(torch.inf, device=self.device)
            reason = f"the {layout} fails with {_in_a_line(error)}"
        worst = self._agreed(worst / allowed) * allowed
        if worst <= allowed:
            return ""
        return reason or f"{what} (by {worst:.2g} nats, {allowed:.2g} allowed)"

    def _agreed(self, number: Tensor) -> float:
        return self.agree(number.float().reshape(1)).item()


def _in_a_line(error: Exception) -> str:
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first}"


def _rounding(dtype: torch.dtype, device: torch.device, causal: PreTrainedModel) -> float:
    """Return the relative size of a rounding step, 0 where rounding is negligible.

    A quantised model's is at least that of its activations.
    """
    if dtype.itemsize < 4:
        return torch.finfo(dtype).eps
    in_32_bits = torch.get_float32_matmul_precision() == "highest" or device.type != "cuda"
    return 0.0 if in_32_bits and not getattr(causal, "is_quantized", False) else 2.0**-10


def _sample(batch: dict[str, Any], responses: int) -> Example:
    """Return an example of a batch's own tokens: real text, which is hardly sensitive to rounding
    where a model knows what follows.

    Its lengths are odd, its prompts have a common beginning that is long enough to be shared, and
    every prompt has all the responses.
    """
    forest = batch["forest"]
    pieces = batch["input_ids"].flatten().cpu().split(forest.lengths)
    *above, _ = forest.path(forest.leaves[0].segment)
    prompt = [token for segment in above for token in pieces[segment].tolist()]
    answers = [pieces[leaf.segment].tolist() for leaf in forest.leaves[:2]]

    def part(tokens: Sequence[int], start: int, count: int) -> list[int]:
        return list(islice(cycle(tokens), start, start + count))

    places = range(responses)
    return Example(
        prompts=[part(prompt, 0, 24), part(prompt, 0, 19) + part(prompt, 31, 2)],
        responses=[part(answers[n % len(answers)], n // 2 * 28, 28 - n) for n in places],
        follows=[[0] * responses, [1] * responses],
        comparisons=[(0, n) for n in places[1:]],
        reads=[[0, 1]] * (responses - 1),
        signs=[[1, 1]] * (responses - 1),
        ratings=[[0.0, 0.0]] * responses,
        points=[1.0, 1.0],
    )


def _with_another_response(example: Example, vocabulary: list[int]) -> Example:
    """Return the example with other tokens, of the same number, in its first response."""
    following = dict(zip(vocabulary, [*vocabulary[1:], vocabulary[0]], strict=True))
    first, *others = example.responses
    return replace(example, responses=[[following[token] for token in first], *others])


def _takes_gradients(model: nn.Module) -> bool:
    """Return whether somebody acts on gradients as they come: a DeepSpeed engine, FSDP2, which may
    be told to keep them, an optimizer that steps in the backward pass."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return True
    hooked = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return hasattr(model, "backward") or any(
        getattr(p, name, None) for p in model.parameters() for name in hooked
    )


@contextmanager
def without_dropout(model: nn.Module) -> Generator[None]:
    """Put a model into evaluation mode as far as that is free of consequences."""
    # Not model.eval(): in evaluation mode, on some CPUs, bitsandbytes repacks 4-bit weights for
    # good in a way that can't be trained. Only a module's own parameters are looked at: a weight
    # that is computed (PEFT's of its base layer, axolotl's of NF4 shards) can't be outside forward.
    training = [
        module
        for module in model.modules()
        if module.training
        and not any(hasattr(p, "quant_state") for p in module.parameters(recurse=False))
    ]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
