"""affine on the kernels: the codes of a page with the ranges of its tokens or of its channels."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool import packing
from kvtool.attention import Attended
from kvtool.kernels import decode_affine
from kvtool.kernels.launch import (
    Launch,
    check_counts,
    check_pages,
    check_queries,
    check_stored,
    full,
    merged,
    nvidia,
    refuse,
    tiles_of,
)
from kvtool.kernels.packed import LOG2E, table
from kvtool.methods.affine import Affine, AffineKV
from kvtool.methods.base import LayerCalibration

WARPS = 4


def refuses(method: Affine, *, gluon: bool = False) -> str | None:
    """Why there is no kernel; None if there is one."""
    return "affine has ranges of channels, which only the triton back end reads" if gluon else None


def attend(
    method: Affine,
    queries: Tensor,
    kv: AffineKV,
    layer: LayerCalibration,
    *,
    positions: Tensor,
    scale: float,
    softcap: float | None = None,
    gluon: bool = False,
    pages: Tensor | None = None,
) -> Attended:
    """As ``Affine.attend``, over the first ``pages`` [B] of every head."""
    B, HQ, S, D = queries.shape
    H, N = kv.key_pages.shape[1:3]
    check(method, queries, kv, pages)
    device = queries.device
    launch, groups = Launch(warps=WARPS), packing.groups(D)
    tiles = tiles_of(queries, H)
    used, rows, blocks, programs, dims = tiles
    splits = launch.splits_of(tiles, N, 2, device)
    query = (scale * LOG2E * queries.float()).reshape(B * H, used, D)
    query = F.pad(query, (0, packing.GROUP * groups - D, 0, blocks * rows - used)).contiguous()
    out = torch.empty(programs, splits, rows, packing.GROUP * groups, device=device)
    lse = torch.empty(programs, splits, rows, device=device)
    words = kv.key_pages.view(torch.int32), kv.value_pages.view(torch.int32)
    key_width, value_width = (bits if bits <= 4 else 8 for bits in (method.k_bits, method.v_bits))
    decode_affine.decode[(programs, splits)](
        query,
        *words,
        kv.key_scales,
        kv.key_minima,
        kv.value_scales,
        kv.value_minima,
        code_tables(device),
        full(B, N, device) if pages is None else pages,
        out,
        lse,
        splits,
        *(stride for pages in words for stride in pages.stride()[:3]),
        *kv.key_scales.stride()[:4],
        *kv.value_scales.stride()[:4],
        (softcap or 0.0) * LOG2E,
        D=D,
        GROUPS=groups,
        KEY_WIDTH=key_width,
        VALUE_WIDTH=value_width,
        KEY_UNIT=decode_affine.UNIT[key_width],
        VALUE_UNIT=decode_affine.UNIT[value_width],
        KEY_ZERO=decode_affine.ZERO[key_width],
        VALUE_ZERO=decode_affine.ZERO[value_width],
        KEY_SPAN=_span(method.k_axis, method.k_group, groups),
        VALUE_SPAN=_span(method.v_axis, method.v_group, groups),
        KEY_PER_TOKEN=method.k_axis == "token",
        VALUE_PER_TOKEN=method.v_axis == "token",
        CAPPED=softcap is not None,
        STAGES=3,
        WARPS=WARPS,
        ASM=nvidia(device),
        num_warps=WARPS,
        **dims,
    )
    return merged(out, lse, identity(packing.GROUP * groups, D, device), (B, HQ, S, D), dims, False)


def check(method: Affine, queries: Tensor, kv: AffineKV, pages: Tensor | None = None) -> None:
    """Refuse what the kernel does not serve.

    Raises:
        BackendError: in one sentence.
    """
    H, D = kv.key_pages.shape[1], queries.shape[-1]
    check_queries(queries, H)
    check_counts(kv._asdict(), None, pages, len(queries))
    for name, stored, bits in (
        ("key_pages", kv.key_pages, method.k_bits),
        ("value_pages", kv.value_pages, method.v_bits),
    ):
        size = packing.page_bytes([bits if bits <= 4 else 8] * packing.groups(D))
        check_stored(name, stored, queries, H, torch.uint8, size)
        check_pages(name, stored)
    for name, scales, minima, axis, group in (
        ("keys' ranges", kv.key_scales, kv.key_minima, method.k_axis, method.k_group),
        ("values' ranges", kv.value_scales, kv.value_minima, method.v_axis, method.v_group),
    ):
        for stored in (scales, minima):
            check_stored(name, stored, queries, H, torch.float16, *_ranges(axis, group, D))
        if scales.stride() != minima.stride() or scales.stride(-1) != 1:
            refuse(name, "contiguous rows, minima lying as scales do", f"{scales.stride()} and {minima.stride()}")


def _ranges(axis: str, group: int, D: int) -> tuple[int, int]:
    """What a page has of steps: for ranges of tokens, and channels, or for ranges of channels, and tokens."""
    if axis == "channel":
        return packing.PAGE // (group or packing.PAGE), D
    return -(-D // min(group or D, D)), packing.PAGE


def _span(axis: str, group: int, groups: int) -> int:
    """What one range covers: groups of 32 channels of a token, or tokens of a channel."""
    if axis == "channel":
        return group or packing.PAGE
    return min(group // packing.GROUP or groups, groups)


@lru_cache
def code_tables(device: torch.device) -> Tensor:
    """Tables that turn code c of 2, 3 or 4 bits into the byte ``decode_affine.UNIT`` * c."""
    # bytes UNIT * code; a table of 4 bits is given as 2 u - 127
    levels = {width: decode_affine.UNIT[width] * torch.arange(1 << width) for width in (2, 3, 4)}
    return table(levels | {4: 2 * levels[4] - 127}).to(device)


@lru_cache
def identity(channels: int, D: int, device: torch.device) -> Tensor:
    """The map of a method that stores the model's own ``D`` channels, padded: float32 [1, channels, D]."""
    return torch.eye(channels, D, device=device)[None]
