"""Estimated logits from 1-bit key sketches and a quantised query, for every query head by itself.

    q' = P (q - c_q) ~ low + step * level        level: an integer of up to 8 bits, one int8 row
    y_t = c r_t (step A_t + low N_t - sum(q')/2) + c_q term + mean bias
    A_t = sum of bit * level,  N_t = sum of bits        exact in int32: rows 0-7 of a tile are levels, 8-15 ones

r_t is the sketch's scale, c the softmax scale times log2 e: logits here and in ``nucleus`` are in units of log2. Bits
are read in raw form: the byte of slot s is 2^s times the bit, which the scale of the token divides out again.

Estimates are stored as float16 in *page order*, that of a page's scales: a thread of the product holds 16 of a page's
tokens, which lie side by side in it, and whoever reads them meets scale and estimate at the same place.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvtool.kernels.decode import _halves, _quad_sum, _scales
from kvtool.kernels.fragments import RAW_KEYS, fragments, key_operand, load_unit

FACTS = tl.constexpr(4)  # of a query row: step, low, sum(q')/2, and variance of the estimate over r_t^2
SUMS = tl.constexpr(4)  # of a row's share of the tokens: of y, of y^2, and the largest upper estimate
HALF_LN2 = tl.constexpr(0.34657359027997264)  # half a variance, in units of log2
FLOOR = tl.constexpr(-1e30)  # in place of minus infinity


@triton.jit
def prepare(
    QUERIES,  # [B, HQ, S, D], any float
    CENTRE,  # float32 [HQ, D], or unused
    MAP,  # float32 [H, D, P], the rotation
    QUERY,  # int8 [programs, P/32, 2*ROWS, 32], rows 0-7 of every 16 levels and 8-15 ones
    FACTS_OUT,  # float32 [programs, ROWS, FACTS]
    COUNTS,  # int32 [programs, ROWS, BINS], to be cleared
    used_rows,  # query heads per KV head * S
    query_b,
    query_h,
    query_s,
    factor,  # softmax scale * log2 e
    spread,  # variance of an estimate over |q - c_q|^2 r_t^2
    S: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    DIMS: tl.constexpr,  # D and P, rounded up to powers of two
    CHANNELS: tl.constexpr,
    BITS: tl.constexpr,
    BINS: tl.constexpr,
    CENTRED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one query row (query head of the group, then position); unused rows become zeros."""
    program = tl.program_id(0)
    r = tl.program_id(1)
    head = program // BLOCKS
    b, h = (head // H).to(tl.int64), head % H
    row = (program % BLOCKS) * ROWS + r
    live = row < used_rows
    d, c = tl.arange(0, DIMS), tl.arange(0, CHANNELS)
    inside = (d < D)[:, None] & (c < P)[None, :]
    matrix = tl.load(MAP + h * D * P + d[:, None] * P + c[None, :], mask=inside, other=0.0)
    one = h * (used_rows // S) + row // S
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = b * query_b + one * query_h + (row % S) * query_s
    q = tl.load(QUERIES + at + d, mask=(d < D) & live, other=0.0).to(tl.float32)
    if CENTRED:
        q -= tl.load(CENTRE + one * D + d, mask=(d < D) & live, other=0.0)
    y = tl.sum(q[:, None] * matrix, 0)
    lowest = tl.min(tl.where(c < P, y, float("inf")), 0)
    step = (tl.max(tl.where(c < P, y, -float("inf")), 0) - lowest) / ((1 << BITS) - 1)
    step = tl.maximum(step, 1.1754943508222875e-38)
    level = tl.minimum(tl.maximum(tl.floor((y - lowest) / step + 0.5), 0.0), (1 << BITS) - 1.0)
    if BITS == 8:
        level -= 128
        lowest += 128 * step
    half = 0.5 * tl.sum(tl.where(c < P, lowest + step * level, 0.0), 0)
    # channel 16h + 4q + e of a group lies at 8q + 4h + e
    place = ((c // 4) % 4) * 8 + (c // 16 % 2) * 4 + c % 4
    to = QUERY + ((program.to(tl.int64) * (P // 32) + c // 32) * (2 * ROWS) + (r // 8) * 16 + r % 8) * 32 + place
    tl.store(to, tl.where(live, level, 0.0).to(tl.int8), mask=c < P)
    tl.store(to + 8 * 32, tl.where(live, 1, 0).to(tl.int8) + tl.zeros([CHANNELS], tl.int8), mask=c < P)
    facts = FACTS_OUT + (program * ROWS + r) * FACTS
    tl.store(facts, step * factor)
    tl.store(facts + 1, lowest * factor)
    tl.store(facts + 2, half * factor)
    tl.store(facts + 3, tl.sum(q * q, 0) * spread)
    i = tl.arange(0, 256)
    tl.store(COUNTS + (program * ROWS + r) * BINS + i, tl.zeros([256], tl.int32), mask=i < BINS)


@triton.jit(do_not_specialize=["splits"])
def score(
    QUERY,  # as :func:`prepare` leaves them
    FACTS_IN,
    CODE_PAGES,  # int32 words, page p of head h of sequence b at b*page_b + h*page_h + p*page_p
    CODE_SCALES,  # float16, 64 a page
    TERMS,  # float16, c_q . (k - c_k) of token t and query head g of the group at b*term_b + h*term_h + t*term_t + g
    BIAS,  # int16 or float32 [programs, ROWS, T], in token order, or unused
    BIAS_UNIT,  # float32 [programs, ROWS], what one of it is worth, times log2 e
    PAGES,  # int32 [B], pages in use
    ESTIMATES,  # float16 [programs, ROWS, T], in page order; rows in use only
    SUMS_OUT,  # float32 [programs, splits, ROWS, SUMS]
    splits,
    used_rows,
    page_b,
    page_h,
    page_p,
    scale_b,
    scale_h,
    scale_p,
    term_b,
    term_h,
    term_t,
    T,
    factor,
    softcap,
    S: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    BIASED: tl.constexpr,
    CENTRED: tl.constexpr,
    CAPPED: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: ROWS queries and a share of a KV head's pages, as many at a time as there are warps."""
    program = tl.program_id(0)
    split = tl.program_id(1)
    b = (program // BLOCKS // H).to(tl.int64)
    h = (program // BLOCKS % H).to(tl.int64)
    rows, token = tl.arange(0, ROWS), tl.arange(0, 64)
    row = (program % BLOCKS) * ROWS + rows
    # the inverse of the weights of raw bits; slot 7 is the sign bit of its byte
    weight = ((127 - token // 8) << 23).to(tl.float32, bitcast=True)
    weight = tl.where(token // 8 == 7, -weight, weight)[None, None, :]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    pages = tl.load(PAGES + b)
    first, last = (split * pages) // splits, ((split + 1) * pages) // splits
    facts = FACTS_IN + (program * ROWS + rows) * FACTS
    step_size, low = tl.load(facts)[None, :, None], tl.load(facts + 1)[None, :, None]
    half, noise = tl.load(facts + 2)[None, :, None], tl.load(facts + 3)[None, :, None]
    if BIASED:
        bias_unit = tl.load(BIAS_UNIT + program * ROWS + rows)[None, :, None]
    queries = ()
    for i in tl.static_range(GROUPS):
        query = QUERY + (program * GROUPS + i) * (2 * ROWS * 32)
        query += tl.arange(0, 2 * ROWS)[:, None] * 32 + tl.arange(0, 32)[None, :]
        queries = queries + (tl.load(query)[None, :, :].broadcast_to(WARPS, 2 * ROWS, 32),)

    total = tl.zeros([WARPS, ROWS, 4], tl.float32)  # one partial sum a lane of the quad
    squares = tl.zeros([WARPS, ROWS, 4], tl.float32)
    top = tl.full([WARPS, ROWS], FLOOR, tl.float32)
    mine = tl.arange(0, WARPS)[:, None]
    for step in tl.range(first, last, WARPS, num_stages=STAGES):
        page = step + mine
        used = page < last
        where = page.to(tl.int64)
        at = (page * 64 + token[None, :])[:, None, :]
        seen = used[:, :, None] & (row < used_rows)[None, :, None] & (at >= 0)
        if BIASED:
            # loaded before the products: the compiler keeps what comes first in its layout
            biases = BIAS + program.to(tl.int64) * ROWS * T + (rows[None, :, None].to(tl.int64) * T + at)
            biases = tl.load(biases, mask=seen, other=0.0)
        if CENTRED:
            terms = TERMS + b * term_b + h * term_h + (at.to(tl.int64) * term_t + (row // S)[None, :, None])
            terms = tl.load(terms, mask=seen, other=0.0)
        page_at = CODE_PAGES + b * page_b + h * page_h + where * page_p
        k = _scales(CODE_SCALES + b * scale_b + h * scale_h + where * scale_p, used, WARPS)[:, None, :]
        sums = tl.zeros([WARPS, 2 * ROWS, 64], tl.int32)
        for i in tl.static_range(GROUPS):
            words = load_unit(page_at + 64 * i, used, 1)
            unit = key_operand(fragments(words, (), 1, WARPS, ASM, RAW_KEYS), WARPS)
            sums = tl.dot(queries[i], unit, sums, out_dtype=tl.int32)
        levels, ones = _halves(sums, WARPS, ROWS, 64)
        y = k * ((levels.to(tl.float32) * step_size + ones.to(tl.float32) * low) * weight - half)
        if BIASED:
            y += biases.to(tl.float32) * bias_unit
        if CENTRED:
            y += terms.to(tl.float32) * factor
        if CAPPED:
            # tanh z = 1 - 2 / (e^2z + 1), in units of log2
            y = softcap * (1 - 2 / (tl.exp2(y * (2.8853900817779268 / softcap)) + 1))
        rounded = tl.minimum(tl.maximum(y, -60000.0), 60000.0).to(tl.float16)
        packed = rounded.reshape(WARPS, ROWS, 8, 4, 2).permute(0, 1, 3, 2, 4).reshape(WARPS, ROWS, 64)
        to = ESTIMATES + program.to(tl.int64) * ROWS * T + (rows[None, :, None].to(tl.int64) * T + at)
        tl.store(to, packed, mask=seen)
        y = tl.where(used[:, :, None], rounded.to(tl.float32), 0.0)
        total += _quad_sum(y, WARPS, ROWS)
        squares += _quad_sum(y * y, WARPS, ROWS)
        upper = tl.max(y + HALF_LN2 * noise * k * k, 2)
        top = tl.maximum(top, tl.where(used, upper, FLOOR))
    to = SUMS_OUT + ((program * splits + split) * ROWS + rows) * SUMS
    tl.store(to, tl.sum(tl.sum(total, 2), 0))
    tl.store(to + 1, tl.sum(tl.sum(squares, 2), 0))
    tl.store(to + 2, tl.max(top, 0))
