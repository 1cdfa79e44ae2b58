"""How a compressed cache lies in memory while it is read.

whole   each sequence's pages side by side, all in use
room    with as many pages again to grow into, as after a doubling; counts of pages are read on the device
table   in one pool in shuffled order, found through a page table on the device
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvtool.backends import Backend
from kvtool.bench.subject import Subject
from kvtool.errors import BackendError
from kvtool.methods.base import mapped
from kvtool.packing import PAGE

LAYOUTS = ("whole", "room", "table")


class Laid(NamedTuple):
    """A cache as a back end is given it; see :meth:`kvtool.backends.Backend.attend`."""

    kv: Any
    positions: Tensor
    pages: Tensor | None = None
    page_table: Tensor | None = None


def check_layout(layout: str, ragged: bool, backend: Backend, subject: Subject) -> None:
    """Refuse what the method cannot be read from.

    Raises:
        BackendError: it takes a prompt at once, or its kernel has no page table.
    """
    method = subject.method
    if layout == "table" and (subject.reads_a_part or not backend.reads_tables(method)):
        raise BackendError(
            f"--layout table: expected a method that is read through a page table, such as turboquant, found "
            f"{method.name} on {backend.name}; use --layout room"
        )
    paged = method.block is not None and not method.moves and not subject.reads_a_part
    grows = paged and backend.counts_pages(method)
    if (layout == "room" or ragged) and not grows:
        option = "--layout room" if layout == "room" else "--ragged"
        raise BackendError(
            f"{option}: expected a method whose pages are counted on the device, found {method.name} on "
            f"{backend.name}; leave {option} out"
        )


def page_counts(pages: int, batch: int, ragged: bool) -> list[int]:
    """Pages of each sequence: all alike, or from ``pages`` evenly down to half of them."""
    return [pages - (b * (pages // 2) // max(1, batch - 1) if ragged else 0) for b in range(batch)]


def lay_out(kv: Any, layout: str, counts: Sequence[int]) -> Laid:
    """``kv``, a NamedTuple of fields [B, H, N or 64 N, ...], of which sequence b has ``counts[b]`` pages in use."""
    if layout == "whole" and len(set(counts)) == 1:
        return Laid(kv, _positions(kv, counts[0]))
    device, most = _device(kv), max(counts)
    used = torch.tensor(counts, dtype=torch.int32, device=device)
    if layout == "whole":
        return Laid(kv, _positions(kv, most), used)
    if layout == "room":
        return Laid(mapped(kv, lambda x: torch.cat([x, torch.zeros_like(x)], 2)), _positions(kv, 2 * most), used)
    if any(x.shape[2] != most for x in kv if isinstance(x, Tensor)):
        raise BackendError("--layout table: expected a method of pages, found one of single tokens; use --layout room")
    order = torch.randperm(len(counts) * most, generator=torch.Generator().manual_seed(0)).to(device)
    table = order.argsort().reshape(len(counts), most).to(torch.int32)
    # page n of sequence b lies at table[b, n] of every head's pool
    pool = mapped(kv, lambda x: x.transpose(0, 1).flatten(1, 2)[:, order][None])
    return Laid(pool, _positions(kv, most), used, table)


def _device(kv: Any) -> torch.device:
    return next(x.device for x in kv if isinstance(x, Tensor))


def _positions(kv: Any, pages: int) -> Tensor:
    return torch.arange(PAGE * pages, device=_device(kv))
