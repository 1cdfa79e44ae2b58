"""Attention over packed pages: what the kernels need to know, what they refuse, and the three launches.

Only widths, levels, scales and two linear maps tell methods apart here: codes -> levels -> scale per token, or gain per
token and group of 32 channels -> linear map. There may be more or fewer channels than the model has.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool import packing
from kvtool.attention import Attended
from kvtool.errors import BackendError
from kvtool.kernels import decode
from kvtool.kernels.fragments import OFFSET, TABLE_WORDS
from kvtool.kernels.launch import (
    Launch,
    check_counts,
    check_pages,
    check_queries,
    default_launch,
    full,
    merged,
    nvidia,
    refuse,
    square_map,
    tiles_of,
)
from kvtool.kernels.query import prepare

LOG2E = math.log2(math.e)


class Packed(NamedTuple):
    """One layer's pages: page n of sequence b is at [b, h, n] or, with a page table, at [0, h, table[b, n]].

    key_pages, value_pages: uint8 [B, H, N, page bytes].
    key_scales, value_scales: float16 [B, H, N, 64], not negative, in the order of ``packing.pack_tokens``; or uint8
        [B, H, N, 32*groups], a code of 4 bits per token and group in that order, whose gain is 2^(code/2).
    """

    key_pages: Tensor
    key_scales: Tensor
    value_pages: Tensor
    value_scales: Tensor


@dataclass(frozen=True)
class Codec:
    """What the codes mean: q . k = scale * (q key_map) . levels[codes], and v = scale * levels[codes] value_map.

    key_map: float32 [H or 1, D, 32*key groups].  value_map: float32 [H or 1, 32*value groups, D].
    key_levels, value_levels: int8 [2^width] for the widths 2, 3 and 4 in use; those of 4 bits are odd (2u - 127).
        Width 1 has levels -1 and 1, width 8 has code - 127.5.
    """

    key_widths: tuple[int, ...]
    value_widths: tuple[int, ...]
    key_map: Tensor
    value_map: Tensor
    key_levels: Mapping[int, Tensor]
    value_levels: Mapping[int, Tensor]
    # the same in the kernels' terms
    query_map: Tensor = field(init=False)
    output_map: Tensor = field(init=False)
    key_offsets: Tensor = field(init=False)
    key_table: Tensor = field(init=False)
    value_table: Tensor = field(init=False)

    def __post_init__(self) -> None:
        device = self.key_map.device
        derived = {
            "query_map": (self.key_map.float() * _per_channel(_UNITS, self.key_widths).to(device)).contiguous(),
            "output_map": (
                self.value_map.float() * _per_channel(_UNITS, self.value_widths).to(device)[:, None]
            ).contiguous(),
            "key_offsets": _per_channel(OFFSET, self.key_widths).to(device),
            "key_table": table(self.key_levels).to(device),
            "value_table": table(self.value_levels).to(device),
        }
        for name, tensor in derived.items():
            object.__setattr__(self, name, tensor)


def table(levels: Mapping[int, Tensor]) -> Tensor:
    """The words of a side's look-up tables, int32 [8, 4], each four times over; see fragments.py."""
    words = torch.zeros(TABLE_WORDS, 4, dtype=torch.uint8)
    for width, first in ((4, 0), (3, 4), (2, 6)):
        if width in levels:
            entries = levels[width].cpu().to(torch.int16)
            if width == 4:
                if not bool((entries % 2 == 1).all()):
                    raise BackendError(f"levels of 4 bits: expected 16 odd numbers, found {entries.tolist()}")
                entries = (entries + 127) // 2
            words[first : first + len(entries) // 4] = entries.to(torch.int8).view(torch.uint8).reshape(-1, 4)
    return words.view(torch.int32).expand(-1, 4).contiguous()


# what one unit of a kernel's level is worth: at 4 bits it has u - 63.5 for 2u - 127, at 1 bit 32 for 1; absent channels
# must not share in the quantisation of the query
_UNITS = {0: 0.0, 1: 1 / 32, 2: 1.0, 3: 1.0, 4: 2.0, 8: 1.0}


def _per_channel(values: Mapping[int, float], widths: Sequence[int]) -> Tensor:
    return torch.tensor([values[width] for width in widths]).repeat_interleave(packing.GROUP)


def attend_packed(
    queries: Tensor,
    kv: Packed,
    codec: Codec,
    *,
    scale: float,
    softcap: float | None = None,
    pages: Tensor | None = None,
    page_table: Tensor | None = None,
    bias: Tensor | None = None,
    bias_unit: Tensor | None = None,
    kinds: Tensor | None = None,
    kind: int = 0,
    page_lse: Tensor | None = None,
    launch: Launch | None = None,
) -> Attended:
    """Attention of ``queries`` [B, HQ, S, D] over packed pages; every query sees every page in use.

    pages: int32 [B] on the device, pages in use; default: all.
    page_table: int32 [B, N] or [B, H, N] on the device, where page n of sequence b is.
    bias: [B, HQ, S, 64*N], float32 or int16, added to the scaled logits before they are capped.
    bias_unit: float32 [B, HQ, S], what one of the bias is worth; default: 1.
    kinds: uint8 [B, H, N]; only pages marked ``kind`` are read.
    page_lse: float32 [B, HQ, S, N], contiguous; the log-sum-exp of every page that is read is written there.

    Raises:
        BackendError: a shape, dtype or device the kernels do not serve.
    """
    check(queries, kv, codec, page_table, pages, bias)
    device = queries.device
    launch = launch or default_launch(device)
    gains = kv.key_scales.dtype == torch.uint8
    if launch.gluon and (gains or kinds is not None or page_lse is not None):
        raise BackendError("kernels: gains per group and kinds of pages: Gluon reads neither; use --backend triton")
    B, HQ, S, D = queries.shape
    H, groups, value_groups = kv.key_pages.shape[1], len(codec.key_widths), len(codec.value_widths)
    tiles = tiles_of(queries, H, gluon=launch.gluon)
    used_rows, ROWS, blocks, programs, dims = tiles
    capacity = kv.key_pages.shape[2] if page_table is None else page_table.shape[-1]
    stages, resident = _residency(kv, launch, ROWS)
    splits = launch.splits_of(tiles, capacity, resident, device)
    counted = pages is not None
    if pages is None:
        pages = full(B, capacity, device)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    TILE = 2 * max(ROWS, 8)
    flag = {"PDL": launch.pdl}
    query = new(programs, groups, TILE, 32, dtype=torch.int8)
    query_scale = new(programs, ROWS)
    query_start = new(programs, groups if gains else 1, ROWS, dtype=torch.int32)
    square = square_map(D, 32 * groups)
    prepare[(programs, ROWS)](
        queries,
        codec.query_map,
        codec.key_offsets,
        query,
        query_scale,
        query_start,
        used_rows,
        *queries.stride()[:3],
        codec.query_map.stride(0) if codec.query_map.shape[0] > 1 else 0,
        scale * LOG2E,
        S=S,
        TILE=TILE,
        PER=32 if gains else square["CHANNELS"],
        **dims,
        **square,
        **flag,
        # a captured step's tail.py reads the queries early: they must be complete before anything here begins
        **({} if counted else launch.dependent),
    )
    out, lse = new(programs, splits, ROWS, 32 * value_groups), new(programs, splits, ROWS)
    words = kv.key_pages.view(torch.int32), kv.value_pages.view(torch.int32)
    scales = [x.view(torch.int32) if gains else x for x in (kv.key_scales, kv.value_scales)]
    strides = [(0 if page_table is not None else x.stride(0), *x.stride()[1:3]) for x in (*words, *scales)]
    rows_of_bias = units = query_scale
    if bias is not None:
        rows_of_bias, units = bias_rows(bias.expand(B, HQ, S, -1), bias_unit, H, blocks * ROWS)
    options: dict[str, Any] = {
        "KEY_GROUPS": groups,
        "VALUE_GROUPS": value_groups,
        "KEY_WIDTHS": codec.key_widths,
        "VALUE_WIDTHS": codec.value_widths,
        "KEY_OFFSETS": _starts(codec.key_widths),
        "VALUE_OFFSETS": _starts(codec.value_widths),
        "LEVEL_OFFSETS": tuple(OFFSET[width] for width in codec.value_widths),
        "PAGED": page_table is not None,
        "BIASED": bias is not None,
        "CAPPED": softcap is not None,
        "STAGES": stages,
        "num_warps": launch.warps,
        **flag,
    }
    if launch.gluon:
        from kvtool.kernels import decode_gluon  # not everywhere, and not in the interpreter

        kernel, extra = decode_gluon.decode, {"RAW": all(width < 2 for width in codec.key_widths)}
    else:
        kernel, extra = decode.decode, {"WARPS": launch.warps, "ASM": nvidia(device), "GAINS": gains}
        marks = pages if kinds is None else kinds
        extra |= {"KINDS": marks, "kind_b": marks.stride(0), "kind_h": marks.stride(1) if kinds is not None else 0}
        extra |= {"KINDED": kinds is not None, "kind": kind}
        extra["table_h"] = page_table.stride(1) if page_table is not None and page_table.ndim == 3 else 0
        extra |= {"PAGE_LSE": page_lse, "lse_rows": used_rows, "lse_pages": capacity}
        if nvidia(device) and ROWS == 8 and value_groups <= 4 and not gains and bias is None:
            # what three programs a multiprocessor can have; left alone, the compiler may take more
            extra["maxnreg"] = 168
    kernel[(programs, splits)](
        query,
        query_scale,
        query_start,
        *words,
        *scales,
        codec.key_table,
        codec.value_table,
        pages,
        pages if page_table is None else page_table,
        rows_of_bias,
        units,
        out,
        lse,
        splits,
        *(stride for tensor in strides for stride in tensor),
        capacity if page_table is None else page_table.stride(0),
        rows_of_bias.shape[-1],
        (softcap or 0.0) * LOG2E,
        **options,
        **extra,
        **dims,
        **launch.dependent,
    )
    return merged(out, lse, codec.output_map, (B, HQ, S, D), dims, launch.pdl)


def check(
    queries: Tensor,
    kv: Packed,
    codec: Codec,
    page_table: Tensor | None = None,
    pages: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Refuse what the kernels do not serve.

    Raises:
        BackendError: in one sentence.
    """

    B, D = len(queries), queries.shape[-1]
    check_queries(queries, kv.key_pages.shape[1])
    check_counts(kv._asdict(), None, pages, B)
    where = kv.key_pages if page_table is None else page_table
    if len(where) != B:
        refuse("sequences", f"{B}, as of the queries", f"{len(where)} of pages")
    tokens = packing.PAGE * (kv.key_pages.shape[2] if page_table is None else page_table.shape[-1])
    if bias is not None and bias.shape[-1] != tokens:
        refuse("positions, or bias", f"{tokens}, of all pages", bias.shape[-1])
    channels = [packing.GROUP * len(widths) for widths in (codec.key_widths, codec.value_widths)]
    if [*codec.key_map.shape[1:], *codec.value_map.shape[1:]] != [D, channels[0], channels[1], D]:
        refuse(
            "maps", f"{D} to {channels[0]} and {channels[1]} to {D}", f"{codec.key_map.shape} {codec.value_map.shape}"
        )
    for name, pages, widths in (
        ("key_pages", kv.key_pages, codec.key_widths),
        ("value_pages", kv.value_pages, codec.value_widths),
    ):
        size = packing.page_bytes(widths)
        if size == 0:
            continue  # never read
        if pages.dtype != torch.uint8 or pages.shape[-1] != size:
            refuse(name, f"uint8, {size} bytes a page", f"{pages.dtype}, {pages.shape[-1]}")
        check_pages(name, pages)
    for name, scales, widths in (
        ("key_scales", kv.key_scales, codec.key_widths),
        ("value_scales", kv.value_scales, codec.value_widths),
    ):
        gains = kv.key_scales.dtype == torch.uint8
        expected = (torch.uint8, 32 * len(widths)) if gains else (torch.float16, packing.PAGE)
        if (scales.dtype, scales.shape[-1]) != expected:
            refuse(name, f"{expected[0]}, {expected[1]} a page", f"{scales.dtype}, {scales.shape[-1]}")
        alike = gains or scales.stride() == kv.key_scales.stride()
        if scales.stride(-1) != 1 or not alike:
            refuse(name, "the same strides for keys and values, contiguous pages", f"{scales.stride()}")
    if page_table is not None and (page_table.dtype != torch.int32 or not page_table.is_contiguous()):
        refuse(
            "page_table",
            "int32 [B, pages] or [B, H, pages], contiguous",
            f"{page_table.dtype}, strides {page_table.stride()}",
        )
    devices = {str(x.device) for x in (queries, *kv, codec.key_map, codec.value_map)}
    if len(devices) > 1:
        refuse("tensors", "one device", " and ".join(sorted(devices)))


def _residency(kv: Packed, launch: Launch, rows: int) -> tuple[int, int]:
    """Stages, and how many programs a multiprocessor holds at once: measured on the H100, docs/kernels.md."""
    page = sum(x.shape[-1] * x.element_size() for x in kv)
    stages = launch.stages or (4 if launch.gluon and 3000 < page < 7000 else 3)
    registers = (6 if rows <= 4 else 4) if launch.gluon else 3
    if kv.key_scales.dtype == torch.uint8:
        registers = 2  # not measured: from what the compiler reports
    return stages, max(1, min(registers, 220_000 // (stages * launch.warps * page)))


def _starts(widths: Sequence[int]) -> tuple[int, ...]:
    return tuple(64 * sum(widths[:i]) for i in range(len(widths)))  # words


def bias_rows(bias: Tensor, unit: Tensor | None, kv_heads: int, rows: int) -> tuple[Tensor, Tensor]:
    """As a decode reads them: ``bias`` [B, HQ, S, T], and what one of it is worth, ``unit`` [B, HQ, S], times log2 e.

    Returns [B, H, rows, T] and [B, H, rows, 1]; rows of no query are 0.
    """
    one = bias.new_ones(*bias.shape[:3], dtype=torch.float32) if unit is None else unit
    grouped = [x.reshape(x.shape[0], kv_heads, -1, x.shape[-1]) for x in (bias, LOG2E * one[..., None])]
    unused = rows - grouped[0].shape[2]
    padded = [F.pad(x, (0, 0, 0, unused)) if unused else x.contiguous() for x in grouped]
    return padded[0], padded[1]
