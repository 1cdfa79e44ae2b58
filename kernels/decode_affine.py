"""Split-KV attention over pages of min-max codes, plain Triton: decode.py with ranges in place of scales.

A range is shared by some channels of one token, or by some tokens of one channel of the page. For keys
k = minimum + step * code, so

    token:    q . k_t = sum_j step_jt (q . code_t over the channels of j) + minimum_jt sum(q over them)
    channel:  q . k_t = (q step_r) . code_t + q . minimum_r              r: the range of token t in the page

Per channel the query is multiplied by the steps of every page and range and quantised anew, which costs what a dozen
more tokens would. For values p code is summed with weights p step (token) or p alone (channel), minima in float32.
"""

import triton
import triton.language as tl

from kvtool.kernels.decode import _halves, _quad_sum, _scales, _weights
from kvtool.kernels.fragments import fragments, key_operand, load_table, load_unit, value_operand

# the byte that the table or the fragment makes of code c is UNIT * c + ZERO
UNIT = {2: 32, 3: 16, 4: 8, 8: 1}
ZERO = {2: 0, 3: 0, 4: 0, 8: -128}


@triton.jit(do_not_specialize=["splits"])
def decode(
    QUERY,  # float32 [programs, ROWS, 32*GROUPS], times softmax scale and log2 e, zeros behind D
    KEY_PAGES,  # int32 words, page p of head h of sequence b at b*key_b + h*key_h + p*key_p
    VALUE_PAGES,
    KEY_STEPS,  # float16; per token [RANGES, 64] a page, per channel [RANGES, D]
    KEY_MINIMA,
    VALUE_STEPS,
    VALUE_MINIMA,
    TABLES,  # int32, as fragments.load_table reads them
    PAGES,  # int32 [B], pages in use
    OUT,  # float32 [programs, splits, ROWS, 32*GROUPS]
    LSE,  # float32 [programs, splits, ROWS], log2
    splits,
    key_b,
    key_h,
    key_p,
    value_b,
    value_h,
    value_p,
    key_range_b,
    key_range_h,
    key_range_p,
    key_range_r,
    value_range_b,
    value_range_h,
    value_range_p,
    value_range_r,
    softcap,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    KEY_UNIT: tl.constexpr,
    VALUE_UNIT: tl.constexpr,
    KEY_ZERO: tl.constexpr,
    VALUE_ZERO: tl.constexpr,
    KEY_SPAN: tl.constexpr,  # groups of channels (token) or tokens (channel) per range
    VALUE_SPAN: tl.constexpr,
    KEY_PER_TOKEN: tl.constexpr,
    VALUE_PER_TOKEN: tl.constexpr,
    CAPPED: tl.constexpr,
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
    place = tl.arange(0, 32)
    # key units have their channels in the order (q, h, e)
    channel = 16 * (place // 4 % 2) + 4 * (place // 8) + place % 4
    queries = ()
    for i in tl.static_range(GROUPS):
        query_at = (program * ROWS + rows)[:, None] * (32 * GROUPS) + 32 * i + channel[None, :]
        queries = queries + (tl.load(QUERY + query_at)[None, :, :].broadcast_to(WARPS, ROWS, 32),)

    m = tl.full([WARPS, ROWS], -1e30, tl.float32)
    l = tl.zeros([WARPS, ROWS, 4], tl.float32)
    u = ()
    total = ()
    lowest = ()
    out = ()
    for i in tl.static_range(GROUPS):
        u = u + (tl.full([WARPS], 2.0**-24, tl.float32),)
        total = total + (tl.zeros([WARPS, ROWS, 4], tl.float32),)
        lowest = lowest + (tl.zeros([WARPS, ROWS, 4], tl.float32),)
        out = out + (tl.zeros([WARPS, ROWS, 32], tl.float32),)

    mine = tl.arange(0, WARPS)[:, None]
    for step in tl.range(first, last, WARPS, num_stages=STAGES):
        page = step + mine
        used = page < last
        where = page.to(tl.int64)
        key_at = KEY_PAGES + b * key_b + h * key_h + where * key_p
        value_at = VALUE_PAGES + b * value_b + h * value_h + where * value_p
        key_range = b * key_range_b + h * key_range_h + where * key_range_p
        value_range = b * value_range_b + h * value_range_h + where * value_range_p

        x = tl.zeros([WARPS, ROWS, 64], tl.float32)
        if KEY_PER_TOKEN:
            for i in tl.static_range(0, GROUPS, KEY_SPAN):
                ys = ()
                offset = tl.zeros([WARPS, ROWS], tl.float32)
                for j in tl.static_range(i, i + KEY_SPAN):
                    if j < GROUPS:
                        ys = ys + (queries[j],)
                        offset += tl.sum(queries[j], 2)
                score = _score(ys, key_at + 64 * KEY_WIDTH * i, used, tables, KEY_WIDTH, KEY_ZERO, WARPS, ROWS, ASM)
                steps = _scales(KEY_STEPS + key_range + key_range_r * (i // KEY_SPAN), used, WARPS) / KEY_UNIT
                minima = _scales(KEY_MINIMA + key_range + key_range_r * (i // KEY_SPAN), used, WARPS)
                x += score * steps[:, None, :] + offset[:, :, None] * minima[:, None, :]
        else:
            for r in tl.static_range(64 // KEY_SPAN):
                ys = ()
                offset = tl.zeros([WARPS, ROWS], tl.float32)
                for i in tl.static_range(GROUPS):
                    at = key_range + key_range_r * r + 32 * i + channel[None, :]
                    inside = used & (32 * i + channel < D)[None, :]
                    steps = tl.load(KEY_STEPS + at, mask=inside, other=0.0).to(tl.float32) / KEY_UNIT
                    minima = tl.load(KEY_MINIMA + at, mask=inside, other=0.0).to(tl.float32)
                    ys = ys + (queries[i] * steps[:, None, :],)
                    offset += tl.sum(queries[i] * minima[:, None, :], 2)
                score = _score(ys, key_at, used, tables, KEY_WIDTH, KEY_ZERO, WARPS, ROWS, ASM) + offset[:, :, None]
                x = tl.where((token // KEY_SPAN == r)[None, None, :], score, x)
        # an absent page must neither touch the maximum nor weigh anything, even before any page was seen
        absent = tl.where(used, 0.0, -2e30)
        if CAPPED:
            # tanh z = 1 - 2 / (e^2z + 1), in units of log2
            x = softcap * (1 - 2 / (tl.exp2(x * (2.8853900817779268 / softcap)) + 1))
        new_m = tl.maximum(m, tl.max(x, 2) + absent)
        shrink = tl.exp2(m - new_m)
        p = tl.exp2(x + (absent - new_m)[:, :, None])
        l = l * shrink[:, :, None] + _quad_sum(p, WARPS, ROWS)
        new_u = ()
        new_total = ()
        new_lowest = ()
        new_out = ()
        for i in tl.static_range(GROUPS):
            words = load_unit(value_at + 64 * VALUE_WIDTH * i, used, VALUE_WIDTH)
            unit = value_operand(fragments(words, tables, VALUE_WIDTH, WARPS, ASM), WARPS)
            if VALUE_PER_TOKEN:
                if i % VALUE_SPAN == 0:
                    v = _scales(VALUE_STEPS + value_range + value_range_r * (i // VALUE_SPAN), used, WARPS)
                    minima = _scales(VALUE_MINIMA + value_range + value_range_r * (i // VALUE_SPAN), used, WARPS)
                    largest = tl.maximum(u[i], tl.max(v, 1))
                    # as in decode.py: the rounded weight + 128 in the low bits
                    w = p * (v * (32512.0 / largest)[:, None])[:, None, :] + 12583040.0
                    fade = shrink * (u[i] / largest)[:, None]
                    sum_w = total[i] * fade[:, :, None] + _quad_sum(w - 12583040.0, WARPS, ROWS)
                    low_sum = lowest[i] * shrink[:, :, None] + _quad_sum(p * minima[:, None, :], WARPS, ROWS)
                    weights = _weights(w.to(tl.int32, bitcast=True), WARPS, ROWS)
                new_u = new_u + (largest,)
                new_total = new_total + (sum_w,)
                new_lowest = new_lowest + (low_sum,)
                high, low = _halves(tl.dot(weights, unit, out_dtype=tl.int32), WARPS, ROWS, 32)
                new_out = new_out + (out[i] * fade[:, :, None] + (high * 256 + low).to(tl.float32),)
            else:
                sums = out[i] * shrink[:, :, None]
                for r in tl.static_range(64 // VALUE_SPAN):
                    part = tl.where((token // VALUE_SPAN == r)[None, None, :], p, 0.0)
                    w = part * 32512.0 + 12583040.0
                    weights = _weights(w.to(tl.int32, bitcast=True), WARPS, ROWS)
                    high, low = _halves(tl.dot(weights, unit, out_dtype=tl.int32), WARPS, ROWS, 32)
                    at = value_range + value_range_r * r + 32 * i + place[None, :]
                    inside = used & (32 * i + place < D)[None, :]
                    steps = tl.load(VALUE_STEPS + at, mask=inside, other=0.0).to(tl.float32) / (32512.0 * VALUE_UNIT)
                    minima = tl.load(VALUE_MINIMA + at, mask=inside, other=0.0).to(tl.float32) / 32512.0
                    # minima meet the weights as rounded, so that both miss by the same
                    weight = tl.sum(w - 12583040.0, 2)
                    codes = (high * 256 + low).to(tl.float32) - VALUE_ZERO * weight[:, :, None]
                    sums += codes * steps[:, None, :] + weight[:, :, None] * minima[:, None, :]
                new_out = new_out + (sums,)
        out = new_out
        if VALUE_PER_TOKEN:
            u, total, lowest = new_u, new_total, new_lowest
        m = new_m

    # the warps' partial results are parts like any other
    top = tl.max(m, 0)
    share = tl.exp2(m - top[None, :])
    sum_l = tl.sum(share * tl.sum(l, 2), 0)
    inverse = tl.where(sum_l > 0, 1.0 / sum_l, 0.0)
    base = (program.to(tl.int64) * splits + split) * ROWS + rows
    for i in tl.static_range(GROUPS):
        if VALUE_PER_TOKEN:
            part = share * (u[i] / (32512.0 * VALUE_UNIT))[:, None]
            o = tl.sum(out[i] * part[:, :, None], 0) - VALUE_ZERO * tl.sum(part * tl.sum(total[i], 2), 0)[:, None]
            o += tl.sum(share * tl.sum(lowest[i], 2), 0)[:, None]
        else:
            o = tl.sum(out[i] * share[:, :, None], 0)
        o = o * inverse[:, None]
        tl.store(OUT + base[:, None] * (32 * GROUPS) + 32 * i + tl.arange(0, 32)[None, :], o)
    tl.store(LSE + base, tl.where(sum_l > 0, top + tl.log2(sum_l), -1e30))


@triton.jit
def _score(
    ys, key_at, used, tables,
    WIDTH: tl.constexpr, ZERO: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Queries ``ys`` [W, ROWS, 32] against the codes of as many groups, float32 [W, ROWS, 64]."""
    largest = tl.full([W, ROWS], 1e-30, tl.float32)
    for i in tl.static_range(len(ys)):
        largest = tl.maximum(largest, tl.max(tl.abs(ys[i]), 2))
    unit = largest / 16256.0
    score = tl.zeros([W, 2 * ROWS, 64], tl.int32)
    total = tl.zeros([W, ROWS], tl.float32)
    for i in tl.static_range(len(ys)):
        y = tl.floor(ys[i] / unit[:, :, None] + 0.5)
        total += tl.sum(y, 2)
        high = tl.floor((y + 64) / 128)
        both = tl.join(high, y - 128 * high).to(tl.int8).reshape(W, ROWS // 8, 8, 32, 2)
        query = both.permute(0, 1, 4, 2, 3).reshape(W, 2 * ROWS, 32)
        words = load_unit(key_at + 64 * WIDTH * i, used, WIDTH)
        score = tl.dot(query, key_operand(fragments(words, tables, WIDTH, W, ASM), W), score, out_dtype=tl.int32)
    high, low = _halves(score, W, ROWS, 64)
    return ((high * 128 + low).to(tl.float32) - ZERO * total[:, :, None]) * unit[:, :, None]
