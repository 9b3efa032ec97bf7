"""Attention over a forest of segments: masks for the model's own attention, and one of ours.

Three of transformers' interfaces are used, all public: a prepared 4D mask is passed through to
the attention (https://huggingface.co/docs/transformers/en/attention_interface), attention
functions are registered by name, and keyword arguments of the model's forward reach them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask, sdpa_mask
from transformers.modeling_flash_attention_utils import _flash_attention_forward

from axolotl_amopo.model.forest import Forest
from axolotl_amopo.model.layout import Layout

FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
# The packed counterpart of an attention implementation, by the name it is registered under.
# (transformers takes a name with "flash" in it for a kernel to be downloaded.)
PACKED = {"sdpa": "amopo_packed_sdpa"} | {name: f"amopo_packed_varlen_{name[-1]}" for name in FLASH}
# Keywords that change the scores, which SDPA can't follow.
UNKNOWN_SCORES = ("softcap", "s_aux", "position_bias", "cache")


def attention_inputs(
    layout: Layout, positions_RL: Tensor, config: PretrainedConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """Return keyword arguments of the model's forward that make its attention follow the layout.

    Args:
        layout: on the model's device.
        positions_RL: positions of the layout's tokens.
        config: the text model's.
        dtype: of the hidden states; eager attention adds its mask to the scores.
    """
    if layout.name == "sequences":
        return {"attention_mask": (layout.index_RL >= 0).long()}
    if layout.name == "packed":
        # Any 4D mask is passed through, which keeps transformers from making one of [N, N].
        anything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=positions_RL.device)
        return {"attention_mask": anything, "amopo_forest": PackedForest(layout.forest)}

    sees = visible(layout, positions_RL)
    masks = {}
    for layer_type in layer_types(config):
        window = config.sliding_window if layer_type == "sliding_attention" else None
        masks[layer_type] = _prepared(sees, window, layout, config, dtype)
    return {"attention_mask": masks if len(masks) > 1 else masks.popitem()[1]}


def layer_types(config: PretrainedConfig) -> list[str]:
    """Return the kinds of layers of a model, as its config names them."""
    named = getattr(config, "layer_types", None)
    if named:
        return sorted(set(named))
    sliding = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    return ["sliding_attention" if sliding else "full_attention"]


def visible(layout: Layout, positions_RL: Tensor) -> Callable[..., Tensor]:
    """Return the layout's mask as a function of (row, head, query, key) indices and a window.

    A token sees itself and what stands before it in its own segment and its ancestors; with a
    window, only what is less than that many positions away. Padding sees padding, since a row of
    a mask with nothing in it makes NaN.
    """

    def sees(row, head, query, key, window: int | None = None):
        allowed = layout.sees_RSS[
            row, layout.segments_RL[row, query], layout.segments_RL[row, key]
        ] & (key <= query)
        if window is not None:
            near = positions_RL[row, query] - positions_RL[row, key] < window
            allowed = allowed & near
        return allowed

    return sees


def _prepared(
    sees: Callable[..., Tensor],
    window: int | None,
    layout: Layout,
    config: PretrainedConfig,
    dtype: torch.dtype,
) -> Any:
    rows, length = layout.index_RL.shape
    device = layout.index_RL.device
    if config._attn_implementation == "flex_attention":
        return create_block_mask(
            lambda b, h, q, k: sees(b, h, q, k, window), rows, None, length, length, device
        )
    row = torch.arange(rows, device=device)[:, None, None, None]
    place = torch.arange(length, device=device)
    mask = sees(row, None, place[:, None], place, window)  # [R, 1, L, L]
    if config._attn_implementation == "eager":
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return mask


class PackedForest:
    """What the packed attention needs of a forest, made once per batch and used by every layer."""

    def __init__(self, forest: Forest):
        self.lengths = forest.lengths
        self.parents = forest.parents
        self.paths = [forest.path(segment) for segment in range(len(forest.parents))]
        self._masks: dict[tuple, Tensor] = {}
        self._varlen: tuple[Tensor, dict[str, Any]] | None = None

    def mask(self, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor | None:
        """Return an additive mask [queries, keys], the last query seeing the last key.

        None where plain causal attention does it.
        """
        if window is not None and keys <= window:
            window = None
        if queries == keys and window is None:
            return None
        key = (queries, keys, window, like.dtype, like.device)
        if key not in self._masks:
            ones = torch.ones(queries, keys, dtype=torch.bool, device=like.device)
            allowed = ones.tril(keys - queries)
            if window is not None:
                allowed &= ones.triu(keys - queries - window + 1)
            self._masks[key] = torch.zeros_like(ones, dtype=like.dtype).masked_fill(
                ~allowed, -torch.inf
            )
        return self._masks[key]

    def varlen(self, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
        """Return every segment as a query whose keys are its whole path.

        Returns:
            The keys' places among the packed tokens, and what transformers' FlashAttention takes
            for sequences of any length: the boundaries of queries and of keys, the longest ones.
        """
        if self._varlen is None:
            self._varlen = self._make_varlen(device)
        return self._varlen

    def _make_varlen(self, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
        tokens = torch.arange(sum(self.lengths)).split(self.lengths)
        keys = [torch.cat([tokens[segment] for segment in path]) for path in self.paths]
        key_lengths = list(map(len, keys))

        def boundaries(lengths: list[int]) -> Tensor:
            return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)

        return torch.cat(keys).to(device), {
            "cu_seq_lens_q": boundaries(self.lengths),
            "cu_seq_lens_k": boundaries(key_lengths),
            "max_length_q": max(self.lengths),
            "max_length_k": max(key_lengths),
        }


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    amopo_forest: PackedForest | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend over packed segments, one kernel call per segment; SDPA's own without a forest.

    A segment's queries meet the keys of its path alone, so nothing is computed to be masked away
    but the upper half of a response's own square: fewer scores than causal attention over whole
    sequences.

    Args:
        query: [1, heads, N, D]; key and value [1, key heads, N, D].

    Returns:
        [1, N, heads, D]
    """
    if amopo_forest is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if unknown := [name for name in UNKNOWN_SCORES if kwargs.get(name) is not None]:
        raise NotImplementedError(f"packed attention does not know {', '.join(unknown)}")
    window = kwargs.get("sliding_window")
    groups = query.shape[1] // key.shape[1]
    # One split instead of slices: its backward is one concatenation, not a zero-filled [N] each.
    queries, keys, values = (
        states.split(amopo_forest.lengths, dim=2)
        for states in (query, repeat_kv(key, groups), repeat_kv(value, groups))
    )
    outputs = []
    for segment, path in enumerate(amopo_forest.paths):
        q = queries[segment]
        k = torch.cat([keys[i] for i in path], dim=2)
        v = torch.cat([values[i] for i in path], dim=2)
        mask = amopo_forest.mask(q.shape[2], k.shape[2], window, q)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def packed_flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    amopo_forest: PackedForest | None = None,
    *,
    implementation: str,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend in one call of FlashAttention's variable-length kernel, through transformers.

    The kernel aligns its causal mask to the last query and the last key, which is what a segment
    behind its path needs.
    """
    target_dtype = get_target_dtype(query, module)
    varlen: dict[str, Any] = {}
    if amopo_forest is not None:
        places, varlen = amopo_forest.varlen(query.device)
        key, value, attention_mask = key[:, :, places], value[:, :, places], None
    output = _flash_attention_forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask,
        query_length=query.shape[2],
        is_causal=True,
        softmax_scale=scaling,
        target_dtype=target_dtype,
        attn_implementation=implementation,
        **varlen,
        **{name: option for name, option in kwargs.items() if name != "is_causal"},
    )
    return output, None


AttentionInterface.register(PACKED["sdpa"], packed_sdpa)
AttentionMaskInterface.register(PACKED["sdpa"], sdpa_mask)
for _name in FLASH:
    AttentionInterface.register(PACKED[_name], partial(packed_flash, implementation=_name))
    AttentionMaskInterface.register(PACKED[_name], flash_attention_mask)
