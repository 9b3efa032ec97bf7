"""Models, and the log-probabilities that they give the responses of rated pairs."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from axolotl_amopo.commands.kit.policy import is_adapter, load_policy, unloadable
from axolotl_amopo.commands.score.data import RatedPairs
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.model.batch import make_batch
from axolotl_amopo.model.choose import choose_layout
from axolotl_amopo.model.forward import response_logps
from axolotl_amopo.objectives.base import response_stats
from axolotl_amopo.training.sharing import log_choice


class ModelPath(NamedTuple):
    """A folder or a hub's name, and what people call it."""

    name: str
    path: str


def model_logps(
    cfg: Any,
    tokenizer: Any,
    pairs: RatedPairs,
    base: ModelPath | None,
    tuned: list[ModelPath],
    *,
    batch_pairs: int,
    progress: Callable[[str], Callable[[int], None]],
) -> Iterator[tuple[ModelPath, np.ndarray]]:
    """Mean log-probability per token of every response, model by model, as each is done.

    Adapters are loaded on the config's `base_model`. Where that is the base, its own numbers come
    from the first adapter's model with the adapter off, so that its weights are read once.

    Args:
        batch_pairs: pairs a forward.
        progress: told of each model's name; what it returns is told of pairs done.

    Yields:
        A model and [N, P, 2] float64, the overall winner first, NaN where a prompt is masked.

    Raises:
        AMoPOError: for a model that can't be loaded, or has another tokenizer than the rows.
    """
    adapters = [model for model in tuned if is_adapter(model.path)]
    shared = base is not None and base.path == cfg.base_model and bool(adapters)
    order = adapters + [model for model in tuned if model not in adapters]
    if base is not None and not shared:
        order.insert(0, base)
    for one in order:
        check_model(cfg, one.path, tokenizer, pairs)
    for one in order:
        model = load_policy(cfg, tokenizer, one.path)
        score = _Scorer(model, pairs, cfg.amopo.share_prompt, batch_pairs)
        if shared:
            with model.disable_adapter():
                yield base, score(progress(base.name))
            shared = False
        yield one, score(progress(one.name))
        del model, score
        gc.collect()  # the forward that was taught holds its model; the next needs the memory


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
        self.model, self.examples = model, pairs.examples
        self.device = model.get_input_embeddings().weight.device
        # The longest first: what doesn't fit into memory fails at once.
        lengths = [sum(map(len, example.longest())) for example in self.examples]
        longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        self.batches = [longest[i : i + batch_pairs] for i in range(0, len(longest), batch_pairs)]
        self.choice = choose_layout(model, self._batch(self.batches[0]), share_prompt)
        log_choice(self.choice)

    def _batch(self, indices: list[int]) -> dict[str, Any]:
        batch = make_batch([self.examples[i] for i in indices], pad_to_multiple_of=8)
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def __call__(self, advance: Callable[[int], None]) -> np.ndarray:
        """Return [N, P, 2], see `model_logps`."""
        reads = np.array([example.reads[0] for example in self.examples])  # [N, P]
        said = np.array([example.signs[0] for example in self.examples]) != 0  # [N, P]
        made = np.full((*reads.shape, 2), np.nan)
        for indices in self.batches:
            with torch.no_grad():
                found = response_logps(
                    self.model,
                    self._batch(indices),
                    self.choice.layout,
                    own_logits=self.choice.own_logits,
                )
            stats = response_stats(found.logps, found.mask)
            means = stats.avg_logp.double().cpu().numpy()  # [B, K, 2]
            made[indices] = np.take_along_axis(means, reads[indices][..., None], axis=1)
            advance(len(indices))
        made[~said] = np.nan
        return made


def default_models(cfg: Any) -> list[ModelPath]:
    """What training has left in the config's `output_dir`: one model, or none."""
    folder = Path(cfg.output_dir)
    files = ("adapter_config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*")
    if any(next(folder.glob(name), None) for name in files):
        return [ModelPath("tuned", str(cfg.output_dir))]
    return []
