"""The one change to an object that isn't ours: a model's forward learns another way to be called.

With the places whose hidden states predict a response token, it returns those tokens'
log-probabilities and never makes the logits of the rest. The change is made on the instance, and
called as before the model does what it did.

Why it is made: whatever computes the loss must run inside the wrapped model's own forward. DDP
synchronises gradients there, FSDP2 and ZeRO-3 gather the parameters of the modules that it calls,
and autocast is entered there. What was tried instead: calling `base_model` and the head from
outside leaves DDP without a gradient to wait for, silently, and finds empty weights under ZeRO-3
and sharded ones under FSDP2; a module around the model would be one more name in every checkpoint
and adapter; `logits_to_keep`, transformers' own argument, keeps the same columns in every row and
makes all their logits at once. TRL's `patch_chunked_lm_head` changes the same method.
"""

import math
import sys
from functools import wraps
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from axolotl_amopo.model.attention import attention_inputs
from axolotl_amopo.model.head import (
    chunked,
    gather_logps,
    head_logps,
    is_plain_linear,
    linear_or_logps,
)
from axolotl_amopo.model.layout import Layout, LayoutName, lay_out


class TokenLogps(NamedTuple):
    """Hold the log-probabilities of a batch's responses, of one forward pass."""

    logps: Tensor  # [B, K, N, T] log pi(y_t | x_k, y_<t) in nats; 0 outside the mask
    mask: Tensor  # [B, K, N, T] bool, true at response tokens
    router_loss: Tensor | None = None  # what a mixture of experts adds to a loss, see `router_loss`


def teach(model: nn.Module) -> None:
    """Teach an unwrapped model, and its head, to return log-probabilities of chosen tokens.

    Raises:
        TypeError: for a model without a head in transformers' usual place.
    """
    causal = causal_model(model)
    if hasattr(causal, "amopo_head"):
        return
    head = causal.get_output_embeddings()
    if head is None:
        raise TypeError(f"{type(causal).__name__} has no output embeddings to train on")
    # In a list, so that it isn't registered as a module again.
    vars(causal)["amopo_head"] = [head]
    plain = causal.forward

    @wraps(plain)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        predict_M: Tensor | None = None,
        targets_M: Tensor | None = None,
        real_RL: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if predict_M is None:
            return plain(*args, **kwargs)
        outputs = self.base_model(*args, **kwargs)
        hidden = outputs[0].flatten(0, 1)[predict_M]
        return head_logps(self, hidden, targets_M), router_loss(self, outputs, real_RL)

    causal.forward = MethodType(forward, causal)
    if is_plain_linear(head):
        head.forward = MethodType(linear_or_logps, head)


def response_logps(
    model: nn.Module,
    batch: dict[str, Any],
    layout: LayoutName = "sequences",
    *,
    own_logits: bool = False,
    dtype: torch.dtype | None = None,
) -> TokenLogps:
    """Return log-probabilities of the response tokens, from one forward of the (wrapped) model.

    Args:
        model: as the trainer wraps it, after `teach` (not needed for `own_logits`).
        batch: as `make_batch` makes it.
        layout: how the batch is laid out; must be one that the model can take.
        own_logits: take the logits that the model's own forward makes, for models whose head is
            not a matter of hidden states alone.
        dtype: in which the attention computes; the model's by default, autocast's where it is on.

    Returns:
        Log-probabilities in float32 (in float64 where the model is), and their mask; both are empty
        where no criterion reads a response under a prompt.
    """
    causal = causal_model(unwrap(model))
    tokens_N, positions_N = batch["input_ids"][0], batch["position_ids"][0]
    laid = lay_out(batch["forest"], layout, batch["pad_to_multiple_of"]).to(tokens_N.device)
    index_RL = laid.index_RL.clamp(min=0)
    positions_RL = positions_N[index_RL]
    inputs = {
        "input_ids": tokens_N[index_RL],
        "position_ids": positions_RL,
        "use_cache": False,
    } | attention_inputs(laid, positions_RL, causal.config.get_text_config(), dtype or causal.dtype)
    targets_M = tokens_N[laid.targets_M]
    if adds_router_loss(causal):
        inputs["output_router_logits"] = True
    if own_logits:
        logps_M, router = _own_logps(model, inputs, laid, targets_M)
    else:
        logps_M, router = model(
            **inputs, predict_M=laid.predict_M, targets_M=targets_M, real_RL=laid.index_RL >= 0
        )

    forest = laid.forest
    shape = (forest.examples, forest.prompts, forest.responses, forest.longest_response)
    logps_S = logps_M[laid.sources_S]
    token_logps = logps_S.new_zeros(math.prod(shape)).index_copy(0, laid.slots_S, logps_S)
    mask = torch.zeros(math.prod(shape), dtype=torch.bool, device=logps_S.device)
    mask[laid.slots_S] = True
    return TokenLogps(token_logps.view(shape), mask.view(shape), router)


def adds_router_loss(causal: PreTrainedModel) -> bool:
    """Return whether a mixture of experts' config asks for its auxiliary loss."""
    config = causal.config.get_text_config()
    return bool(getattr(config, "output_router_logits", False)) and router_weight(causal) != 0


def router_weight(causal: PreTrainedModel) -> float:
    """Return the factor of the auxiliary loss; 0 for a model that has none."""
    factor: Any = getattr(causal, "router_aux_loss_coef", None)
    return factor or 0.0


def router_loss(causal: PreTrainedModel, outputs: Any, real_RL: Tensor | None) -> Tensor | None:
    """Return what a mixture of experts adds to a loss so that its experts get as many tokens.

    None where the model's config doesn't ask for it. transformers adds it in the forward that
    returns logits, with the function of each model's own module (Fedus et al., 2022, equations 4
    to 6: https://arxiv.org/abs/2101.03961); a shared prompt counts once.

    Args:
        outputs: of the trunk.
        real_RL: [R, L] true where no padding stands.
    """
    if not adds_router_loss(causal):
        return None
    model: Any = causal
    balance = sys.modules[type(causal).__module__].load_balancing_loss_func
    real = None if real_RL is None or real_RL.all() else real_RL.long()
    loss = balance(outputs.router_logits, model.num_experts, model.num_experts_per_tok, real)
    return router_weight(causal) * loss


def causal_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside PEFT's adapters; not inside DDP and the like."""
    base: Any = getattr(model, "get_base_model", None)
    return cast(PreTrainedModel, base() if base else model)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DDP or a DeepSpeed engine."""
    # Not transformers' or accelerate's own function: it imports DeepSpeed to look, and leaves a
    # compiled DDP model without its DDP.
    for name in ("_orig_mod", "module"):
        # Not its truth: a compiled module's asks for a length, which models lack.
        if isinstance(inner := getattr(model, name, None), nn.Module):
            return unwrap(inner)
    return model


def _own_logps(
    model: nn.Module, inputs: dict, laid: Layout, targets_M: Tensor
) -> tuple[Tensor, Tensor | None]:
    length = laid.index_RL.shape[1]
    rows_M, columns_M = laid.predict_M // length, laid.predict_M % length
    keep = columns_M.unique()
    outputs = model(**inputs, logits_to_keep=keep)
    chosen = outputs.logits[rows_M, torch.searchsorted(keep, columns_M)]  # [M, V]
    router = None
    causal = causal_model(unwrap(model))
    if adds_router_loss(causal):
        router = router_weight(causal) * outputs.aux_loss
    return chunked(gather_logps, chosen, targets_M, chosen.shape[-1]), router
