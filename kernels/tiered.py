"""tiered on the kernels: each tier is a part of its own, and every block says what it weighs.

Cold and archive are turboquant pages in pools; which of a head's blocks lie in a pool, and in which row, are a page
table and a kind per block, so one launch of ``decode.py`` a tier reads them and writes the lse of each. Hot and warm
units are few, and each is attended to as if it were a cache of 64 tokens: by torch in 16 bits, by ``decode_affine.py``
in 8. From the lse of the blocks follow the shares of the softmax that move them.
"""

from typing import Any

import torch
from torch import Tensor

from kvtool import attention, packing
from kvtool.attention import Attended
from kvtool.kernels import affine
from kvtool.kernels.launch import check_queries, default_launch, refuse
from kvtool.kernels.mean import mean_bias
from kvtool.kernels.packed import Packed, attend_packed
from kvtool.kernels.turboquant import codec_of
from kvtool.methods.base import LayerCalibration, mapped
from kvtool.methods.tiered import Tiered
from kvtool.tiered.pools import Codec, TieredKV

_HOT, _WARM = 0, 1


def refuses(method: Tiered, *, gluon: bool = False) -> str | None:
    """Why there is no kernel; None if there is one."""
    return "tiered has pages of several kinds, which only the triton back end reads" if gluon else None


def attend(
    method: Tiered,
    queries: Tensor,
    kv: TieredKV,
    layer: LayerCalibration,
    *,
    positions: Tensor,
    scale: float,
    softcap: float | None = None,
    gluon: bool = False,
) -> Attended:
    """As ``Tiered.attend``."""
    return attend_blocks(method, queries, kv, layer, positions=positions, scale=scale, softcap=softcap)[0]


def attend_blocks(
    method: Tiered,
    queries: Tensor,
    kv: TieredKV,
    layer: LayerCalibration,
    *,
    positions: Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[Attended, Tensor]:
    """Attention of ``queries`` [B, HQ, S, D] over all tiers, and the lse of every block, [B, HQ, S, N]."""
    B, HQ, S, D = queries.shape
    H = layer.shape.num_kv_heads
    check_queries(queries, H, layer.shape.head_dim)
    if kv.tier.shape[0] != B or kv.tier.shape[1] * packing.PAGE != H * len(positions):
        found = f"{kv.tier.shape[0]} sequences of {kv.tier.shape[1] // H} blocks"
        refuse("cache", f"{B} sequences of {len(positions) // packing.PAGE} blocks", found)
    if kv.hot and kv.hot[0].shape[-1] != D:
        refuse("hot blocks", f"{D} channels", kv.hot[0].shape[-1])
    tiers = kv.tier.unflatten(1, (-1, H)).mT.contiguous()  # [B, H, N]
    lse = torch.full((B, HQ, S, tiers.shape[2]), -torch.inf, device=queries.device)
    parts = [Attended(queries.new_zeros(B, HQ, S, D, dtype=torch.float32), lse.new_full((B, HQ, S), -torch.inf))]
    for tier, (codec, pool) in enumerate(zip(method.codecs(layer), kv.pools, strict=True)):
        if pool:
            read = _units if tier <= _WARM else _pages
            parts.append(read(queries, kv.tier, tiers, tier, codec, pool, positions, scale, softcap, lse))
    return attention.merge(*parts), lse


def _pages(
    queries: Tensor,
    unit_tiers: Tensor,
    tiers: Tensor,
    tier: int,
    codec: Codec,
    pool: Any,
    positions: Tensor,
    scale: float,
    softcap: float | None,
    lse: Tensor,
) -> Attended:
    """Attention over one coded tier; fills its blocks of ``lse``."""
    B, H, _ = tiers.shape
    units = pool.key_pages.shape[1]
    # a unit's row is how many of the tier came before; of a unit that is not in the tier nothing is read
    rows = ((unit_tiers == tier).cumsum(1) - 1).clamp(min=0) + units * torch.arange(B, device=tiers.device)[:, None]
    table = rows.unflatten(1, (-1, H)).mT.to(torch.int32).contiguous()
    fields = (pool.key_pages, pool.key_scales, pool.value_pages, pool.value_scales)
    pages = Packed(*(x.flatten(0, 2)[None, None].expand(1, H, -1, -1) for x in fields))
    bias = unit = None
    if codec.method.mean != "none":
        rope = codec.layer.rope if codec.method.mean == "rotated" else None
        bias, unit = mean_bias(queries, codec.layer["key_mean"], rope, positions, scale)
    return attend_packed(
        queries,
        pages,
        codec_of(codec.method, codec.layer),
        scale=scale,
        softcap=softcap,
        page_table=table,
        bias=bias,
        bias_unit=unit,
        kinds=tiers,
        kind=tier,
        page_lse=lse,
        launch=default_launch(queries.device, False),
    )


def _units(
    queries: Tensor,
    unit_tiers: Tensor,
    tiers: Tensor,
    tier: int,
    codec: Codec,
    pool: Any,
    positions: Tensor,
    scale: float,
    softcap: float | None,
    lse: Tensor,
) -> Attended:
    """Attention over a tier of few units, each a sequence of its own; fills their blocks of ``lse``."""
    B, HQ, S, D = queries.shape
    H = tiers.shape[1]
    units = pool[0].shape[1]
    # the numbers of the tier's units, in order
    unit = (unit_tiers != tier).to(torch.uint8).argsort(dim=1, stable=True)[:, :units]
    sequence, head, block = torch.arange(B, device=unit.device)[:, None], unit % H, unit // H
    asked = queries.unflatten(1, (H, -1))[sequence, head].flatten(0, 1)  # [B * units, G, S, D]
    alone = mapped(pool, lambda x: x.flatten(0, 1)[:, None])
    if tier == _HOT:
        found = attention.attend(asked, *alone, scale=scale, softcap=softcap)
    else:
        found = affine.attend(
            codec.method, asked, alone, codec.layer, positions=positions, scale=scale, softcap=softcap
        )
    here = found.lse.unflatten(0, (B, units))  # [B, units, G, S]
    lse.unflatten(1, (H, -1)).permute(0, 1, 4, 2, 3)[sequence, head, block] = here
    mine = lse.unflatten(1, (H, -1)).masked_fill((tiers != tier)[:, :, None, None], -torch.inf)
    whole = mine.logsumexp(-1)  # [B, H, G, S]
    share = (here - whole[sequence, head]).exp()
    out = queries.new_zeros(B, H, HQ // H, S, D, dtype=torch.float32)
    out.index_put_((sequence, head), share[..., None] * found.out.unflatten(0, (B, units)), accumulate=True)
    return Attended(out.flatten(1, 2), whole.flatten(1, 2))
