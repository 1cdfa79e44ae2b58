"""What a step over rdkv's pages needs first, in one launch: the queries in both rotations, and the mean's logits.

Some programs each prepare one query row as ``query.py`` does, once in either rotation. The others each evaluate, for
one page, the logits of the removed key mean at the positions of the 64 tokens that were kept,

    q . R(n) m = sum_c  a_c cos(n t_c) + b_c sin(n t_c)      a = q1 m1 + q2 m2,  b = q2 m1 - q1 m2

as 16 bits of its amplitude, like ``mean.py``. Tokens are not consecutive, so every cosine is taken anew: phases are
integers in units of 2^-32 turns, which wrap by themselves. Only the pairs of channels in which the mean is not zero
are looked at, and they are listed beforehand.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvtool.kernels.query import LARGEST


@triton.jit
def prepare(
    QUERIES,  # [B, HQ, S, D], any float
    MAPS,  # float32 [H, 2, D, 32*GROUPS]
    QUERY,  # int8 [programs, 2, GROUPS, 2*ROWS, 32]; rows 0-7 of every 16 high and 8-15 low
    QUERY_SCALE,  # float32 [programs, 2, ROWS]
    QUERY_SUMS,  # float32 [programs, 2, GROUPS, ROWS]
    POSITIONS,  # int32 [pages, 64], in the order of packing.pack_tokens
    HEADS,  # int32 [pages], KV head of all sequences
    PAIRS,  # int32 [H, PAIRS, 2]: the first channel of a pair, and 2^16 times what is left of its turns
    TURNS,  # int32 [H, PAIRS], 2^32 turns per token
    MEANS,  # float32 [H, PAIRS, 2], of both channels
    REST,  # float32 [H, D], the mean where it does not turn
    BIAS,  # int16 [pages, BLOCKS*ROWS, 64]
    BIAS_UNIT,  # float32 [programs, ROWS], times log2 e
    preparing,  # programs that prepare queries
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
    ASM: tl.constexpr,
):
    """One program: one row of one KV head in one rotation, or one page."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0)
    if i < preparing:
        _prepare_row(QUERIES, MAPS, QUERY, QUERY_SCALE, QUERY_SUMS, i, used_rows, query_b, query_h, query_s, factor,
                     S, H, ROWS, BLOCKS, D, C, DIMS, CHANNELS)  # fmt: skip
    else:
        _prepare_page(QUERIES, POSITIONS, HEADS, PAIRS, TURNS, MEANS, REST, BIAS, BIAS_UNIT, i - preparing, used_rows,
                      half, query_b, query_h, query_s, factor, scaling,
                      S, H, BLOCKS * ROWS, D, DIMS, COUNT, STILL, ASM)  # fmt: skip


