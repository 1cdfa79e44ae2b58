"""Where the blocks of a tiered cache lie: one pool per tier, and the originals that host memory still has.

A pool holds the units of one tier (``tiered/places.py``), in the order of their numbers, as its codec packed them: the
fields of the codec's NamedTuple with a row per unit, [B, units, ...]. The tier of every unit is all it takes to find
its row, and blocks come back in the order of their positions whatever has moved.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvtool.errors import ModelError
from kvtool.methods.base import LayerCalibration, Method, mapped
from kvtool.methods.finite import require_finite
from kvtool.packing import PAGE
from kvtool.tiered.places import FRESH

HOST_BOOKS = 8 + 8  # bytes of an original's number and last use


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


class Host(NamedTuple):
    """Originals in host memory, at most as many as the budget holds.

    keys, values: 16-bit [B, M, 64, D]. unit: int64 [B, M], whose they are; -1 for nobody's. used: int64 [B, M], queries
    seen when the unit last was stored or mattered.
    """

    keys: Tensor
    values: Tensor
    unit: Tensor
    used: Tensor


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


def empty_host(keys: Tensor) -> Host:
    """Nothing held, for a cache like ``keys`` [B, H, T, D]."""
    nothing = torch.empty(len(keys), 0, PAGE, keys.shape[-1], dtype=half(keys.dtype))
    none = torch.empty(len(keys), 0, dtype=torch.int64)
    return Host(nothing, nothing, none, none)


def half(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type of what is called exact: the model's own if it has 16 bits."""
    return dtype if dtype.itemsize == 2 else torch.float16


def held(host: Host, units: int) -> Tensor:
    """Whether the original of each unit is there, bool [B, U], on the CPU."""
    return _slots(host, units) >= 0


def recall(host: Host, source: Source, units: int) -> Source:
    """``source`` with the originals that the host has in place of what was read back from codes."""
    H = source.keys.shape[1]
    keys, values, original = source.keys.clone(), source.values.clone(), source.original.clone()
    slots = _slots(host, units)[:, _units(source, H)]
    for b in range(len(slots)):
        n = (slots[b] >= 0).nonzero().squeeze(1)
        for mine, theirs in ((keys, host.keys), (values, host.values)):
            mine[b, n % H, n // H] = theirs[b, slots[b, n]].to(mine)
        original[b, n % H, n // H] = True
    return source._replace(keys=keys, values=values, original=original)


def store(host: Host, source: Source, tier: Tensor, touched: Tensor, step: int, capacity: int) -> Host:
    """The host after a move: the originals of units that are not hot, the least recently used dropped first.

    touched: bool [B, U], units that mattered to the queries just seen; of equals the newest stay.

    Raises:
        ModelError: the memory cannot be had.
    """
    U, H = tier.shape[1], source.keys.shape[1]
    slots, units = _slots(host, U), _units(source, H)
    used = _by_unit(host, host.used, U)
    used[touched.cpu() & (slots >= 0)] = step
    places = torch.full_like(slots, -1)  # where source has an original
    places[:, units] = torch.arange(len(units)).where(source.original.transpose(1, 2).flatten(1).cpu(), -1)
    used[(places >= 0) & (slots < 0)] = step
    used[tier.cpu() == 0] = -1
    M = min(capacity, int((used >= 0).sum(1).max()))
    order = (used * U + torch.arange(U)).where(used >= 0, -1)
    kept = order.topk(M, 1).indices.sort(1).values
    there = used.gather(1, kept)
    if torch.equal(kept.where(there >= 0, -1), host.unit):
        return host._replace(used=there)
    try:
        keys, values = (
            _copied(old, new, slots.gather(1, kept), places.gather(1, kept))
            for old, new in ((host.keys, source.keys), (host.values, source.values))
        )
    except (RuntimeError, MemoryError) as error:
        size = 4 * kept.numel() * PAGE * source.keys.shape[-1]
        raise ModelError(
            f"tiered: expected {size} bytes of host memory for the originals of one layer, found less; "
            "use a smaller -o host_mib"
        ) from error
    return Host(keys, values, kept.where(there >= 0, -1), there)


def _copied(old: Tensor, new: Tensor, slots: Tensor, places: Tensor) -> Tensor:
    """Rows of ``old`` [B, M', 64, D] at ``slots`` [B, M], or else of ``new`` [B, H, M'', 64, D] at ``places``."""
    B, H = new.shape[:2]
    copy = torch.zeros(*slots.shape, *old.shape[2:], dtype=old.dtype)
    for b in range(B):
        stays = slots[b] >= 0
        comes = ~stays & (places[b] >= 0)
        copy[b, stays] = old[b, slots[b, stays]]
        n = places[b, comes]
        copy[b, comes] = new[b, n % H, n // H].to(copy)
    return copy


def _units(source: Source, heads: int) -> Tensor:
    """The numbers of the units of ``source``, [M * H], on the CPU."""
    return (source.blocks.cpu()[:, None] * heads + torch.arange(heads)).flatten()


def _slots(host: Host, units: int) -> Tensor:
    """Where the host has each unit, int64 [B, U]; -1: nowhere."""
    return _by_unit(host, torch.arange(host.unit.shape[1]).expand_as(host.unit), units)


def _by_unit(host: Host, x: Tensor, units: int) -> Tensor:
    """``x`` [B, M] of the host's slots by unit, [B, U]; -1 for those it does not have."""
    found = torch.full((len(x), units + 1), -1)
    return found.scatter_(1, host.unit.where(host.unit >= 0, units), x)[:, :units]
