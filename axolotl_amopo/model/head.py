"""The head: hidden states -> log-probabilities of chosen tokens, chunk by chunk.

The logits of all tokens would be the largest tensor of a step. They are made for the tokens that
are asked for alone, so many at a time that a chunk takes `CHUNK_BYTES`.
"""

from functools import partial
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Float32 logits, and what is as large beside them, that exist at one time.
CHUNK_BYTES = 128 * 2**20
# A softmax up to this size is kept for the gradient of a head that is trained; a larger one is made
# again.
KEPT_BYTES = 600 * 2**20


@torch.compiler.disable
def head_logps(causal: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return log-probabilities of `targets` [M] from hidden states [M, H], see `wide`."""
    (head,) = vars(causal)["amopo_head"]
    scale, softcap = logit_options(causal.config.get_text_config())
    if getattr(head.forward, "__func__", None) is linear_or_logps:
        return head(hidden, targets=targets, scale=scale, softcap=softcap)

    def logps(hidden: Tensor, targets: Tensor) -> Tensor:
        return gather_logps(head(hidden), targets, scale=scale, softcap=softcap)

    # An adapted or quantised head: its own forward, once more in the backward pass.
    vocabulary = causal.config.get_text_config().vocab_size
    return chunked(logps, hidden, targets, vocabulary, in_step=True)


def logit_options(config: Any) -> tuple[float, float | None]:
    """Return what transformers' models do to the head's output: a factor, and a soft cap.

    Granite divides by `logits_scaling`, HyperCLOVA X multiplies by it, Cohere by `logit_scale`,
    Falcon-H1 by `lm_head_multiplier`; Gemma caps. Whether this is all that a model does is
    proven at the start, see `choose`.
    """
    scale = 1.0
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale = divisor if config.model_type.startswith("hyperclovax") else 1 / divisor
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        if (factor := getattr(config, name, None)) is not None:
            scale *= factor
    return scale, getattr(config, "final_logit_softcapping", None)


def gather_logps(
    logits: Tensor, targets: Tensor, *, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Return log softmax of `logits` [M, V] at `targets` [M], see `wide`."""
    logits = logits.to(wide(logits.dtype)) * scale
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which logits are summed up: float32, or that of wider ones."""
    return torch.promote_types(dtype, torch.float32)


def chunked(
    function: Any, values: Tensor, targets: Tensor, vocabulary: int, *, in_step: bool = False
) -> Tensor:
    """Return `function` over chunks of rows, made again in the backward pass to keep nothing of it.

    With `in_step`, all processes call it equally often, on empty chunks if need be: FSDP2 and
    ZeRO-3 gather weights at each call of a module, and wait for each other there.
    """
    rows = _chunk_rows(vocabulary, 2)
    count = torch.tensor(-(-len(values) // rows), device=values.device)
    if in_step and dist.is_initialized():
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
    if torch.is_grad_enabled():
        function = partial(checkpoint, function, use_reentrant=False)
    starts = range(0, int(count) * rows, rows)
    return torch.cat([function(values[i : i + rows], targets[i : i + rows]) for i in starts])


def _chunk_rows(vocabulary: int, copies: int) -> int:
    return max(1, CHUNK_BYTES // (4 * vocabulary * copies))


def is_plain_linear(head: nn.Module) -> bool:
    """Return whether a head is a linear layer and nothing more."""
    return (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and head.weight.is_floating_point()
    )


def linear_or_logps(
    self: nn.Linear,
    hidden: Tensor,
    *,
    targets: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Run a linear head, or return log-probabilities where there are `targets`.

    It is called as a module, so that ZeRO-3 and FSDP2 have its weight in place, in the backward
    pass too.
    """
    if targets is None:
        return nn.Linear.forward(self, hidden)
    weight, bias, device = self.weight, self.bias, hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return LinearLogps.apply(hidden, weight, bias, targets, scale, softcap)


class LinearLogps(torch.autograd.Function):
    """Compute log softmax(scale and cap(hidden W^T + bias)) at the targets, without the logits.

    A token's log-probability depends on its own hidden state alone, so the gradient with respect
    to that is the incoming number times a vector known in the forward pass already. With a frozen
    head the logits are thus made once: two products with W in all, where recomputing takes three.
    A head that is trained costs one more product where the softmax is small enough to be kept
    (`KEPT_BYTES`), else two, over slices of the vocabulary, so that each slice of its gradient is
    one product and no float32 copy of it is summed up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [M, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [M]
        scale: float,
        softcap: float | None,
    ) -> Tensor:  # [M], see `wide`
        size = len(hidden), len(weight)
        rows = min(_chunk_rows(size[1], 2 if softcap else 1), max(1, size[0]))
        trained = any(ctx.needs_input_grad[1:3])
        keep = trained and size[0] * size[1] * weight.itemsize <= KEPT_BYTES
        kept = weight.new_empty(size) if keep else None  # softmax - 1 at the target, sloped
        buffer = weight.new_empty(rows, size[1])  # made once: fresh pages cost as much as a softmax
        dtype = wide(weight.dtype)
        logps, highest, total = (hidden.new_empty(size[0], 1, dtype=dtype) for _ in range(3))
        unit_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # of each logp
        chunks = zip(
            hidden.split(rows),
            targets.unsqueeze(-1).split(rows),
            highest.split(rows),
            total.split(rows),
            logps.split(rows),
            repeat(None) if unit_grad is None else unit_grad.split(rows),
            repeat(buffer) if kept is None else kept.split(rows),
            strict=False,  # what is repeated has no end
        )
        for some, target, most, summed, result, some_grad, place in chunks:
            place = place[: len(some)]
            logits, slope = _logits(some, weight, bias, scale, softcap, out=place)
            torch.amax(logits, -1, keepdim=True, out=most)
            picked = logits.gather(-1, target)
            residual = logits.sub_(most).exp_()
            torch.sum(residual, -1, keepdim=True, out=summed)
            result.copy_(picked - most - summed.log())
            if some_grad is None and kept is None:
                continue
            residual.div_(summed)
            residual.scatter_add_(-1, target, residual.new_full(target.shape, -1.0))
            if slope is not None:
                residual.mul_(slope)
            if residual is not place:
                residual = place.copy_(residual)  # in the weight's dtype
            if some_grad is not None:
                torch.mm(residual, weight, out=some_grad)
        if unit_grad is not None:
            unit_grad *= -scale
        ctx.save_for_backward(hidden, weight, bias, targets, unit_grad, kept, highest, total)
        ctx.options = scale, softcap
        return logps.squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, weight, bias, targets, unit_grad, kept, highest, total = ctx.saved_tensors
        scale, softcap = ctx.options
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        factor = -scale * grad.unsqueeze(-1)  # [M, 1]
        grad_hidden = (grad.unsqueeze(-1) * unit_grad).to(hidden.dtype) if wants_hidden else None
        grad_weight = grad_bias = None
        if kept is not None:
            if wants_weight:
                grad_weight = torch.mm(kept.t(), (factor * hidden).to(weight.dtype))
            if wants_bias:
                grad_bias = torch.mm(kept.t(), factor.to(weight.dtype)).squeeze(-1)
        elif wants_weight or wants_bias:
            grad_weight = torch.empty_like(weight) if wants_weight else None
            grad_bias = torch.empty_like(bias) if wants_bias else None
            columns = min(_chunk_rows(max(1, len(hidden)), 2 if softcap else 1), len(weight))
            buffer = weight.new_empty(len(hidden) * columns)
            shares = factor / total
            for start in range(0, len(weight), columns):
                chunk = slice(start, start + columns)
                part = None if bias is None else bias[chunk]
                place = buffer[: len(hidden) * len(weight[chunk])].view(-1, len(weight[chunk]))
                logits, slope = _logits(hidden, weight[chunk], part, scale, softcap, out=place)
                residual = logits.sub_(highest).exp_()
                residual.mul_(shares)
                # Nothing of a target elsewhere; to look for those here would wait for a GPU.
                target = (targets - start).unsqueeze(-1)
                here = (target >= 0) & (target < residual.shape[1])
                target = target.clamp(0, residual.shape[1] - 1)
                residual.scatter_add_(-1, target, factor.neg().masked_fill_(~here, 0))
                if slope is not None:
                    residual.mul_(slope)
                if grad_weight is not None:
                    torch.mm(residual.to(weight.dtype).t(), hidden, out=grad_weight[chunk])
                if grad_bias is not None:
                    grad_bias[chunk] = residual.sum(0)
                del logits, residual, slope  # before the next slice's are made
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return final logits, see `wide` (in `out`, if that has its type), and their derivative under
    a cap."""
    logits = torch.mm(hidden, weight.t(), out=out)
    if bias is not None:
        logits += bias
    logits = logits.to(wide(logits.dtype))
    if scale != 1.0:
        logits *= scale
    if not softcap:
        return logits, None
    bent = logits.div_(softcap).tanh_()
    slope = bent.square().neg_().add_(1)
    return bent.mul_(softcap), slope
