"""Encoding, fused: centre, transform, normalise, quantise by table and pack, straight into place.

    y = (x - R(n) m) M          M: [D, C], per KV head; m: the calibrated mean of keys, turned to the position
    v = sqrt(D) y / ||y||       code: how many boundaries lie below v
    scale                       one number per token: ``mse``, ``norm`` or ``unbiased``, as in methods/turboquant.py

A program keeps M and takes one page of a head after the other. What follows the product is in ``codes.py``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kvtool import packing
from kvtool.kernels.codes import (
    STEEP,
    column_order,
    inverse_root,
    level_bytes,
    pack,
    quantise,
    row_token,
    search_table,
    store,
    sum_of_squares,
)
from kvtool.kernels.fragments import prmt
from kvtool.kernels.launch import nvidia, processors
from kvtool.kernels.mean import starts, steps
from kvtool.shapes import Rope

SCALES = {"mse": 0, "norm": 1, "unbiased": 2}


class Encoder(NamedTuple):
    """How one side, keys or values, is encoded; see :func:`encoder`.

    matrix: float16 [H or 1, C, D], in the order of :func:`codes.column_order`, C a power of two.
    unit: what the product comes multiplied by.
    table: of the levels, see :func:`codes.search_table`.
    step: what one unit of a level is worth.
    """

    width: int
    groups: int
    keys: bool
    matrix: Tensor
    unit: float
    table: Tensor
    step: float
    scale: str


def encoder(widths: Sequence[int], matrix: Tensor, levels: Tensor, step: float, scale: str, *, keys: bool) -> Encoder:
    """An encoder for groups of one width: ``matrix`` [H or 1, D, C], levels ``step * levels``; 1 bit is -1 and 1."""
    groups, width = len(widths), widths[0]
    table = search_table(width, levels, step)
    padded = max(2, triton.next_power_of_2(groups))
    rows = F.pad(matrix.float().mT, (0, 0, 0, packing.GROUP * padded - matrix.shape[-1]))
    # a Hadamard matrix has whole numbers over a power of the root of D: exact in 11 bits with the root taken out
    unit = min((1.0, rows.shape[-1] ** 0.5), key=lambda unit: float((rows * unit - (rows * unit).half()).norm() / unit))
    ordered = (rows * unit)[:, column_order(padded, keys).to(rows.device)].half().contiguous()
    return Encoder(width, groups, keys, ordered, unit, table.to(matrix.device), float(step), scale)


def encode(
    x: Tensor,
    how: Encoder,
    *,
    mean: Tensor | None = None,
    rope: Rope | None = None,
    positions: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    launch: dict[str, int] | None = None,
    resident: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Pages uint8 [B, H, N, bytes] and scales float16 [B, H, N, 64] of ``x`` [B, H, T, D], T a multiple of 64.

    mean: float32 [H, D], subtracted; with ``rope``, turned to ``positions`` [T] first.
    out: pages and scales to write into, for instance a slice of a cache with room to grow.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    B, H, T, D = x.shape
    N, size = T // packing.PAGE, packing.page_bytes((how.width,) * how.groups)
    if out is None:
        pages = torch.empty(B, H, N, size, dtype=torch.uint8, device=x.device)
        out = pages, torch.empty(B, H, N, packing.PAGE, dtype=torch.float16, device=x.device)
    pages, scales = out
    words = pages.view(torch.int32)
    turned = mean is not None and rope is not None and positions is not None
    turns = (*starts(rope, positions), *steps(rope, x.device)) if turned else (how.table,) * 4
    half = len(rope.inv_freq) if turned else 1
    C = how.matrix.shape[1]
    asm = nvidia(x.device)
    options = {"num_warps": max(4, C // packing.GROUP), "num_stages": 1}
    if asm and not turned and torch.cuda.get_device_capability(x.device) >= (9, 0):
        options["maxnreg"] = 168
    # as many programs as are resident, each with a run of pages
    run = triton.cdiv(B * H * N, (resident or (2 if turned else 3)) * processors(x.device))
    _encode[(B * H, triton.cdiv(N, run))](
        x,
        how.matrix,
        how.table,
        how.table if mean is None else mean.float().contiguous(),
        *turns,
        words,
        scales,
        *x.stride()[:3],
        how.matrix.stride(0) if how.matrix.shape[0] > 1 else 0,
        *words.stride()[:3],
        *scales.stride()[:3],
        N,
        run,
        how.unit,
        how.step,
        D**0.5,
        H=H,
        D=D,
        # the whole matrix stays in shared memory where it takes no more than 32 KiB
        BLOCK=triton.next_power_of_2(D) if D <= 128 else 64,
        HALF=half,
        ROWS=C // packing.GROUP,
        GROUPS=how.groups,
        WIDTH=how.width,
        KEYS=how.keys,
        CENTRED=mean is not None,
        TURNED=turned,
        SCALE=SCALES[how.scale],
        ASM=asm,
        **(options | (launch or {})),
    )
    return pages, scales


@triton.jit(do_not_specialize=["pages", "run"])
def _encode(
    X, MATRIX, TABLE, MEAN, START_COS, START_SIN, STEP_COS, STEP_SIN, WORDS, SCALES,
    x_b, x_h, x_t, matrix_h, words_b, words_h, words_p, scales_b, scales_h, scales_p, pages, run, unit, step, root,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, KEYS: tl.constexpr, CENTRED: tl.constexpr, TURNED: tl.constexpr, SCALE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    t, d = row_token(tl.arange(0, 64), KEYS), tl.arange(0, BLOCK)
    c = tl.arange(0, 32 * ROWS)
    X += b * x_b + h * x_h + t[:, None].to(tl.int64) * x_t
    MATRIX += h * matrix_h + c[:, None] * D
    MEAN += h * D
    WORDS += b * words_b + h * words_h
    SCALES += b * scales_b + h * scales_h
    first = tl.program_id(1).to(tl.int64) * run
    count = tl.minimum(run, pages - first)
    HELD: tl.constexpr = BLOCK >= D
    if HELD:
        matrix = columns(MATRIX, d, D, c >= 0).trans()
        x = columns(X + first * 64 * x_t, d, D, t >= 0)
    for i in range(count):
        page = first + i
        if HELD:
            centred = centred_rows(
                x, MEAN, START_COS, START_SIN, STEP_COS, STEP_SIN, page, t, d, D, HALF, CENTRED, TURNED
            )
            y = tl.dot(centred.to(tl.float16), matrix)
            # the next page is on its way while this one is worked on
            x = columns(X + (page + 1) * 64 * x_t, d, D, (t >= 0) & (i + 1 < count))
        else:
            y = tl.zeros([64, 32 * ROWS], tl.float32)
            for start in range(0, D, BLOCK):
                part = start + d
                x = columns(X + page * 64 * x_t, part, D, t >= 0)
                centred = centred_rows(
                    x, MEAN, START_COS, START_SIN, STEP_COS, STEP_SIN, page, t, part, D, HALF, CENTRED, TURNED
                )
                y = tl.dot(centred.to(tl.float16), columns(MATRIX, part, D, c >= 0).trans(), y)
        square = tl.sum(y * y, 1)
        inverse = inverse_root(tl.maximum(square, 1e-30), ASM)
        norm = square * inverse / unit
        v = y * (root * inverse * (STEEP if WIDTH < 8 else 1.0))[:, None]
        # a quarter of a thread's channels at a time, so that the registers hold them
        even, odd = tl.split(v.reshape(64, ROWS, 2, 2, 8).permute(0, 1, 4, 2, 3))
        v00, v10 = tl.split(even)
        v01, v11 = tl.split(odd)
        n00, worth00 = quantise(v00, TABLE, step, WIDTH, SCALE, ASM)
        n01, worth01 = quantise(v01, TABLE, step, WIDTH, SCALE, ASM)
        n10, worth10 = quantise(v10, TABLE, step, WIDTH, SCALE, ASM)
        n11, worth11 = quantise(v11, TABLE, step, WIDTH, SCALE, ASM)
        signed = tl.join(tl.join(n00, n10), tl.join(n01, n11)).reshape(64, ROWS, 8, 4)
        worth = worth00 + worth01 + worth10 + worth11
        if SCALE == 0:
            scale = norm * (step / root)
        else:
            if SCALE == 1 and WIDTH < 8:
                four = pack(signed, 4 * tl.arange(0, 4)) & (0x1111 * ((1 << (WIDTH - 1)) - 1))
                levels = prmt(*level_bytes(TABLE), four, ASM)
                worth = sum_of_squares(levels, ASM)
            total = tl.sum(worth.reshape(64, 8 * ROWS), 1)
            if SCALE == 1:
                # padding has the smallest level everywhere
                smallest = tl.load(TABLE + 8)
                scale = norm * inverse_root(total - (32 * ROWS - D) * smallest * smallest, ASM)
            else:
                scale = norm * root / tl.maximum(total, 1e-30)
        place = (t % 8 // 2) * 16 + (t // 8) * 2 + t % 2
        tl.store(SCALES + page * scales_p + place, scale.to(tl.float16))
        store(WORDS + page * words_p, signed, WIDTH, KEYS, D, ROWS, GROUPS)


@triton.jit
def columns(POINTERS, d, D: tl.constexpr, rows):
    """Columns ``d`` of the rows at ``POINTERS``."""
    return tl.load(POINTERS + d[None, :], mask=(d < D)[None, :] & rows[:, None], other=0.0)


@triton.jit
def centred_rows(
    x, MEAN, START_COS, START_SIN, STEP_COS, STEP_SIN, page, t, d,
    D: tl.constexpr, HALF: tl.constexpr, CENTRED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Channels ``d`` of a page, less their mean, float32."""
    x = x.to(tl.float32)
    if CENTRED:
        mean = tl.load(MEAN + d, mask=d < D, other=0.0)
        if TURNED:
            # angle addition: a page is turned once, its tokens by a table that all pages share
            # channel c turns with c + HALF; channels beyond 2*HALF are left alone
            other = tl.load(MEAN + tl.where(d < HALF, d + HALF, d - HALF), mask=d < 2 * HALF, other=0.0)
            other = tl.where(d < HALF, -other, other)
            cos, sin = _turn(START_COS, START_SIN, page, d, HALF)
            step_cos, step_sin = _turn(STEP_COS, STEP_SIN, t[:, None], d[None, :], HALF)
            x -= step_cos * (mean * cos + other * sin)[None, :] + step_sin * (other * cos - mean * sin)[None, :]
        else:
            x -= mean[None, :]
    return x


@triton.jit
def _turn(COS, SIN, row, d, HALF: tl.constexpr):
    """Cosine and sine of ``row`` for every channel."""
    at, inside = row * HALF + d % HALF, (row >= 0) & (d < 2 * HALF)
    return tl.load(COS + at, mask=inside, other=1.0), tl.load(SIN + at, mask=inside, other=0.0)
