"""The yardstick of the decode kernels: the same attention in float64, through ``packing`` and ``attention``."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvtool import packing
from kvtool.attention import Attended, attend, logits
from kvtool.kernels.packed import Codec, Packed


def reference(
    queries: Tensor, kv: Packed, codec: Codec, *, scale: float, softcap: float | None = None, bias: Tensor | None = None
) -> Attended:
    """What ``attend_packed`` computes, of every page; same arguments."""
    H, D = kv.key_pages.shape[1], queries.shape[-1]
    dims, value_dims = len(codec.key_widths) * packing.GROUP, len(codec.value_widths) * packing.GROUP
    key_codes = packing.unpack_keys(kv.key_pages, codec.key_widths, dims)
    value_codes = packing.unpack_values(kv.value_pages, codec.value_widths, value_dims)
    keys = _decoded(key_codes, kv.key_scales, codec.key_levels, codec.key_widths)
    values = _decoded(value_codes, kv.value_scales, codec.value_levels, codec.value_widths) @ codec.value_map.double()
    group = queries.shape[1] // H
    turned = queries.double() @ codec.key_map.double().expand(H, D, dims).repeat_interleave(group, 0)
    if bias is None:
        return attend(turned, keys, values, scale=scale, softcap=softcap)
    scores = logits(turned, keys, scale=scale).flatten(1, 2) + bias.double()  # [B, HQ, S, T]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return Attended(scores.softmax(-1) @ values.repeat_interleave(group, 1), scores.logsumexp(-1))


def decoded_levels(levels: Mapping[int, Tensor], width: int) -> Tensor:
    """The level of every code of ``width`` bits, float32 [2^width]."""
    if width in (2, 3, 4):
        return levels[width].float()
    codes = torch.arange(1 << width, dtype=torch.float32)
    return {0: 0 * codes, 1: 2 * codes - 1, 8: codes - 127.5}[width]


def _decoded(codes: Tensor, scales: Tensor, levels: Mapping[int, Tensor], widths: Sequence[int]) -> Tensor:
    parts = [
        decoded_levels(levels, width).to(codes.device).double()[group.int()]
        for group, width in zip(codes.split(packing.GROUP, -1), widths, strict=True)
    ]
    decoded = torch.cat(parts, -1)
    if scales.dtype == torch.uint8:
        gains = torch.exp2(packing.unpack_nibbles(scales, len(widths)).double() / 2)  # [B, H, groups, T]
        return decoded * gains.mT.repeat_interleave(packing.GROUP, -1)
    return decoded * packing.unpack_tokens(scales).double()[..., None]
