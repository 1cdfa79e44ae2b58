"""What a step over rdkv's pages needs first, in one launch: the queries in both rotations, and for the keys' mean.

Programs prepare one query row each: as ``query.py`` does, once in either rotation, and for the logits of the removed
key mean,

    q . R(n) m = sum_c  a_c cos(n t_c) + b_c sin(n t_c)      a = q1 m1 + q2 m2,  b = q2 m1 - q1 m2

which are evaluated where the tokens are read. a and b are stored relative to their amplitude, as two float16 each, so
that only the rounding of cosines is left, 2^-12 of a pair's amplitude at most. Only the pairs of channels in which the
mean is not zero are looked at, and they are listed beforehand.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvtool.kernels.query import LARGEST

CHUNK = tl.constexpr(16)  # pairs of channels of one product
FINER = tl.constexpr(2048)  # what the second float16 is multiplied by


@triton.jit
def prepare(
    QUERIES,  # [B, HQ, S, D], any float
    MAPS,  # float32 [H, 2, D, 32*GROUPS]
    QUERY,  # int8 [programs, 2, GROUPS, ROWS/8, 8 rows, 4 q, 2 h, 2 (high and low), 4 e]
    QUERY_SCALE,  # float32 [programs, 2, ROWS]
    QUERY_SUMS,  # float32 [programs, 2, GROUPS, ROWS]
    CHANNEL,  # int32 [H, PAIRS], the first channel of a pair
    MEANS,  # float32 [H, PAIRS, 2], of both channels
    REST,  # float32 [H, D], the mean where it does not turn
    WAVES,  # float16 [programs, PAIRS/16, 2 (a, b), ROWS, 4 q, 2 h, 2 (value, rest), 2 e], of pair 4q + 2h + e
    WAVE_UNIT,  # float32 [programs, 2, ROWS], the amplitude, and the mean's logit where it does not turn; times log2 e
    used_rows,  # query heads per KV head * S
    half,  # pairs of the rotary embedding: channel c turns with channel c + half
    query_b,
    query_h,
    query_s,
    factor,  # softmax scale * log2 e
    scaling,  # of the rotary embedding's table
    S: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    DIMS: tl.constexpr,  # D and C, rounded up to powers of two
    CHANNELS: tl.constexpr,
    COUNT: tl.constexpr,  # pairs listed, a power of two
    STILL: tl.constexpr,  # whether some of the mean does not turn
    PDL: tl.constexpr,
):
    """One program: one row of one KV head, in one rotation or for the mean."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0)
    r, turn, program = i % ROWS, i // ROWS % 3, i // (3 * ROWS)
    head, row = program // BLOCKS, program % BLOCKS * ROWS + r
    b, h = (head // H).to(tl.int64), head % H
    query = QUERIES + b * query_b + (h * (used_rows // S) + row // S) * query_h + (row % S) * query_s
    live = row < used_rows
    if turn < 2:
        _prepare_row(query, live, MAPS + (h * 2 + turn) * (D * C), QUERY, QUERY_SCALE, QUERY_SUMS, r,
                     program * 2 + turn, factor, ROWS, D, C, DIMS, CHANNELS)  # fmt: skip
    else:
        _prepare_mean(query, live, CHANNEL + h * COUNT, MEANS + h * COUNT * 2, REST + h * D, WAVES, WAVE_UNIT, r,
                      program, half, factor, scaling, ROWS, D, DIMS, COUNT, STILL)  # fmt: skip


@triton.jit
def _prepare_row(
    query, live, MAP, QUERY, QUERY_SCALE, QUERY_SUMS, r, turned, factor,
    ROWS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, DIMS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One query row in one rotation, quantised to 16 bits; unused rows become zeros."""
    d, c = tl.arange(0, DIMS), tl.arange(0, CHANNELS)
    inside = live & (d < D)[:, None] & (c < C)[None, :]
    matrix = tl.load(MAP + d[:, None] * C + c[None, :], mask=inside, other=0.0)
    q = tl.load(query + d, mask=live & (d < D), other=0.0).to(tl.float32)
    y = tl.sum(q[:, None] * matrix, 0)
    unit = tl.maximum(tl.max(tl.abs(y), 0), 1e-30) / LARGEST
    y = tl.floor(y / unit + 0.5)
    high = tl.floor((y + 64) / 128)
    # channel 16h + 4q + e of a group: a lane of the tensor core's operand has its 16 bytes in a row
    place = (r * 4 + c // 4 % 4) * 16 + (c // 16 % 2) * 8 + c % 4
    to = QUERY + (turned.to(tl.int64) * (C // 32) + c // 32) * (ROWS * 64) + place
    tl.store(to, high.to(tl.int8), mask=c < C)
    tl.store(to + 4, (y - 128 * high).to(tl.int8), mask=c < C)
    group = tl.arange(0, CHANNELS // 32)
    sums = tl.sum(y.reshape(CHANNELS // 32, 32), 1)
    tl.store(QUERY_SUMS + (turned * (C // 32) + group) * ROWS + r, sums, mask=group * 32 < C)
    tl.store(QUERY_SCALE + turned * ROWS + r, unit * factor)


@triton.jit
def _prepare_mean(
    query, live, CHANNEL, MEANS, REST, WAVES, WAVE_UNIT, r, program, half, factor, scaling,
    ROWS: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, COUNT: tl.constexpr, STILL: tl.constexpr,
):  # fmt: skip
    """What one query row makes of the mean, by pairs."""
    pair = tl.arange(0, COUNT)
    channel = tl.load(CHANNEL + pair)
    m1, m2 = tl.load(MEANS + pair * 2), tl.load(MEANS + pair * 2 + 1)
    q1 = tl.load(query + channel, mask=live & (pair >= 0), other=0.0).to(tl.float32)
    q2 = tl.load(query + channel + half, mask=live & (pair >= 0), other=0.0).to(tl.float32)
    a, b = (q1 * m1 + q2 * m2) * scaling, (q2 * m1 - q1 * m2) * scaling
    amplitude = tl.maximum(tl.sum(tl.sqrt(a * a + b * b), 0), 1e-30)
    to = ((program.to(tl.int64) * (COUNT // CHUNK) + pair // CHUNK) * (2 * ROWS) + r) * 32
    to = WAVES + to + (pair // 4 % 4) * 8 + (pair // 2 % 2) * 4 + pair % 2
    _store_parts(to, a / amplitude)
    _store_parts(to + ROWS * 32, b / amplitude)
    rest = 0.0
    if STILL:
        d = tl.arange(0, DIMS)
        q = tl.load(query + d, mask=live & (d < D), other=0.0).to(tl.float32)
        rest = tl.sum(q * tl.load(REST + d, mask=d < D, other=0.0), 0)
    tl.store(WAVE_UNIT + program * 2 * ROWS + r, amplitude * factor)
    tl.store(WAVE_UNIT + (program * 2 + 1) * ROWS + r, rest * factor)


@triton.jit
def _store_parts(to, x):
    high = x.to(tl.float16)
    tl.store(to, high)
    tl.store(to + 2, ((x - high.to(tl.float32)) * FINER).to(tl.float16))
