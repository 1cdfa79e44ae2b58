"""What a step over rdkv's pages needs first, in one launch: the queries in both rotations, and the mean's logits.

Some programs each prepare one query row as ``query.py`` does, once in either rotation. The others each evaluate, for
a share of the steps of one KV head, the logits of the removed key mean at the positions of the tokens that were kept,

    q . R(n) m = sum_c  a_c cos(n t_c) + b_c sin(n t_c)      a = q1 m1 + q2 m2,  b = q2 m1 - q1 m2

as 16 bits of its amplitude, like ``mean.py``. Tokens are not consecutive, so every cosine is taken anew, once for all
query rows: phases are integers in units of 2^-32 turns, which wrap by themselves. The products are of float16, with a
and b in two parts, so that only the rounding of cosines is left, 2^-12 of a pair's amplitude at most. Only the pairs of
channels in which the mean is not zero are looked at, and they are listed beforehand.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvtool.kernels.query import LARGEST

PAGES = tl.constexpr(4)  # of a step, at most
CHUNK = tl.constexpr(16)  # pairs of channels whose cosines are held at once


@triton.jit
def prepare(
    QUERIES,  # [B, HQ, S, D], any float
    MAPS,  # float32 [H, 2, D, 32*GROUPS]
    QUERY,  # int8 [programs, 2, GROUPS, ROWS/8, 8 rows, 4 q, 2 h, 2 (high and low), 4 e]
    QUERY_SCALE,  # float32 [programs, 2, ROWS]
    QUERY_SUMS,  # float32 [programs, 2, GROUPS, ROWS]
    SHARES,  # int32 [slots, 3], STEPS int32 [steps, 8]: see decode_levels.py
    STEPS,
    POSITIONS,  # int32 [pages, 64]
    PAIRS,  # int32 [H, PAIRS, 2]: the first channel of a pair, and 2^31 times what is left of its turns
    TURNS,  # int32 [H, PAIRS], 2^32 turns per token
    MEANS,  # float32 [H, PAIRS, 2], of both channels
    REST,  # float32 [H, D], the mean where it does not turn
    BIAS,  # int16 [pages, BLOCKS, 2 (of u), ROWS, 4 q, 4 u, 2 r], for token 8u + 2q + r
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
    PARTS: tl.constexpr,  # programs of a slot
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: one row of one KV head in one rotation, or a share of a slot's steps for one block of rows."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0)
    if i < preparing:
        _prepare_row(QUERIES, MAPS, QUERY, QUERY_SCALE, QUERY_SUMS, i, used_rows, query_b, query_h, query_s, factor,
                     S, H, ROWS, BLOCKS, D, C, DIMS, CHANNELS)  # fmt: skip
    else:
        _prepare_steps(QUERIES, SHARES, STEPS, POSITIONS, PAIRS, TURNS, MEANS, REST, BIAS, BIAS_UNIT, i - preparing,
                       used_rows, half, query_b, query_h, query_s, factor, scaling,
                       S, H, ROWS, BLOCKS, D, DIMS, COUNT, STILL, PARTS, ASM)  # fmt: skip


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
    live = row < used_rows
    matrix = tl.load(matrix, mask=live & (d < D)[:, None] & (c < C)[None, :], other=0.0)
    at = QUERIES + b * query_b + (h * (used_rows // S) + row // S) * query_h + (row % S) * query_s
    q = tl.load(at + d, mask=live & (d < D), other=0.0).to(tl.float32)
    y = tl.sum(q[:, None] * matrix, 0)
    unit = tl.maximum(tl.max(tl.abs(y), 0), 1e-30) / LARGEST
    y = tl.floor(y / unit + 0.5)
    high = tl.floor((y + 64) / 128)
    # channel 16h + 4q + e of a group: a lane of the tensor core's operand has its 16 bytes in a row
    place = (r * 4 + c // 4 % 4) * 16 + (c // 16 % 2) * 8 + c % 4
    turned = program * 2 + turn
    to = QUERY + (turned.to(tl.int64) * (C // 32) + c // 32) * (ROWS * 64) + place
    tl.store(to, high.to(tl.int8), mask=c < C)
    tl.store(to + 4, (y - 128 * high).to(tl.int8), mask=c < C)
    group = tl.arange(0, CHANNELS // 32)
    sums = tl.sum(y.reshape(CHANNELS // 32, 32), 1)
    tl.store(QUERY_SUMS + (turned * (C // 32) + group) * ROWS + r, sums, mask=group * 32 < C)
    tl.store(QUERY_SCALE + turned * ROWS + r, unit * factor)


@triton.jit
def _prepare_steps(
    QUERIES, SHARES, STEPS, POSITIONS, PAIRS, TURNS, MEANS, REST, BIAS, BIAS_UNIT, i, used_rows, half,
    query_b, query_h, query_s, factor, scaling,
    S: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr,
    COUNT: tl.constexpr, STILL: tl.constexpr, PARTS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The mean's logits of a block of query rows at the positions of a share of a slot's tokens."""
    slot, block, share = i // (PARTS * BLOCKS), i // PARTS % BLOCKS, i % PARTS
    head = tl.load(SHARES + 3 * slot)
    first, last = tl.load(SHARES + 3 * slot + 1), tl.load(SHARES + 3 * slot + 2)
    first, last = first + (last - first) * share // PARTS, first + (last - first) * (share + 1) // PARTS
    b, h = (head // H).to(tl.int64), head % H
    # rows 0-7 of every 16 are high and 8-15 low
    both = tl.arange(0, 2 * ROWS)
    row = block * ROWS + both // 16 * 8 + both % 8
    live = (row < used_rows)[:, None]
    query = QUERIES + b * query_b + (h * (used_rows // S) + row // S) * query_h + (row % S) * query_s
    pair = tl.arange(0, COUNT)
    a, b_ = _turned(query, live, PAIRS, MEANS, h * COUNT + pair, half)
    amplitude = tl.sum(tl.sqrt(a * a + b_ * b_), 1) * scaling
    rest = tl.zeros([2 * ROWS], tl.float32)
    if STILL:
        d = tl.arange(0, DIMS)
        q = tl.load(query[:, None] + d[None, :], mask=live & (d < D)[None, :], other=0.0).to(tl.float32)
        rest = tl.sum(q * tl.load(REST + h * D + d, mask=d < D, other=0.0)[None, :], 1)
        amplitude += tl.abs(rest)
    amplitude = tl.maximum(amplitude, 1e-30)
    to = BIAS_UNIT + (head * BLOCKS + block) * ROWS + both // 16 * 8 + both % 8
    # every share of a head says the same
    tl.store(to, amplitude * (factor / 32767), mask=both % 16 < 8)
    rest = tl.where(both % 16 < 8, rest / amplitude, 0.0)
    part = (both // 8 % 2)[:, None]
    lefts = ()
    for k in tl.static_range(COUNT // CHUNK):
        listed = h * COUNT + k * CHUNK + tl.arange(0, CHUNK)
        a, b_ = _turned(query, live, PAIRS, MEANS, listed, half)
        unit = (scaling / amplitude)[:, None]
        lefts = lefts + ((_part(a * unit, part), _part(b_ * unit, part)),)

    token = tl.arange(0, PAGES * 64)
    for step in range(first, last):
        page, tokens = tl.load(STEPS + step * 8 + 2), tl.load(STEPS + step * 8 + 3)
        n = tl.load(POSITIONS + page.to(tl.int64) * 64 + token, mask=token < tokens, other=0)[None, :]
        logits = tl.zeros([2 * ROWS, PAGES * 64], tl.float32) + rest[:, None]
        for k in tl.static_range(COUNT // CHUNK):
            listed = h * COUNT + k * CHUNK + tl.arange(0, CHUNK)
            turns, less = tl.load(TURNS + listed)[:, None], tl.load(PAIRS + listed * 2 + 1)[:, None]
            # 32 bits of a turn are off by n * 2^-32 turns; 31 more bits of the frequency mend that
            phase = n * turns + tl.umulhi(n + n, less)
            cos, sin = _circle(phase.to(tl.float32) * 1.4629180792671596e-9, ASM)  # 2 pi / 2^32
            logits = tl.dot(lefts[k][0], cos.to(tl.float16), logits)
            logits = tl.dot(lefts[k][1], sin.to(tl.float16), logits)
        high, low = tl.split(logits.reshape(ROWS // 8, 2, 8, PAGES * 64).permute(0, 2, 3, 1))
        x = tl.floor((high + low * (1 / 2048)).reshape(ROWS, PAGES * 64) * 32767 + 0.5)
        x = tl.minimum(tl.maximum(x, -32767.0), 32767.0).to(tl.int16)
        x = x.reshape(ROWS, PAGES, 2, 4, 4, 2).permute(1, 2, 0, 4, 3, 5).reshape(PAGES, ROWS * 64)
        pages = tl.arange(0, PAGES)[:, None]
        place = ((page + pages).to(tl.int64) * BLOCKS + block) * (ROWS * 64) + tl.arange(0, ROWS * 64)[None, :]
        tl.store(BIAS + place, x, mask=(pages * 64 < tokens) & (place >= 0))


@triton.jit
def _turned(query, live, PAIRS, MEANS, listed, half):
    """What cosine and sine of the pairs ``listed`` are multiplied by, float32 [rows, pairs]."""
    channel = tl.load(PAIRS + listed * 2)[None, :]
    m1, m2 = tl.load(MEANS + listed * 2)[None, :], tl.load(MEANS + listed * 2 + 1)[None, :]
    q1 = tl.load(query[:, None] + channel, mask=live & (channel >= 0), other=0.0).to(tl.float32)
    q2 = tl.load(query[:, None] + channel + half, mask=live & (channel >= 0), other=0.0).to(tl.float32)
    return q1 * m1 + q2 * m2, q2 * m1 - q1 * m2


@triton.jit
def _part(x, low):
    """The float16 nearest to ``x``, or 2048 times what that leaves."""
    high = x.to(tl.float16)
    return tl.where(low > 0, ((x - high.to(tl.float32)) * 2048).to(tl.float16), high)


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
