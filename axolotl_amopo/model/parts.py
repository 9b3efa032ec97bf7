"""A batch in parts: the memory of one part, the numbers of the whole.

A loss over a batch reads all its log-probabilities, but the gradient of a log-probability needs
nothing of the others. So all parts run once without gradients; the loss's gradient with respect
to the log-probabilities is taken; then each part runs again and passes its share of that gradient
on. That is exact for every objective, and costs one more forward pass. (Gao et al., 2021, do it
for contrastive losses: https://arxiv.org/abs/2101.06983.)
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from axolotl_amopo.model.forest import Forest, Leaf
from axolotl_amopo.model.forward import TokenLogps
from axolotl_amopo.model.layout import LayoutName

Batch = dict[str, Any]


def split_batch(
    batch: Batch,
    max_tokens: int | None = None,
    *,
    one_prompt: bool = False,
    layout: LayoutName = "packed",
) -> list[Batch]:
    """Return batches that `response_logps` takes, which together run each response of a batch.

    A part has prompts with all their responses. One prompt with more than `max_tokens` is split
    between its responses, and a prompt with one response is never split. What prompts have in
    common runs in every part that has some of them.

    Args:
        batch: as `make_batch` makes it.
        max_tokens: the most tokens of a part.
        one_prompt: whether every part has one prompt alone.
        layout: in which the parts will run, so how often shared tokens count.
    """
    forest = batch["forest"]
    if max_tokens is None and not one_prompt:
        return [batch]
    parts: list[list[Leaf]] = []
    for leaves in _by_prompt(forest):
        for run in _runs(forest, leaves, max_tokens, layout):
            together = [*parts[-1], *run] if parts and not one_prompt else []
            if together and _fits(forest, together, max_tokens, layout):
                parts[-1] = together
            else:
                parts.append(run)
    if len(parts) == 1:
        return [batch]
    return [_part(batch, leaves) for leaves in parts]


def _by_prompt(forest: Forest) -> list[list[Leaf]]:
    found: dict[int, list[Leaf]] = {}
    for leaf in forest.leaves:
        found.setdefault(forest.parents[leaf.segment], []).append(leaf)
    return list(found.values())


def _runs(
    forest: Forest, leaves: list[Leaf], max_tokens: int | None, layout: LayoutName
) -> list[list[Leaf]]:
    runs: list[list[Leaf]] = []
    for leaf in leaves:
        if runs and _fits(forest, [*runs[-1], leaf], max_tokens, layout):
            runs[-1].append(leaf)
        else:
            runs.append([leaf])
    return runs


def _fits(forest: Forest, leaves: list[Leaf], max_tokens: int | None, layout: LayoutName) -> bool:
    return max_tokens is None or _tokens(forest, leaves, layout) <= max_tokens


def _tokens(forest: Forest, leaves: list[Leaf], layout: LayoutName) -> int:
    """Return the tokens that go through the model, at most; padding left out."""
    match layout:
        case "packed":
            return forest.count(_segments(forest, leaves))
        case "sequences":
            return sum(forest.count(forest.path(leaf.segment)) for leaf in leaves)
        case "tree":  # a row per prompt, unless one for all of them is shorter
            prompts = {forest.parents[leaf.segment] for leaf in leaves}
            of_prompts = sum(forest.count(forest.path(prompt)) for prompt in prompts)
            return of_prompts + forest.count([leaf.segment for leaf in leaves])


def _segments(forest: Forest, leaves: list[Leaf]) -> list[int]:
    return sorted({segment for leaf in leaves for segment in forest.path(leaf.segment)})


def _part(batch: Batch, leaves: list[Leaf]) -> Batch:
    forest = batch["forest"]
    segments = _segments(forest, leaves)
    new = {old: i for i, old in enumerate(segments)} | {-1: -1}
    part = replace(
        forest,
        parents=[new[forest.parents[segment]] for segment in segments],
        lengths=[forest.lengths[segment] for segment in segments],
        leaves=[leaf._replace(segment=new[leaf.segment]) for leaf in leaves],
        longest_response=forest.longest_response,
    )
    tokens = torch.arange(sum(forest.lengths)).split(forest.lengths)
    places = torch.cat([tokens[segment] for segment in segments]).to(batch["input_ids"].device)
    return {
        "input_ids": batch["input_ids"][:, places],
        "position_ids": batch["position_ids"][:, places],
        "forest": part,
        "pad_to_multiple_of": batch["pad_to_multiple_of"],
    }


def together(parts: Sequence[TokenLogps]) -> TokenLogps:
    """Return the log-probabilities of a batch from those of its parts."""
    logps, mask, router = parts[0]
    if router is not None and len(parts) > 1:
        raise NotImplementedError("a router's loss is not that of its batch's parts")
    for part in parts[1:]:
        logps, mask = logps + part.logps, mask | part.mask
    return TokenLogps(logps, mask, router)


def replayed_loss(
    parts: Sequence[Batch],
    forward: Callable[[Batch], TokenLogps],
    judge: Callable[[TokenLogps], Tensor],
    backward: Callable[[Callable[[], Tensor]], None],
    idle: int = 0,
) -> Tensor:
    """Return the loss of a batch; its backward pass is that of the last part.

    Those of the other parts have run when it is returned. Dropout drops the same again.

    Args:
        parts: of `split_batch`.
        forward: returns a part's log-probabilities.
        judge: returns the loss from those of all parts.
        backward: calls the function that it is given, and runs the backward pass of what that
            returns, without synchronising gradients between processes.
        idle: how many more times to run, for nothing, so that all processes run equally often.
    """
    states = []
    found: list[TokenLogps] = []  # one: as many as there are parts may be larger than a part
    with torch.no_grad():
        for i, part in enumerate([parts[-1]] * idle + list(parts)):
            states.append(_random_state(part["input_ids"].device))
            one = forward(part)
            if i >= idle:
                found = [together([*found, one])]
    (whole,) = found
    logps = whole.logps.requires_grad_()
    with torch.enable_grad():
        loss = judge(whole._replace(logps=logps))
    (grad,) = torch.autograd.grad(loss, logps)
    after = _random_state(grad.device)

    def share(i: int, part: Batch) -> Tensor:
        """Return a number whose gradient is the part's share of the loss's."""
        _set_random_state(states[i], grad.device)
        return (forward(part).logps * (grad if i >= idle else torch.zeros_like(grad))).sum()

    *others, last = enumerate([parts[-1]] * idle + list(parts))
    for i, part in others:
        backward(partial(share, i, part))
    mine = share(*last)
    _set_random_state(after, grad.device)
    return loss.detach() + (mine - mine.detach())


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
