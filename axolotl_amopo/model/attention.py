"""Attention over a forest of segments: masks for the model's own attention, and one of ours.

Three of transformers' interfaces are used, all public: a prepared 4D mask is passed through to
the attention (https://huggingface.co/docs/transformers/en/attention_interface), attention
functions are registered by name, and keyword arguments of the model's forward reach them.
"""

import re
from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask, sdpa_mask
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.utils.generic import is_flash_attention_requested

from axolotl_amopo.model.forest import Forest
from axolotl_amopo.model.layout import Layout

# What our own attention functions are registered under begins so.
PREFIX = "amopo_packed_"
PACKED_SDPA = f"{PREFIX}sdpa"
# Keywords that change the scores, which SDPA can't follow.
UNKNOWN_SCORES = ("softcap", "s_aux", "position_bias", "cache")


def packed_name(implementation: str) -> str | None:
    """Return the name of an attention implementation's packed counterpart; None if it has none.

    Every kind of FlashAttention has one, by whatever name: where the package is missing,
    transformers replaces `flash_attention_2` by the name of a repository of kernels.
    """
    if implementation.startswith(PREFIX):
        return implementation
    if implementation == "sdpa":
        return PACKED_SDPA
    if not is_flash_attention_requested(requested_attention_implementation=implementation):
        return None
    # transformers takes a name with "flash" or a slash in it for a kernel to be downloaded.
    name = PREFIX + re.sub(r"\W", "_", implementation.replace("flash", "varlen"))
    AttentionInterface.register(name, partial(packed_flash, implementation=implementation))
    AttentionMaskInterface.register(name, flash_attention_mask)
    return name


def attention_inputs(
    layout: Layout, positions_RL: Tensor, config: PretrainedConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """Return keyword arguments of the model's forward that make its attention follow the layout.

    Args:
        layout: on the model's device.
        positions_RL: positions of the layout's tokens.
        config: the text model's.
        dtype: in which the attention computes; a mask that is added to its scores has it.
    """
    if layout.name == "sequences":
        return {"attention_mask": (layout.index_RL >= 0).long()}
    if layout.name == "packed":
        # Any 4D mask is passed through, which keeps transformers from making one of [N, N].
        anything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=positions_RL.device)
        padding = layout.index_RL.shape[1] - sum(layout.forest.lengths)
        return {"attention_mask": anything, "amopo_forest": PackedForest(layout.forest, padding)}

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
            # Not their difference, which would be eight bytes per entry of the mask.
            allowed = allowed & (positions_RL[row, query] < positions_RL[row, key] + window)
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
    # On a GPU, SDPA would make a boolean mask into one to add in every layer, and keep them all.
    if config._attn_implementation == "eager" or mask.is_cuda:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return mask


class PackedForest:
    """What the packed attention needs of a forest, made once per batch and used by every layer."""

    def __init__(self, forest: Forest, padding: int = 0):
        """Make it of a forest, with a segment of its own for the tokens that pad the row."""
        self.lengths = forest.lengths + [padding] * (padding > 0)
        self.paths = [forest.path(segment) for segment in range(len(forest.parents))]
        self.paths += [[len(self.paths)]] * (padding > 0)
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
    """Attend over packed segments; SDPA's own without a forest.

    A segment's queries meet the keys of its path alone, so nothing is computed to be masked away
    but the upper half of a response's own square: fewer scores than causal attention over whole
    sequences. On a GPU that is one kernel call (`packed_varlen`), elsewhere one per segment.

    Args:
        query: [1, heads, N, D]; key and value [1, key heads, N, D].

    Returns:
        [1, N, heads, D]

    Raises:
        NotImplementedError: for what would change the scores in a way that SDPA doesn't know.
    """
    if amopo_forest is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if unknown := [name for name in UNKNOWN_SCORES if kwargs.get(name) is not None]:
        raise NotImplementedError(f"packed attention does not know {', '.join(unknown)}")
    window = kwargs.get("sliding_window")
    if query.is_cuda:
        if dropout:
            raise NotImplementedError("packed attention does not know attention_dropout on a GPU")
        return packed_varlen(module, query, key, value, amopo_forest, window, scaling), None
    # One split instead of slices: its backward is one concatenation, not a zero-filled [N] each.
    queries, keys, values = (
        states.split(amopo_forest.lengths, dim=2) for states in (query, key, value)
    )
    outputs = []
    for segment, path in enumerate(amopo_forest.paths):
        q = queries[segment]
        k = torch.cat([keys[i] for i in path], dim=2)
        v = torch.cat([values[i] for i in path], dim=2)
        mask = amopo_forest.mask(q.shape[2], k.shape[2], window, q)
        outputs.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                # Key heads that several query heads share are not written out, nor kept, for each.
                enable_gqa=True,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def packed_varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: PackedForest,
    window: int | None,
    scaling: float | None,
) -> Tensor:
    """Attend over packed segments in one call of torch's own variable-length kernel.

    It takes 16-bit numbers on a GPU alone, and how it aligns its causal mask is not documented
    (https://docs.pytorch.org/docs/stable/nn.attention.varlen.html): see `choose`, where a model
    has to show it.

    Args:
        query: [1, heads, N, D]; key and value [1, key heads, N, D].

    Returns:
        [1, N, heads, D]
    """
    places, varlen = forest.varlen(query.device)
    size, target_dtype = value.shape[-1], get_target_dtype(query, module) or query.dtype
    query, key, value = (
        states.to(target_dtype)[0].transpose(0, 1)  # [N, heads, D]
        for states in (query, key, _as_wide_as(value, query))
    )
    output: Any = varlen_attn(
        query,
        key.index_select(0, places),
        value.index_select(0, places),
        varlen["cu_seq_lens_q"],
        varlen["cu_seq_lens_k"],
        varlen["max_length_q"],
        varlen["max_length_k"],
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **_grouped(varlen_attn),
    )
    return output[..., :size].unsqueeze(0)


@cache
def _grouped(kernel: Callable) -> dict[str, Any]:
    """Return the option with which a kernel takes fewer key heads than query heads.

    It also keeps cuDNN out, which plans anew for every shape and aligns its mask otherwise. Torch
    2.11 has neither: by its source it groups heads unasked, and never asks cuDNN
    (torch/nn/attention/varlen.py).
    """
    return {"enable_gqa": True} if "enable_gqa" in signature(kernel).parameters else {}


def _as_wide_as(value: Tensor, query: Tensor) -> Tensor:
    """Pad values to the size of the queries' heads, which kernels want (in MLA it is larger)."""
    return F.pad(value, [0, query.shape[-1] - value.shape[-1]])


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
    size = value.shape[-1]
    value = _as_wide_as(value, query)
    if amopo_forest is not None:
        # Not with brackets, whose gradient sorts the places.
        places, varlen = amopo_forest.varlen(query.device)
        key, value = key.index_select(2, places), value.index_select(2, places)
        attention_mask = None
    if (sinks := kwargs.get("s_aux")) is not None:
        kwargs["s_aux"] = sinks.to(target_dtype or query.dtype)
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
    return output[..., :size], None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
