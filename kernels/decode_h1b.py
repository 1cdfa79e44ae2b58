"""Split-KV attention over sign sketches of keys and min-max values, plain Triton: decode.py with a cosine map.

    n_t = sum over the bits of s_q s_t                        agreements minus disagreements, b of them, exact in int32
    x_t = cap(c norm_t sin(pi/2 n_t / b) + bias_t)            c: temperature * query norm * softmax scale * log2 e
    o   = sum p_t (minimum_t + step_t code_t)                 as decode_affine.py, one range per token

The sketched query has one row of signs, so the low half of every tile of 16 rows is zero.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvtool.kernels.decode import _halves, _quad_sum, _scales, _weights
from kvtool.kernels.fragments import SIGNS, fragments, key_operand, load_table, load_unit, value_operand

# sin(pi/2 a) = a (c0 + c1 a^2 + c2 a^4 + c3 a^6), off by at most 6e-7 for |a| <= 1
C0, C1 = tl.constexpr(1.570791011), tl.constexpr(-0.6458928496)
C2, C3 = tl.constexpr(0.0794343447), tl.constexpr(-0.00433309534)


@triton.jit(do_not_specialize=["splits"])
def decode(
    QUERY,  # int8 [programs, KEY_GROUPS, ROWS, 32], signs
    QUERY_SCALE,  # float32 [programs, ROWS], the logit of a cosine of 1 with a key of norm 1, times log2 e
    KEY_PAGES,  # int32 words, page p of head h of sequence b at b*key_b + h*key_h + p*key_p
    VALUE_PAGES,
    KEY_NORMS,  # float16, 64 a page, or unused
    VALUE_STEPS,  # float16, 64 a page
    VALUE_MINIMA,
    TABLES,  # int32, as fragments.load_table reads them
    PAGES,  # int32 [B], pages in use
    BIAS,  # int16 or float32 [programs, ROWS, T], added to the logits before the cap, or unused
    BIAS_UNIT,  # float32 [programs, ROWS], what one of it is worth, times log2 e
    OUT,  # float32 [programs, splits, ROWS, 32*VALUE_GROUPS]
    LSE,  # float32 [programs, splits, ROWS], log2
    splits,
    key_b,
    key_h,
    key_p,
    value_b,
    value_h,
    value_p,
    norm_b,
    norm_h,
    norm_p,
    value_range_b,
    value_range_h,
    value_range_p,
    bias_row,
    softcap,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    BITS: tl.constexpr,  # b
    VALUE_WIDTH: tl.constexpr,
    VALUE_UNIT: tl.constexpr,
    VALUE_ZERO: tl.constexpr,
    COSINE: tl.constexpr,
    HELD: tl.constexpr,  # whether the queries stay in registers
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Attention of ROWS queries over this program's pages, normalised, with its log-sum-exp."""
    program = tl.program_id(0)
    split = tl.program_id(1)
    b = (program // BLOCKS // H).to(tl.int64)
    h = (program // BLOCKS % H).to(tl.int64)
    pages = tl.load(PAGES + b)
    first, last = (split * pages) // splits, ((split + 1) * pages) // splits
    tables = load_table(TABLES, ASM)
    rows, token = tl.arange(0, ROWS), tl.arange(0, 64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    scale = tl.load(QUERY_SCALE + program * ROWS + rows)[None, :, None]
    if BIASED:
        bias_unit = tl.load(BIAS_UNIT + program * ROWS + rows)[None, :, None]
    query_at = QUERY + program.to(tl.int64) * KEY_GROUPS * (ROWS * 32) + rows[:, None] * 32 + tl.arange(0, 32)[None, :]
    queries = ()
    if HELD:
        for i in tl.static_range(KEY_GROUPS):
            queries = queries + (_operand(tl.load(query_at + i * (ROWS * 32)), WARPS, ROWS),)

    m = tl.full([WARPS, ROWS], -1e30, tl.float32)
    l = tl.zeros([WARPS, ROWS, 4], tl.float32)  # one partial sum a lane of the quad
    u = tl.full([WARPS], 2.0**-24, tl.float32)
    total = tl.zeros([WARPS, ROWS, 4], tl.float32)
    lowest = tl.zeros([WARPS, ROWS, 4], tl.float32)
    out = ()
    for i in tl.static_range(VALUE_GROUPS):
        out = out + (tl.zeros([WARPS, ROWS, 32], tl.float32),)

    mine = tl.arange(0, WARPS)[:, None]
    for step in tl.range(first, last, WARPS, num_stages=STAGES):
        page = step + mine
        used = page < last
        where = page.to(tl.int64)
        key_at = KEY_PAGES + b * key_b + h * key_h + where * key_p
        value_at = VALUE_PAGES + b * value_b + h * value_h + where * value_p
        range_at = b * value_range_b + h * value_range_h + where * value_range_p
        if BIASED:
            # loaded before the products: the compiler keeps what comes first in its layout
            at = (page * 64 + token[None, :])[:, None, :]
            # 64 bits for the program, 32 for what differs inside it
            biases = BIAS + program.to(tl.int64) * ROWS * bias_row + (rows[None, :, None] * bias_row + at)
            biases = tl.load(biases, mask=used[:, :, None] & (rows >= 0)[None, :, None] & (at >= 0), other=0.0)
        score = tl.zeros([WARPS, 2 * ROWS, 64], tl.int32)
        if HELD:
            for i in tl.static_range(KEY_GROUPS):
                words = load_unit(key_at + 64 * i, used, 1)
                unit = key_operand(fragments(words, tables, 1, WARPS, ASM, SIGNS), WARPS)
                score = tl.dot(queries[i], unit, score, out_dtype=tl.int32)
        else:
            for i in tl.range(0, KEY_GROUPS):
                query = _operand(tl.load(query_at + i * (ROWS * 32)), WARPS, ROWS)
                words = load_unit(key_at + 64 * i, used, 1)
                unit = key_operand(fragments(words, tables, 1, WARPS, ASM, SIGNS), WARPS)
                score = tl.dot(query, unit, score, out_dtype=tl.int32)
        signs, _ = _halves(score, WARPS, ROWS, 64)
        x = signs.to(tl.float32) * (1.0 / (64 * BITS))
        if COSINE:
            norms = _scales(KEY_NORMS + b * norm_b + h * norm_h + where * norm_p, used, WARPS)
            x = _quarter_sine(x) * norms[:, None, :]
        x = x * scale
        if BIASED:
            x += biases.to(tl.float32) * bias_unit
        # an absent page must neither touch the maximum nor weigh anything, even before any page was seen
        absent = tl.where(used, 0.0, -2e30)
        if CAPPED:
            # tanh z = 1 - 2 / (e^2z + 1), in units of log2
            x = softcap * (1 - 2 / (tl.exp2(x * (2.8853900817779268 / softcap)) + 1))
        new_m = tl.maximum(m, tl.max(x, 2) + absent)
        shrink = tl.exp2(m - new_m)
        p = tl.exp2(x + (absent - new_m)[:, :, None])
        l = l * shrink[:, :, None] + _quad_sum(p, WARPS, ROWS)
        v = _scales(VALUE_STEPS + range_at, used, WARPS)
        minima = _scales(VALUE_MINIMA + range_at, used, WARPS)
        largest = tl.maximum(u, tl.max(v, 1))
        # as in decode.py: the rounded weight + 128 in the low bits
        w = p * (v * (32512.0 / largest)[:, None])[:, None, :] + 12583040.0
        fade = shrink * (u / largest)[:, None]
        total = total * fade[:, :, None] + _quad_sum(w - 12583040.0, WARPS, ROWS)
        lowest = lowest * shrink[:, :, None] + _quad_sum(p * minima[:, None, :], WARPS, ROWS)
        weights = _weights(w.to(tl.int32, bitcast=True), WARPS, ROWS)
        new_out = ()
        for i in tl.static_range(VALUE_GROUPS):
            words = load_unit(value_at + 64 * VALUE_WIDTH * i, used, VALUE_WIDTH)
            unit = value_operand(fragments(words, tables, VALUE_WIDTH, WARPS, ASM), WARPS)
            high, low = _halves(tl.dot(weights, unit, out_dtype=tl.int32), WARPS, ROWS, 32)
            new_out = new_out + (out[i] * fade[:, :, None] + (high * 256 + low).to(tl.float32),)
        out = new_out
        m, u = new_m, largest

    # the warps' partial results are parts like any other
    top = tl.max(m, 0)
    share = tl.exp2(m - top[None, :])
    sum_l = tl.sum(share * tl.sum(l, 2), 0)
    inverse = tl.where(sum_l > 0, 1.0 / sum_l, 0.0)
    part = share * (u / (32512.0 * VALUE_UNIT))[:, None]
    constant = tl.sum(share * tl.sum(lowest, 2), 0) - VALUE_ZERO * tl.sum(part * tl.sum(total, 2), 0)
    base = (program.to(tl.int64) * splits + split) * ROWS + rows
    for i in tl.static_range(VALUE_GROUPS):
        o = (tl.sum(out[i] * part[:, :, None], 0) + constant[:, None]) * inverse[:, None]
        tl.store(OUT + base[:, None] * (32 * VALUE_GROUPS) + 32 * i + tl.arange(0, 32)[None, :], o)
    tl.store(LSE + base, tl.where(sum_l > 0, top + tl.log2(sum_l), -1e30))


@triton.jit
def _operand(signs, W: tl.constexpr, ROWS: tl.constexpr):
    """``signs`` [ROWS, 32] as operand A, int8 [W, 2*ROWS, 32]: rows 0-7 of every 16, the others are zero."""
    x = tl.join(signs, signs * 0).reshape(ROWS // 8, 8, 32, 2).permute(0, 3, 1, 2).reshape(2 * ROWS, 32)
    return x[None, :, :].broadcast_to(W, 2 * ROWS, 32)


@triton.jit
def _quarter_sine(a):
    """sin(pi/2 a) for |a| <= 1; the library's sine has a slow branch for large angles."""
    z = a * a
    return a * (C0 + z * (C1 + z * (C2 + z * C3)))
