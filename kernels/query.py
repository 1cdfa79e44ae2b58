"""Query preparation, fused: transform the queries, then quantise them to 16 bits as two int8 rows.

    y = q M                    M: the key map, [D, C], per KV head; steps of the levels are folded into it
    y = s (128 high + low)     s = max|y| / 16256 per row, |high| <= 127, -64 <= low < 64

Channels that no key page stores have zero columns in M. A sketched query is sign(R q), one int8 row.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LARGEST = tl.constexpr(16256.0)  # 127 * 128


@triton.jit
def prepare(
    QUERIES,  # [B, HQ, S, D], any float
    MAP,  # float32 [H or 1, D, C]
    OFFSETS,  # float32 [C], of the keys' levels
    QUERY,  # int8 [programs, C/32, TILE, 32], rows 0-7 of every 16 high and 8-15 low
    QUERY_SCALE,  # float32 [programs, ROWS]
    QUERY_START,  # int32 [programs, C/PER, ROWS]; a sum of PER channels each, C rounded up
    used_rows,  # query heads per KV head * S
    query_b,
    query_h,
    query_s,
    map_h,
    factor,  # softmax scale * log2 e
    S: tl.constexpr,
    TILE: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    DIMS: tl.constexpr,  # D and C, rounded up to powers of two
    CHANNELS: tl.constexpr,
    PER: tl.constexpr,  # 32, or CHANNELS for one sum
    PDL: tl.constexpr,
):
    """One program: one query row (query head of the group, then position); unused rows become zeros."""
    program = tl.program_id(0)
    r = tl.program_id(1)
    head = program // BLOCKS
    b, h = (head // H).to(tl.int64), head % H
    row = (program % BLOCKS) * ROWS + r
    d, c = tl.arange(0, DIMS), tl.arange(0, CHANNELS)
    inside = (d < D)[:, None] & (c < C)[None, :]
    matrix = tl.load(MAP + h * map_h + d[:, None] * C + c[None, :], mask=inside, other=0.0)
    offsets = tl.load(OFFSETS + c, mask=c < C, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = b * query_b + (h * (used_rows // S) + row // S) * query_h + (row % S) * query_s
    q = tl.load(QUERIES + at + d, mask=d < tl.where(row < used_rows, D, 0), other=0.0).to(tl.float32)
    y, unit = _quantised(tl.sum(q[:, None] * matrix, 0), QUERY, program, r, c, C, TILE)
    sums = tl.sum((offsets * y).reshape(CHANNELS // PER, PER), 1)
    i = tl.arange(0, CHANNELS // PER)
    start = QUERY_START + (program * ((C + PER - 1) // PER) + i) * ROWS + r
    tl.store(start, tl.floor(0.5 - sums).to(tl.int32), mask=i * PER < C)
    tl.store(QUERY_SCALE + program * ROWS + r, unit * factor)


@triton.jit
def prepare_levels(
    QUERIES,  # [B, HQ, S, D], any float
    MAP,  # float32 [H, D, C]
    PROBES,  # float32 [H, 4, C]: mids, mids of the extra stage; noise, what the extra stage adds to it
    KAPPA,  # float32 [HQ]
    QUERY,  # as of :func:`prepare`
    QUERY_SCALE,  # float32 [programs, ROWS], for signs of -64 and 64
    QUERY_MID,  # float32 [programs, 2, ROWS], PROBES[:2] . y times the factor
    QUERY_NOISE,  # float32 [programs, 2, ROWS], PROBES[2:] . y^2 times kappa and the factor of squares
    used_rows,
    query_b,
    query_h,
    query_s,
    map_h,
    factor,  # softmax scale * log2 e
    square_factor,  # softmax scale^2 * log2 e
    S: tl.constexpr,
    TILE: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    DIMS: tl.constexpr,  # D and C, rounded up to powers of two
    CHANNELS: tl.constexpr,
    PDL: tl.constexpr,
):
    """As :func:`prepare`, and what linear and quadratic forms of a query row are worth."""
    program = tl.program_id(0)
    r = tl.program_id(1)
    head = program // BLOCKS
    b, h = (head // H).to(tl.int64), head % H
    row = (program % BLOCKS) * ROWS + r
    heads = used_rows // S
    d, c = tl.arange(0, DIMS), tl.arange(0, CHANNELS)
    inside = (d < D)[:, None] & (c < C)[None, :]
    matrix = tl.load(MAP + h * map_h + d[:, None] * C + c[None, :], mask=inside, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = b * query_b + (h * heads + row // S) * query_h + (row % S) * query_s
    q = tl.load(QUERIES + at + d, mask=d < tl.where(row < used_rows, D, 0), other=0.0).to(tl.float32)
    y = tl.sum(q[:, None] * matrix, 0)
    kappa = tl.load(KAPPA + h * heads + row // S, mask=row < used_rows, other=0.0)
    for i in tl.static_range(2):
        mid = tl.load(PROBES + (h * 4 + i) * C + c, mask=c < C, other=0.0)
        tl.store(QUERY_MID + (program * 2 + i) * ROWS + r, tl.sum(mid * y, 0) * factor)
        noise = tl.load(PROBES + (h * 4 + 2 + i) * C + c, mask=c < C, other=0.0)
        tl.store(QUERY_NOISE + (program * 2 + i) * ROWS + r, tl.sum(noise * y * y, 0) * kappa * square_factor)
    _, unit = _quantised(y, QUERY, program, r, c, C, TILE)
    tl.store(QUERY_SCALE + program * ROWS + r, unit * factor / 64)


@triton.jit
def _quantised(y, QUERY, program, r, c, C: tl.constexpr, TILE: tl.constexpr):
    """Store row ``r`` of a query, ``y`` [CHANNELS], as high and low bytes; returns it in units, and the unit."""
    unit = tl.maximum(tl.max(tl.abs(y), 0), 1e-30) / LARGEST
    y = tl.floor(y / unit + 0.5)
    high = tl.floor((y + 64) / 128)
    # channel 16h + 4q + e of a group lies at 8q + 4h + e
    place = ((c // 4) % 4) * 8 + (c // 16 % 2) * 4 + c % 4
    to = QUERY + ((program.to(tl.int64) * (C // 32) + c // 32) * TILE + (r // 8) * 16 + r % 8) * 32 + place
    tl.store(to, high.to(tl.int8), mask=c < C)
    tl.store(to + 8 * 32, (y - 128 * high).to(tl.int8), mask=c < C)
    return y, unit


@triton.jit
def sketch(
    QUERIES,  # [B, HQ, S, D], any float
    MAP,  # float32 [H, BITS, D], the projection
    TEMPERATURE,  # float32 [HQ], or unused
    QUERY,  # int8 [programs, ceil(BITS/32), ROWS, 32], signs; 0 beyond BITS
    QUERY_SCALE,  # float32 [programs, ROWS]
    used_rows,
    query_b,
    query_h,
    query_s,
    factor,  # softmax scale * log2 e, or log2 e alone
    S: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    COSINE: tl.constexpr,  # whether the scale has temperature and norm
    D: tl.constexpr,
    C: tl.constexpr,
    DIMS: tl.constexpr,  # D and C, rounded up to powers of two
    CHANNELS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: the signs of one query row, C bits at a time, placed as :func:`prepare` places bytes."""
    program = tl.program_id(0)
    r = tl.program_id(1)
    head = program // BLOCKS
    b, h = (head // H).to(tl.int64), head % H
    row = (program % BLOCKS) * ROWS + r
    heads = used_rows // S
    d, c = tl.arange(0, DIMS), tl.arange(0, CHANNELS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = b * query_b + (h * heads + row // S) * query_h + (row % S) * query_s
    q = tl.load(QUERIES + at + d, mask=d < tl.where(row < used_rows, D, 0), other=0.0).to(tl.float32)
    scale = factor
    if COSINE:
        tau = tl.load(TEMPERATURE + h * heads + row // S, mask=row < used_rows, other=0.0)
        scale = factor * tau * tl.sqrt(tl.sum(q * q, 0))
    GROUPS: tl.constexpr = (BITS + 31) // 32
    for first in tl.range(0, 32 * GROUPS, C):
        bit = first + c
        inside = (bit < BITS)[:, None] & (d < D)[None, :]
        matrix = tl.load(MAP + (h * BITS + bit)[:, None] * D + d[None, :], mask=inside, other=0.0)
        sign = tl.where(tl.sum(q[None, :] * matrix, 1) > 0, 1, -1)
        sign = tl.where(bit < BITS, sign, 0)
        # channel 16h + 4q + e of a group lies at 8q + 4h + e
        place = ((bit // 4) % 4) * 8 + (bit // 16 % 2) * 4 + bit % 4
        to = QUERY + ((program.to(tl.int64) * GROUPS + bit // 32) * ROWS + r) * 32 + place
        tl.store(to, sign.to(tl.int8), mask=(c < C) & (bit < 32 * GROUPS))
    tl.store(QUERY_SCALE + program * ROWS + r, scale)
