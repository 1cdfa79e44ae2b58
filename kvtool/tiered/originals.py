"""The originals of units that are not hot, without which nothing goes up: in host memory, and in a file besides.

The most recently used are in host memory, those used before them in the file, older ones nowhere. The file has no name
(it is removed while it is open) and goes with the process, whatever ends it. Its bytes are reserved before they are
mapped, so that a full disk is an error where it is asked for and not a signal where it is written.
"""

import math
import mmap
import os
import tempfile
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool import home
from kvtool.errors import ModelError
from kvtool.packing import PAGE
from kvtool.tiered.pools import Source, half

BOOKS = 8 + 8  # bytes of an original's number and last use


class Held(NamedTuple):
    """Originals in one place, at most as many as its budget holds.

    keys, values: 16-bit [B, M, 64, D]. unit: int64 [B, M], whose they are; -1 for nobody's. used: int64 [B, M], queries
    seen when the unit last was stored or mattered.
    """

    keys: Tensor
    values: Tensor
    unit: Tensor
    used: Tensor


class Originals(NamedTuple):
    """No unit is in both; the file's rows are written in place, so only the newest state can be read."""

    host: Held
    disk: Held


def nothing_held(keys: Tensor) -> Originals:
    """Nothing, for a cache like ``keys`` [B, H, T, D]."""
    nothing = torch.empty(len(keys), 0, PAGE, keys.shape[-1], dtype=half(keys.dtype))
    none = torch.empty(len(keys), 0, dtype=torch.int64)
    empty = Held(nothing, nothing, none, none)
    return Originals(empty, empty)


def held(originals: Originals, units: int) -> Tensor:
    """Whether the original of each unit is there, bool [B, U], on the CPU."""
    return (_slots(originals.host, units) >= 0) | (_slots(originals.disk, units) >= 0)


