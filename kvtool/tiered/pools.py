"""Where the blocks of a tiered cache lie: one pool per tier.

A pool holds the units of one tier (``tiered/places.py``), in the order of their numbers, as its codec packed them: the
fields of the codec's NamedTuple with a row per unit, [B, units, ...]. The tier of every unit is all it takes to find
its row, and blocks come back in the order of their positions whatever has moved.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvtool.methods.base import LayerCalibration, Method, mapped
from kvtool.methods.finite import require_finite
from kvtool.packing import PAGE
from kvtool.tiered.places import FRESH


class TieredKV(NamedTuple):
    """U units; unit n * H + h is block n of head h.

    tier: uint8 [B, U]. score: float32 [B, U], running mean of the squared share of the softmax. moved: int32 [B, U],
    queries seen when the unit last moved. like: [B, 0], the model's dtype.
    hot, warm, cold, archive: NamedTuples of their codecs with fields [B, units, ...], or () when nobody is there.
    """

    tier: Tensor
    score: Tensor
    moved: Tensor
    like: Tensor
    hot: Any = ()
    warm: Any = ()
    cold: Any = ()
    archive: Any = ()

    @property
    def pools(self) -> tuple[Any, Any, Any, Any]:
        """The four tiers in order."""
        return self.hot, self.warm, self.cold, self.archive


class Codec(NamedTuple):
    """How one tier stores a block: a method and its share of the calibration."""

    method: Method
    layer: LayerCalibration


class Source(NamedTuple):
    """Keys and values [B, H, M, 64, D] of some blocks, [M]; original: [B, H, M], whether they are as the model left
    them."""

    blocks: Tensor
    keys: Tensor
    values: Tensor
    original: Tensor


def restore(kv: TieredKV, codecs: Sequence[Codec], blocks: Tensor, first: int, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, M, 64, D] of ``blocks`` [M]; in the model's dtype if all are hot, else float32."""
    B, D = len(kv.tier), codecs[0].layer.shape.head_dim
    tier = kv.tier.unflatten(1, (-1, heads))[:, blocks]  # [B, M, H]
    dtype = kv.like.dtype if not tier.any() else torch.float32
    keys, values = (torch.zeros(B, heads, len(blocks), PAGE, D, dtype=dtype, device=tier.device) for _ in range(2))
    for t, (codec, pool) in enumerate(zip(codecs, kv.pools, strict=True)):
        here = tier == t
        some = here.any(2).any(0).nonzero().squeeze(1)
        if not len(some):
            continue
        # units of other tiers read a wrong row, which is masked out below
        rows = _rows(kv.tier, t).unflatten(1, (-1, heads))[:, blocks[some]].flatten(1)
        packed = _as_tokens(_pick(pool, rows), heads)
        read = codec.method.decompress(packed, codec.layer, positions=_positions(blocks[some], first))
        mask = here[:, some].mT[..., None, None]
        for whole, part in ((keys, read.keys), (values, read.values)):
            whole[:, :, some] = torch.where(mask, part.unflatten(2, (-1, PAGE)).to(dtype), whole[:, :, some])
    return keys, values


def rebuild(
    kv: TieredKV, tier: Tensor, source: Source, codecs: Sequence[Codec], first: int, heads: int
) -> tuple[Any, ...]:
    """The four pools when units change from ``kv.tier`` [B, U'] to ``tier`` [B, U]; ``source`` has those that do."""
    U = tier.shape[1]
    old = torch.nn.functional.pad(kv.tier, (0, U - kv.tier.shape[1]), value=FRESH)
    unit = torch.arange(U, device=tier.device)
    pools = []
    for t, (codec, pool) in enumerate(zip(codecs, kv.pools, strict=True)):
        belongs, stays = tier == t, (tier == t) & (old == t)
        row = _rows(old, t)
        # a block is packed for all heads and sequences, also if only one of its units comes here
        enters = (belongs & ~stays).unflatten(1, (-1, heads)).any(2).any(0)[source.blocks]
        if enters.any():
            used = source.blocks[enters]
            packed, _ = codec.method.compress(
                source.keys[:, :, enters].flatten(2, 3),
                source.values[:, :, enters].flatten(2, 3),
                codec.layer,
                positions=_positions(used, first),
            )
            if t == 0:
                packed = mapped(packed, lambda x: x.to(half(kv.like.dtype)))
                require_finite(packed, codec.layer.index)
            packed = _as_rows(packed, len(used))
            at = torch.zeros(U // heads, dtype=torch.int64, device=tier.device)
            at[used] = torch.arange(len(used), device=tier.device)
            row = row.where(stays, int((old[0] == t).sum()) + at[unit // heads] * heads + unit % heads)
            pool = type(packed)(*(torch.cat(x, 1) for x in zip(pool, packed, strict=True))) if pool else packed
        elif bool((belongs == (old == t)).all()):
            pools.append(pool)
            continue
        wanted = row[belongs].unflatten(0, (len(tier), -1))
        pools.append(_pick(pool, wanted) if wanted.numel() else ())
    return tuple(pools)


def _rows(tier: Tensor, t: int) -> Tensor:
    """The row of each unit in the pool of tier ``t``; of others that of the one before."""
    return ((tier == t).cumsum(1) - 1).clamp(min=0)


def _pick(pool: Any, rows: Tensor) -> Any:
    """``rows`` [B, M] of every field [B, units, ...]."""
    return mapped(pool, lambda x: x[torch.arange(len(x), device=x.device)[:, None], rows])


def _as_rows(packed: Any, blocks: int) -> Any:
    """A codec's fields [B, H, M * k, ...] to [B, M * H, k, ...]."""
    return mapped(packed, lambda x: x.unflatten(2, (blocks, x.shape[2] // blocks)).transpose(1, 2).flatten(1, 2))


def _as_tokens(pool: Any, heads: int) -> Any:
    """The inverse of :func:`_as_rows`."""
    return mapped(pool, lambda x: x.unflatten(1, (-1, heads)).transpose(1, 2).flatten(2, 3))


def _positions(blocks: Tensor, first: int) -> Tensor:
    return (first + PAGE * blocks[:, None] + torch.arange(PAGE, device=blocks.device)).flatten()


def half(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type of what is called exact: the model's own if it has 16 bits."""
    return dtype if dtype.itemsize == 2 else torch.float16
