"""Prompts -> their continuations, by transformers' own `generate`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TopPLogitsWarper,
)


def stop_tokens(model: PreTrainedModel, *known: int) -> list[int]:
    """Return the tokens that end an answer: those that are known, and the model's own."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({*known, *(stop for stop in own if stop is not None)})


def generation_config(
    stops: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> GenerationConfig:
    """Return what `continue_prompts` takes; with a temperature of 0, the likeliest tokens."""
    draws = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stops),
        pad_token_id=stops[0],
        do_sample=bool(temperature),
        use_cache=True,  # training may have turned it off in the model's own config
        **draws,
    )


class Seeded(NamedTuple):
    """Say how one continuation is drawn, whatever else is in its batch."""

    temperature: float
    seed: int


class SeededDraws(LogitsProcessor):
    """Draw each row's next token by its own temperature and seed; for a config that draws nothing.

    The largest of logits / temperature + Gumbel noise is a draw from their softmax (Maddison et
    al., 2014, https://arxiv.org/abs/1411.0030).
    """

    def __init__(self, rows: Sequence[Seeded], top_p: float, device: torch.device):
        self.temperatures = torch.tensor(
            [[row.temperature] for row in rows], device=device
        )  # [B, 1]
        self.generators = [torch.Generator(device).manual_seed(row.seed) for row in rows]
        self.top_p = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return [B, V] scores whose largest is the token that is drawn."""
        scores = scores.float() / self.temperatures
        if self.top_p:
            scores = self.top_p(input_ids, scores)
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()  # -log of an exponential is Gumbel noise


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    batch_size: int,
    progress: Callable[[int], object] = lambda count: None,
    *,
    draws: Sequence[Seeded] | None = None,
    top_p: float = 1.0,
    synced: bool = False,
) -> list[list[int]]:
    """Return the continuation of each prompt, with the stop token that ended it.

    Args:
        model: in evaluation mode, with a `generation_config` that has no settings of its own.
        prompts: token ids.
        config: of `generation_config`.
        batch_size: how many prompts run at once, padded on their left.
        progress: called with the number of prompts that were just continued.
        draws: how each one is drawn, for a `config` without a temperature.
        top_p: of these draws.
        synced: whether all processes run as many passes, because each pass gathers weights. All of
            them must then have as many prompts.
    """
    generate: Any = model.generate
    pad, stops, device = config.pad_token_id, config.eos_token_id, model.device
    # Longest first: a batch that does not fit into memory fails at once.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    made: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(prompts[batch[0]])
        ids = [[pad] * (width - len(prompts[i])) + prompts[i] for i in batch]
        mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch]
        rows: Tensor = generate(
            input_ids=torch.tensor(ids, device=device),  # [B, T]
            attention_mask=torch.tensor(mask, device=device),
            generation_config=config,
            logits_processor=LogitsProcessorList(
                [SeededDraws([draws[i] for i in batch], top_p, device)] if draws else []
            ),
            synced_gpus=synced,
        )
        for i, row in zip(batch, rows[:, width:].tolist(), strict=True):
            made[i] = until_stop(row, stops)
        progress(len(batch))
    return made


def until_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    """Return ids up to the first of the stop tokens, that one included."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + 1]