@triton.jit
def _prepare_row(
    QUERIES, MAPS, QUERY, QUERY_SCALE, QUERY_SUMS, i, used_rows, query_b, query_h, query_s, factor,
    S: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    DIMS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One query row in one rotation, quantised to 16 bits; unused rows become zeros."""
    r, turn, program = i % ROWS, i // ROWS % 2, i // (2 * ROWS)
    head = program // BLOCKS
    b, h = (head // H).to(tl.int64), head % H
    row = (program % BLOCKS) * ROWS + r
    d, c = tl.arange(0, DIMS), tl.arange(0, CHANNELS)
    matrix = MAPS + (h * 2 + turn) * (D * C) + d[:, None] * C + c[None, :]
    matrix = tl.load(matrix, mask=(d < D)[:, None] & (c < C)[None, :], other=0.0)
    at = QUERIES + b * query_b + (h * (used_rows // S) + row // S) * query_h + (row % S) * query_s
    q = tl.load(at + d, mask=d < tl.where(row < used_rows, D, 0), other=0.0).to(tl.float32)
    y = tl.sum(q[:, None] * matrix, 0)
    unit = tl.maximum(tl.max(tl.abs(y), 0), 1e-30) / LARGEST
    y = tl.floor(y / unit + 0.5)
    high = tl.floor((y + 64) / 128)
    # channel 16h + 4q + e of a group lies at 8q + 4h + e
    place = ((c // 4) % 4) * 8 + (c // 16 % 2) * 4 + c % 4
    turned = program * 2 + turn
    to = QUERY + ((turned.to(tl.int64) * (C // 32) + c // 32) * (2 * ROWS) + (r // 8) * 16 + r % 8) * 32 + place
    tl.store(to, high.to(tl.int8), mask=c < C)
    tl.store(to + 8 * 32, (y - 128 * high).to(tl.int8), mask=c < C)
    group = tl.arange(0, CHANNELS // 32)
    sums = tl.sum(y.reshape(CHANNELS // 32, 32), 1)
    tl.store(QUERY_SUMS + (turned * (C // 32) + group) * ROWS + r, sums, mask=group * 32 < C)
    tl.store(QUERY_SCALE + turned * ROWS + r, unit * factor)


@triton.jit
def _prepare_page(
    QUERIES, POSITIONS, HEADS, PAIRS, TURNS, MEANS, REST, BIAS, BIAS_UNIT, page, used_rows, half,
    query_b, query_h, query_s, factor, scaling,
    S: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr,
    COUNT: tl.constexpr, STILL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The mean's logits of all query rows, 16 at a time, at the positions of one page's tokens."""
    head = tl.load(HEADS + page)
    b, h = (head // H).to(tl.int64), head % H
    pair = tl.arange(0, COUNT)
    channel, less = tl.load(PAIRS + (h * COUNT + pair) * 2), tl.load(PAIRS + (h * COUNT + pair) * 2 + 1)
    m1, m2 = tl.load(MEANS + (h * COUNT + pair) * 2)[None, :], tl.load(MEANS + (h * COUNT + pair) * 2 + 1)[None, :]
    token = tl.arange(0, 64)
    n = tl.load(POSITIONS + page.to(tl.int64) * 64 + token)[None, :]
    # 32 bits of a turn are off by n * 2^-33 turns; 16 more bits of the frequency keep 10^6 positions exact
    phase = n * tl.load(TURNS + h * COUNT + pair)[:, None] + ((n >> 8) * less[:, None] >> 8)
    cos, sin = _circle(phase.to(tl.float32) * 1.4629180792671596e-9, ASM)  # 2 pi / 2^32
    for block in tl.static_range((ROWS + 15) // 16):
        row = 16 * block + tl.arange(0, 16)
        at = QUERIES + b * query_b + (h * (used_rows // S) + row // S) * query_h + (row % S) * query_s
        live = (row < used_rows)[:, None]
        q1 = tl.load(at[:, None] + channel[None, :], mask=live & (channel >= 0)[None, :], other=0.0).to(tl.float32)
        q2 = tl.load(at[:, None] + (channel + half)[None, :], mask=live & (channel >= 0)[None, :], other=0.0)
        q2 = q2.to(tl.float32)
        a, b_ = (q1 * m1 + q2 * m2) * scaling, (q2 * m1 - q1 * m2) * scaling
        amplitude = tl.sum(tl.sqrt(a * a + b_ * b_), 1)
        PRECISION: tl.constexpr = "tf32x3" if ASM else "ieee"
        logits = tl.dot(a, cos, input_precision=PRECISION)
        logits = tl.dot(b_, sin, logits, input_precision=PRECISION)
        if STILL:
            d = tl.arange(0, DIMS)
            q = tl.load(at[:, None] + d[None, :], mask=live & (d < D)[None, :], other=0.0).to(tl.float32)
            rest = tl.sum(q * tl.load(REST + h * D + d, mask=d < D, other=0.0)[None, :], 1)
            logits += rest[:, None]
            amplitude += tl.abs(rest)
        amplitude = tl.maximum(amplitude, 1e-30)
        logits = tl.floor(logits * (32767 / amplitude)[:, None] + 0.5)
        logits = tl.minimum(tl.maximum(logits, -32767.0), 32767.0).to(tl.int16)
        stored = row < ROWS
        to = BIAS + (page.to(tl.int64) * ROWS + row)[:, None] * 64 + token[None, :]
        tl.store(to, logits, mask=stored[:, None] & (token >= 0)[None, :])
        # every page of a head says the same
        tl.store(BIAS_UNIT + head * ROWS + row, amplitude * (factor / 32767), mask=stored)


@triton.jit
def _circle(angle, ASM: tl.constexpr):
    """Cosine and sine within half a turn."""
    if ASM:
        # the hardware's, 2^-20 off here
        cos = tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, is_pure=True, pack=1)
        sin = tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, is_pure=True, pack=1)
        return cos, sin
    else:
        # those of a quarter of the angle, doubled twice: what compilers take serves any angle, and spills
        x = angle * 0.25
        y = x * x
        cos = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y / 40320)))
        sin = x * (1 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y / 362880))))
        for _ in tl.static_range(2):
            cos, sin = cos * cos - sin * sin, 2 * sin * cos
        return cos, sin
