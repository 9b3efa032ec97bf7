"""Load models, and compute the rewards that they give the responses of rated pairs."""

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from axolotl_amopo.commands.kit.policy import is_adapter, load_policy, unloadable
from axolotl_amopo.commands.score.data import RatedPairs
from axolotl_amopo.commands.score.groups import Group, batches
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.model.batch import make_batch, responses
from axolotl_amopo.model.choose import choose_layout
from axolotl_amopo.model.forward import response_logps
from axolotl_amopo.objectives import Responses
from axolotl_amopo.objectives.base import response_sums
from axolotl_amopo.training.reference import STARTS_AT_ZERO
from axolotl_amopo.training.sharing import log_choice

#: Returns [B, K, N], one number per response under each prompt.
Reward = Callable[[Responses], Tensor]


class ModelPath(NamedTuple):
    """A folder or a hub's name, and what people call it."""

    name: str
    path: str


def is_base_below(path: str) -> bool:
    """Return whether a path is an adapter below which the base model is what it was: not one that
    began as a part of the base's weights (PiSSA and the like)."""
    if not is_adapter(path):
        return False
    begun = getattr(PeftConfig.from_pretrained(path), "init_lora_weights", None)
    return begun in STARTS_AT_ZERO


def model_rewards(
    cfg: Any,
    tokenizer: Any,
    pairs: RatedPairs,
    models: list[ModelPath],
    reward: Reward,
    reference: ModelPath | None = None,
    *,
    batch_pairs: int,
    progress: Callable[[str], Callable[[int], None]],
) -> Iterator[tuple[ModelPath, np.ndarray]]:
    """Yield the rewards that each model gives every response, as it is done.

    Adapters are loaded on the config's `base_model`. Where that is itself to be run, it is as an
    adapter's model with the adapter off, so that its weights are read once.

    Args:
        cfg: axolotl's config.
        tokenizer: of its `base_model`.
        pairs: what is scored.
        models: yielded in any order.
        reward: of responses.
        reference: the model whose log-probabilities the reward takes as those of the reference.
        batch_pairs: of a forward pass, see `batches`.
        progress: told of each model's name; what it returns is told of pairs done.

    Yields:
        A model and [N, P, 2] float64, the overall winner first, NaN where a prompt is masked.

    Raises:
        AMoPOError: for a model that can't be loaded, or has another tokenizer than the rows.
    """
    every = [reference, *models] if reference else models
    for one in every:
        check_model(cfg, one.path, tokenizer, pairs)
    carrier = next((one for one in models if is_base_below(one.path)), None)
    below = [one for one in every if carrier and one.path == cfg.base_model]
    loaded = [one for one in every if one not in below]
    loaded.sort(key=lambda one: (one is not reference, one is not carrier))
    sums: list[Tensor] | None = None  # of the reference, which comes first
    for one in loaded:
        model = load_policy(cfg, tokenizer, one.path)
        scorer = _Scorer(model, pairs, cfg.amopo.share_prompt, batch_pairs)
        for run in [*(below if one is carrier else []), one]:
            advance = progress(run.name)
            with model.disable_adapter() if run is not one else nullcontext():
                if run is reference:
                    sums = scorer.values(_sums, advance)
                else:
                    yield run, scorer.by_criterion(scorer.values(reward, advance, sums))
        del model, scorer
        gc.collect()  # the forward that was taught holds its model; the next needs the memory


def _sums(given: Responses) -> Tensor:
    return response_sums(given.logps, given.mask)


def check_model(cfg: Any, path: str, tokenizer: Any, pairs: RatedPairs) -> None:
    """Refuse, before any is loaded, a model that isn't there, or to which the rows' token ids mean
    something else.

    Raises:
        AMoPOError: with the first token that differs.
    """
    remote_code = cfg.trust_remote_code or False
    if not is_adapter(path):
        try:
            AutoConfig.from_pretrained(path, trust_remote_code=remote_code)
        except (OSError, ValueError) as error:
            raise unloadable(path, error) from None
    try:
        other = AutoTokenizer.from_pretrained(path, trust_remote_code=remote_code)
    except (OSError, ValueError, KeyError):
        return  # none beside the weights
    for token in sorted(pairs.token_ids()):
        ours, theirs = (
            t.convert_ids_to_tokens(token) if token < len(t) else None for t in (tokenizer, other)
        )
        if ours != theirs:
            raise AMoPOError(
                f"{path}: its tokenizer is not that of the config's base_model (token {token} is "
                f"{theirs!r} there and {ours!r} here); score it with a config of the same data "
                "whose base_model is its own."
            )


class _Scorer:
    """A loaded model over all pairs; the layout is chosen once."""

    def __init__(
        self, model: nn.Module, pairs: RatedPairs, share_prompt: bool | str, batch_pairs: int
    ):
        self.model, self.pairs = model, pairs
        self.device = model.get_input_embeddings().weight.device
        self.batches = batches(pairs, batch_pairs)
        first = self._on_device(self._batch(self.batches[0]))
        self.choice = choose_layout(model, first, share_prompt)
        log_choice(self.choice)

    def _batch(self, groups: list[Group]) -> dict[str, Any]:
        return make_batch([group.example() for group in groups], pad_to_multiple_of=8)

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def values(
        self,
        reward: Reward,
        advance: Callable[[int], None],
        reference: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """Return [B, K, N] per batch, of the groups' responses under each prompt.

        Args:
            reward: what is computed.
            advance: told of the pairs that are done.
            reference: the same of the reference's summed log-probabilities.
        """
        made = []
        for number, groups in enumerate(self.batches):
            batch = self._batch(groups)
            with torch.no_grad():
                found = response_logps(
                    self.model,
                    self._on_device(batch),
                    self.choice.layout,
                    own_logits=self.choice.own_logits,
                )
            logps = found.logps.cpu().double()
            # How much a criterion weighs is nothing to the rewards, but objectives ask for it.
            others = {"weights": torch.ones(len(groups), batch["signs"].shape[1])}
            if reference is not None:
                others["reference"] = reference[number].unsqueeze(0)
            made.append(reward(responses(batch, logps, found.mask.cpu(), **others)))
            advance(sum(len(group.pairs) for group in groups))
        return made

    def by_criterion(self, values: list[Tensor]) -> np.ndarray:
        """Return [N, P, 2], see `model_rewards`.

        Args:
            values: [B, K, N] per batch.
        """
        signs = np.array([example.signs[0] for example in self.pairs.examples])
        made = np.full((*signs.shape, 2), np.nan)
        for groups, found in zip(self.batches, values, strict=True):
            for group, rewards in zip(groups, found.numpy(), strict=True):
                for pair, reads, sides in zip(group.pairs, group.reads, group.sides, strict=True):
                    made[pair] = rewards[np.array(reads)[:, None], np.array(sides)]
        made[signs == 0] = np.nan
        return made


def default_models(cfg: Any) -> list[ModelPath]:
    """What training has left in the config's `output_dir`: one model, or none."""
    folder = Path(cfg.output_dir)
    files = ("adapter_config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*")
    if any(next(folder.glob(name), None) for name in files):
        return [ModelPath("tuned", str(cfg.output_dir))]
    return []
