"""A batch through the model -> log-probabilities of the response tokens."""

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def response_logps(
    model: nn.Module, batch: dict[str, Any], *, accepts_logits_to_keep: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the response tokens, from one forward of the (wrapped) model.

    All goes through the model's own forward, so that DDP, FSDP2 and ZeRO-3 see every parameter
    that is used, and adapters on the head, soft-capping and logit scaling apply.

    Args:
        model: the model as the trainer wraps it.
        batch: as `AMoPOCollator` makes it.
        accepts_logits_to_keep: see `takes_logits_to_keep`.

    Returns:
        token_logps [B, K, 2, T] in float32, and their mask (true at response tokens).
    """
    length = batch["response_len"]
    # The position before the first response token predicts it.
    keep = {"logits_to_keep": length + 1} if accepts_logits_to_keep else {}
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
        **keep,
    ).logits[:, -(length + 1) : -1]  # [B * K * 2, T, V]
    labels = batch["labels"][:, -length:]  # [B * K * 2, T]

    # Row by row: one response's float32 logits at a time, made again in the backward pass.
    recompute = logits.dtype != torch.float32 and torch.is_grad_enabled()
    token_logps = torch.stack(
        [
            checkpoint(gather_logps, row, label, use_reentrant=False)
            if recompute
            else gather_logps(row, label)
            for row, label in zip(logits, labels, strict=True)
        ]
    )
    batch_size, prompts = batch["dimension_mask"].shape
    shape = (batch_size, prompts, 2, length)
    return token_logps.view(shape), (labels != -100).view(shape)


def gather_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """log softmax of `logits` [T, V] at `labels` [T], in float32; any value where they are -100."""
    logits = logits.float()
    chosen = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the unwrapped model's forward can limit the logits to the last positions."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