def recall(originals: Originals, source: Source, units: int) -> Source:
    """``source`` with the originals that are held in place of what was read back from codes."""
    H = source.keys.shape[1]
    keys, values, original = source.keys.clone(), source.values.clone(), source.original.clone()
    for place in originals:
        slots = _slots(place, units)[:, _units(source, H)]
        for b in range(len(slots)):
            n = (slots[b] >= 0).nonzero().squeeze(1)
            for mine, theirs in ((keys, place.keys), (values, place.values)):
                mine[b, n % H, n // H] = theirs[b, slots[b, n]].to(mine)
            original[b, n % H, n // H] = True
    return source._replace(keys=keys, values=values, original=original)


def store(
    originals: Originals, source: Source, tier: Tensor, touched: Tensor, step: int, rooms: tuple[int, int]
) -> Originals:
    """What is held after a move: the originals of units that are not hot, the least recently used dropped first.

    touched: bool [B, U], units that mattered to the queries just seen; of equals the newest stay. rooms: units that
    host and file have room for.

    Raises:
        ModelError: the memory or the file cannot be had.
    """
    U, H = tier.shape[1], source.keys.shape[1]
    units, where = _units(source, H), [_slots(place, U) for place in originals]
    used = torch.maximum(*(_by_unit(place, place.used, U) for place in originals))
    known = used >= 0
    used[touched.cpu() & known] = step
    fresh = torch.full_like(used, -1)  # where source has an original
    fresh[:, units] = torch.arange(len(units)).where(source.original.transpose(1, 2).flatten(1).cpu(), -1)
    used[(fresh >= 0) & ~known] = step
    used[tier.cpu() == 0] = -1
    M = min(sum(rooms), int((used >= 0).sum(1).max()))
    ranked = (used * U + torch.arange(U)).where(used >= 0, -1).topk(M, 1).indices
    found = _Found(originals, source, where, fresh)
    # the file's rows are read before they are written over
    host = _kept(found, ranked[:, : rooms[0]].sort(1).values, used)
    return Originals(host, _filed(found, ranked[:, rooms[0] :], used, rooms[1]))


class _Found(NamedTuple):
    """Where originals are before a move: slots [B, U] in host and file, and rows [B, U] of ``source``."""

    originals: Originals
    source: Source
    where: list[Tensor]
    fresh: Tensor

    def read(self, b: int, units: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [M, 64, D] of ``units`` [M], zeros for those that are nowhere."""
        H, like = self.source.keys.shape[1], self.originals.host.keys
        out = [torch.zeros(len(units), *like.shape[2:], dtype=like.dtype) for _ in range(2)]
        n = self.fresh[b, units]
        for copy, new in zip(out, (self.source.keys, self.source.values), strict=True):
            copy[n >= 0] = new[b, n[n >= 0] % H, n[n >= 0] // H].to(copy)
        # what is held comes before what source read back from it
        for place, slots in zip(self.originals, self.where, strict=True):
            at = slots[b, units]
            for copy, old in zip(out, (place.keys, place.values), strict=True):
                copy[at >= 0] = old[b, at[at >= 0]]
        return out[0], out[1]


def _kept(found: _Found, units: Tensor, used: Tensor) -> Held:
    """The originals of ``units`` [B, M] in host memory."""
    host, there = found.originals.host, used.gather(1, units)
    if torch.equal(units.where(there >= 0, -1), host.unit):
        return host._replace(used=there)
    try:
        rows = [found.read(b, units[b]) for b in range(len(units))]
        keys, values = (torch.stack(side) for side in zip(*rows, strict=True))
    except (RuntimeError, MemoryError) as error:
        size = 4 * units.numel() * PAGE * host.keys.shape[-1]
        raise ModelError(
            f"tiered: expected {size} bytes of host memory for the originals of one layer, found less; "
            "use a smaller -o host_mib"
        ) from error
    return Held(keys, values, units.where(there >= 0, -1), there)


def _filed(found: _Found, units: Tensor, used: Tensor, room: int) -> Held:
    """The originals of ``units`` [B, M] in the file: those that stay keep their rows, others fill what is free."""
    disk = found.originals.disk
    if units.shape[1] > disk.unit.shape[1]:
        disk = _grown(disk, min(room, max(units.shape[1], 2 * disk.unit.shape[1])))
    unit, last = torch.full_like(disk.unit, -1), torch.full_like(disk.used, -1)
    for b in range(len(units)):
        mine = units[b][used[b, units[b]] >= 0]
        at = found.where[1][b, mine]
        comes = at < 0
        taken = torch.zeros(disk.unit.shape[1], dtype=torch.bool)
        taken[at[~comes]] = True
        at[comes] = (~taken).nonzero().squeeze(1)[: int(comes.sum())]
        disk.keys[b, at[comes]], disk.values[b, at[comes]] = found.read(b, mine[comes])
        unit[b, at], last[b, at] = mine, used[b, mine]
    return Held(disk.keys, disk.values, unit, last)


def _grown(disk: Held, rows: int) -> Held:
    """The same in a file of ``rows`` rows."""
    B, had, *row = disk.keys.shape
    keys, values = (_mapped((B, rows, *row), disk.keys.dtype) for _ in range(2))
    keys[:, :had], values[:, :had] = disk.keys, disk.values
    more = torch.full((B, rows - had), -1)
    return Held(keys, values, torch.cat([disk.unit, more], 1), torch.cat([disk.used, more], 1))


def _mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a file without a name under $KVTOOL_HOME."""
    size, where = math.prod(shape) * dtype.itemsize, home.home()
    try:
        with tempfile.TemporaryFile(dir=where) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).reshape(shape)
    except OSError as error:
        raise ModelError(
            f"tiered: expected {size} bytes of disk under {where} for originals of one layer, found less or nowhere to "
            f"write ({error.strerror}); free some, set KVTOOL_HOME or use a smaller -o disk_mib"
        ) from error


def _units(source: Source, heads: int) -> Tensor:
    """The numbers of the units of ``source``, [M * H], on the CPU."""
    return (source.blocks.cpu()[:, None] * heads + torch.arange(heads)).flatten()


def _slots(place: Held, units: int) -> Tensor:
    """Where ``place`` has each unit, int64 [B, U]; -1: nowhere."""
    return _by_unit(place, torch.arange(place.unit.shape[1]).expand_as(place.unit), units)


def _by_unit(place: Held, x: Tensor, units: int) -> Tensor:
    """``x`` [B, M] of the slots by unit, [B, U]; -1 for those it does not have."""
    found = torch.full((len(x), units + 1), -1)
    return found.scatter_(1, place.unit.where(place.unit >= 0, units), x)[:, :units]
