"""Which layout a model can take: decided from its config, then proven on a few tokens.

A layout that shares prompts is right only where every layer follows the mask and the positions
it is given. The config tells most of the models that don't; all others have to show it, on the
model that is trained, wrapped and patched as it will be.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.example import pair
from axolotl_amopo.model.attention import FLASH, PACKED, layer_types
from axolotl_amopo.model.batch import make_batch
from axolotl_amopo.model.forward import causal_model, response_logps, unwrap
from axolotl_amopo.model.layout import LayoutName

# Attention that takes a prepared 4D mask.
MASKED = ("sdpa", "eager", "flex_attention")
# Mean difference of log-probabilities, in nats, that rounding explains in 32 and in 16 bits. A
# token seen that shouldn't be, or a wrong position, costs tenths of a nat.
TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2


class Choice(NamedTuple):
    """How batches go through the model."""

    layout: LayoutName
    own_logits: bool  # whether the logits must be made by the model's own forward
    why_own_logits: str = ""  # empty where they need not
    why_unshared: str = ""  # why prompts are not shared; empty where they are, or shall not be


def choose_layout(
    model: nn.Module,
    batch: dict[str, Any],
    share_prompt: bool | str,
    *,
    agree: Callable[[Tensor], Tensor] = lambda worst: worst,
    half_precision: bool = False,
    compiled: bool = False,
) -> Choice:
    """Return the cheapest layout that gives the numbers of plain sequences under the model's own
    forward.

    Args:
        model: as the trainer wraps it, after `teach`.
        batch: any real batch; its tokens are drawn from, so that they mean something to the model.
        share_prompt: `amopo.share_prompt`.
        agree: reduces a number to its maximum over all processes, so that they choose alike.
        half_precision: whether autocast computes in 16 bits, whatever the weights are.
        compiled: whether torch.compile runs the model; it would compile every packed batch anew.

    Raises:
        AMoPOError: with `share_prompt` true, where the model can't; says why.
    """
    proof = _Proof(model, batch, agree, half_precision)
    why_own_logits = proof.failure("sequences", own_logits=False)
    own_logits = bool(why_own_logits)
    if share_prompt is False:
        return Choice("sequences", own_logits, why_own_logits)

    causal = causal_model(unwrap(model))
    config = causal.config.get_text_config()
    implementation = str(config._attn_implementation)
    reason = cannot_share(type(causal), config, implementation)
    if not reason:
        for layout in candidates(implementation, proof.device, compiled):
            with _Attention(causal, layout) as attention:
                reason = proof.failure(layout, own_logits) or proof.leak(layout, own_logits)
                attention.keep = not reason
            if not reason:
                return Choice(layout, own_logits, why_own_logits)
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
    if implementation not in (*MASKED, *PACKED, *PACKED.values()):
        return f"attention implementation {implementation} takes no mask"
    return ""


def candidates(
    implementation: str, device: torch.device, compiled: bool = False
) -> list[LayoutName]:
    """Return layouts worth trying with an attention implementation, best first."""
    if any(implementation in (name, PACKED[name]) for name in FLASH):
        return ["packed"]
    # One kernel call per segment is cheap on a CPU; elsewhere one call with a mask is preferred.
    on_cpu = implementation in ("sdpa", PACKED["sdpa"]) and device.type == "cpu"
    return ["packed", "tree"] if on_cpu and not compiled else ["tree"]


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
        self.needed = PACKED.get(self.before, self.before) if layout == "packed" else self.before
        self.keep = False

    def __enter__(self) -> "_Attention":
        if self.needed != self.before:
            self.causal.set_attn_implementation(self.needed)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.needed != self.before and not self.keep:
            self.causal.set_attn_implementation(self.before)


class _Proof:
    """Compares layouts on a small random batch, without gradients, in evaluation mode."""

    def __init__(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        agree: Callable[[Tensor], Tensor],
        half_precision: bool,
    ):
        self.model = model
        self.agree = agree
        tokens = batch["input_ids"].flatten()
        self.device = tokens.device
        self.vocabulary = tokens.unique().cpu()
        causal = causal_model(unwrap(model))
        half_precision |= causal.dtype.itemsize < 4 or getattr(causal, "is_quantized", False)
        self.tolerance = HALF_TOLERANCE if half_precision else TOLERANCE
        self.generator = torch.Generator().manual_seed(0)
        # Odd lengths, prompts of different ones, and a beginning long enough to be shared.
        beginning = self._draw(19)
        self.prompts = [beginning + self._draw(n) for n in (5, 9)]
        self.responses = [self._draw(n) for n in (13, 7)]
        self.reference = self._logps("sequences", own_logits=True)

    def _draw(self, count: int) -> list[int]:
        places = torch.randint(len(self.vocabulary), (count,), generator=self.generator)
        return self.vocabulary[places].tolist()

    def _logps(
        self, layout: LayoutName, own_logits: bool, responses: list[list[int]] | None = None
    ) -> Tensor:
        example = pair(self.prompts, responses or self.responses)
        batch = make_batch([example], pad_to_multiple_of=8)
        moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with torch.no_grad(), _without_dropout(self.model):
            logps, _ = response_logps(self.model, moved, layout, own_logits=own_logits)
        return logps

    def failure(self, layout: LayoutName, own_logits: bool) -> str:
        """Return how a layout's numbers differ from the reference; empty where they don't."""
        return self._try(
            lambda: self._logps(layout, own_logits) - self.reference,
            self.tolerance,
            f"the {layout} layout gives other log-probabilities"
            if layout != "sequences"
            else "log-probabilities from the head's chunks differ from the model's own",
        )

    def leak(self, layout: LayoutName, own_logits: bool) -> str:
        """Return a sentence where the second response sees the first one, else nothing.

        A much finer test than the comparison: the same kernels over the same shapes.
        """

        def change() -> Tensor:
            other = [self._draw(len(self.responses[0])), self.responses[1]]
            before = self._logps(layout, own_logits)
            return (self._logps(layout, own_logits, other) - before)[:, :, 1]

        return self._try(
            change, self.tolerance / 10, f"in the {layout} layout one response sees the other"
        )

    def _try(self, difference: Callable[[], Tensor], tolerance: float, what: str) -> str:
        reason = ""
        try:
            worst = difference().abs().mean().nan_to_num(torch.inf)
        except Exception as error:  # whatever a model does with a mask it can't take
            worst = torch.tensor(torch.inf, device=self.device)
            reason = f"{what.split(' gives')[0]} fails with {type(error).__name__}: {error}"
        worst = self.agree(worst.float().reshape(1)).item()
        if worst <= tolerance:
            return ""
        return reason or f"{what} (by {worst:.2g} nats on average, {tolerance:g} allowed)"


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
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
