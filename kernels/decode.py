"""Split-KV attention over packed pages, plain Triton: one program is a KV head and a share of its pages.

Every warp owns whole pages and keeps its own running maximum, sum and output, so nothing crosses warps before the end.
The queries are operand A of the integer tensor-core product: a query is 16 bits, rows 0-7 of a tile its high bytes,
rows 8-15 its low ones, so the thread that holds one half of a score holds the other. The accumulator layout of the
scores is the operand layout of the weights, which are quantised the same way for the product with the values.

    x_t = cap(c * k_t * (128 high + low))      k_t: scale of token t, c: query scale * softmax scale * log2 e
    p_t = 2^(x_t - m);  l = sum p_t            m: running maximum
    w_t = round(32512 p_t v_t / u)             v_t: scale of token t, u: running maximum of v
    o   = u / 32512 * (sum w_t byte_t - OFFSET sum w_t)

Where every group of channels has its own gain (GAINS), k, v, u and w are those of the group: its score is scaled
before it is added to the others', and its values meet weights of their own.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvtool.kernels.fragments import fragments, key_operand, load_table, load_unit, value_operand


@triton.jit(do_not_specialize=["splits"])
def decode(
    QUERY,  # int8 [programs, KEY_GROUPS, 2*ROWS, 32], high and low bytes in tiles of 8 + 8 rows
    QUERY_SCALE,  # float32 [programs, ROWS]
    QUERY_START,  # int32 [programs, 1 or KEY_GROUPS, ROWS], what the offsets of the levels contribute to every score
    KEY_PAGES,  # int32 words, page p of head h of sequence b at b*key_b + h*key_h + p*key_p
    VALUE_PAGES,
    KEY_SCALES,  # float16, 64 a page; with GAINS int32 words of 8 codes of 4 bits, 8 a page and group
    VALUE_SCALES,
    KEY_TABLE,
    VALUE_TABLE,
    PAGES,  # int32 [B], pages in use
    PAGE_TABLE,  # int32 [B, capacity], or [B, H, capacity] with table_h; or unused
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
    key_scale_b,
    key_scale_h,
    key_scale_p,
    value_scale_b,
    value_scale_h,
    value_scale_p,
    table_b,
    bias_row,
    softcap,
    KINDS,  # uint8, page p of head h of sequence b at b*kind_b + h*kind_h + p, or unused
    kind_b,
    kind_h,
    kind,  # the pages of this kind are read, the others are not
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,  # of ROWS queries, per KV head
    KEY_GROUPS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    KEY_WIDTHS: tl.constexpr,
    VALUE_WIDTHS: tl.constexpr,
    KEY_OFFSETS: tl.constexpr,  # of the groups' units in a page, words
    VALUE_OFFSETS: tl.constexpr,
    LEVEL_OFFSETS: tl.constexpr,  # of the values' levels, per group
    PAGED: tl.constexpr,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    GAINS: tl.constexpr,
    KINDED: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    ASM: tl.constexpr,
    table_h=0,
    PAGE_LSE=None,  # float32 [B*H, lse_rows, lse_pages], natural log-sum-exp of each page that is read
    lse_rows=0,
    lse_pages=0,
):
    """Attention of ROWS queries over this program's pages, normalised, with its log-sum-exp."""
    program = tl.program_id(0)
    split = tl.program_id(1)
    b = (program // BLOCKS // H).to(tl.int64)
    h = (program // BLOCKS % H).to(tl.int64)
    pages = tl.load(PAGES + b)
    first, last = (split * pages) // splits, ((split + 1) * pages) // splits

    key_table = load_table(KEY_TABLE, ASM)
    value_table = load_table(VALUE_TABLE, ASM)
    rows = tl.arange(0, ROWS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    scale = tl.load(QUERY_SCALE + program * ROWS + rows)[None, :, None]
    if BIASED:
        bias_unit = tl.load(BIAS_UNIT + program * ROWS + rows)[None, :, None]
    starts = ()
    for i in tl.static_range(KEY_GROUPS if GAINS else 1):
        start = tl.load(QUERY_START + (program * (KEY_GROUPS if GAINS else 1) + i) * ROWS + rows)
        # the low rows of each tile of 16 carry the start
        start = tl.join(start * 0, start).reshape(ROWS // 8, 8, 2).permute(0, 2, 1).reshape(2 * ROWS)
        starts = starts + (start[None, :, None] + tl.zeros([WARPS, 2 * ROWS, 64], tl.int32),)
    queries = ()
    for i in tl.static_range(KEY_GROUPS):
        at = (program * KEY_GROUPS + i) * (2 * ROWS * 32)
        at += tl.arange(0, 2 * ROWS)[:, None] * 32 + tl.arange(0, 32)[None, :]
        queries = queries + (tl.load(QUERY + at)[None, :, :].broadcast_to(WARPS, 2 * ROWS, 32),)

    m = tl.full([WARPS, ROWS], -1e30, tl.float32)
    l = tl.zeros([WARPS, ROWS, 4], tl.float32)  # one partial sum a lane of the quad
    u = ()
    total = ()
    for i in tl.static_range(VALUE_GROUPS if GAINS else 1):
        u = u + (tl.full([WARPS], 2.0**-24, tl.float32),)
        total = total + (tl.zeros([WARPS, ROWS, 4], tl.float32),)
    out = ()
    for i in tl.static_range(VALUE_GROUPS):
        out = out + (tl.zeros([WARPS, ROWS, 32], tl.float32),)

    mine = tl.arange(0, WARPS)[:, None]
    for step in tl.range(first, last, WARPS, num_stages=STAGES):
        page = step + mine
        used = page < last
        if KINDED:
            used = used & (tl.load(KINDS + b * kind_b + h * kind_h + page, mask=used, other=0).to(tl.int32) == kind)
        if PAGED:
            where = tl.load(PAGE_TABLE + b * table_b + h * table_h + page, mask=used, other=0).to(tl.int64)
        else:
            where = page.to(tl.int64)
        key_at = KEY_PAGES + b * key_b + h * key_h + where * key_p
        value_at = VALUE_PAGES + b * value_b + h * value_h + where * value_p
        if BIASED:
            # loaded before the products: the compiler keeps what comes first in its layout
            token = (page * 64 + tl.arange(0, 64)[None, :])[:, None, :]
            # 64 bits for the program, 32 for what differs inside it
            biases = BIAS + program.to(tl.int64) * ROWS * bias_row + (rows[None, :, None] * bias_row + token)
            biases = tl.load(biases, mask=used[:, :, None] & (rows >= 0)[None, :, None] & (token >= 0), other=0.0)
        scale_at = b * key_scale_b + h * key_scale_h + where * key_scale_p
        if GAINS:
            value_scale_at = VALUE_SCALES + b * value_scale_b + h * value_scale_h + where * value_scale_p
            x = tl.zeros([WARPS, ROWS, 64], tl.float32)
            for i in tl.static_range(KEY_GROUPS):
                if KEY_WIDTHS[i] > 0:
                    words = load_unit(key_at + KEY_OFFSETS[i], used, KEY_WIDTHS[i])
                    unit = key_operand(fragments(words, key_table, KEY_WIDTHS[i], WARPS, ASM), WARPS)
                    score = tl.dot(queries[i], unit, starts[i], out_dtype=tl.int32)
                    high, low = _halves(score, WARPS, ROWS, 64)
                    k = _gains(KEY_SCALES + scale_at + 8 * i, used, WARPS)
                    x += (high * 128 + low).to(tl.float32) * k[:, None, :]
        else:
            # those of keys and values lie alike
            k = _scales(KEY_SCALES + scale_at, used, WARPS)
            v = _scales(VALUE_SCALES + scale_at, used, WARPS)
            score = starts[0]
            for i in tl.static_range(KEY_GROUPS):
                if KEY_WIDTHS[i] > 0:
                    words = load_unit(key_at + KEY_OFFSETS[i], used, KEY_WIDTHS[i])
                    unit = key_operand(fragments(words, key_table, KEY_WIDTHS[i], WARPS, ASM), WARPS)
                    score = tl.dot(queries[i], unit, score, out_dtype=tl.int32)
            high, low = _halves(score, WARPS, ROWS, 64)
            x = (high * 128 + low).to(tl.float32) * k[:, None, :]
        # an absent page must neither touch the maximum nor weigh anything, even before any page was seen
        absent = tl.where(used, 0.0, -2e30)
        x = x * scale
        if BIASED:
            x += biases.to(tl.float32) * bias_unit
        if CAPPED:
            # tanh z = 1 - 2 / (e^2z + 1), in units of log2
            x = softcap * (1 - 2 / (tl.exp2(x * (2.8853900817779268 / softcap)) + 1))
        if PAGE_LSE is not None:
            top = tl.max(x, 2)
            seen = (top + tl.log2(tl.sum(tl.exp2(x - top[:, :, None]), 2))) * 0.6931471805599453
            row = (program % BLOCKS) * ROWS + rows[None, :]
            to = PAGE_LSE + ((program // BLOCKS).to(tl.int64) * lse_rows + row) * lse_pages + page
            tl.store(to, seen, mask=used & (row < lse_rows))
        new_m = tl.maximum(m, tl.max(x, 2) + absent)
        shrink = tl.exp2(m - new_m)
        p = tl.exp2(x + (absent - new_m)[:, :, None])
        l = l * shrink[:, :, None] + _quad_sum(p, WARPS, ROWS)
        new_u = ()
        new_total = ()
        new_out = ()
        for i in tl.static_range(VALUE_GROUPS):
            if GAINS:
                v = tl.full([WARPS, 64], 1.0, tl.float32)
                if VALUE_WIDTHS[i] > 0:
                    v = _gains(value_scale_at + 8 * i, used, WARPS)
            if GAINS or i == 0:
                largest = tl.maximum(u[i], tl.max(v, 1))
                # 1.5 * 2^23 puts the rounded weight in the low bits; + 128 makes the low byte signed
                w = p * (v * (32512.0 / largest)[:, None])[:, None, :] + 12583040.0
                fade = shrink * (u[i] / largest)[:, None]
                new_u = new_u + (largest,)
                new_total = new_total + (total[i] * fade[:, :, None] + _quad_sum(w - 12583040.0, WARPS, ROWS),)
                weights = _weights(w.to(tl.int32, bitcast=True), WARPS, ROWS)
            if VALUE_WIDTHS[i] > 0:
                words = load_unit(value_at + VALUE_OFFSETS[i], used, VALUE_WIDTHS[i])
                unit = value_operand(fragments(words, value_table, VALUE_WIDTHS[i], WARPS, ASM), WARPS)
                sums = tl.dot(weights, unit, out_dtype=tl.int32)
                high, low = _halves(sums, WARPS, ROWS, 32)
                new_out = new_out + (out[i] * fade[:, :, None] + (high * 256 + low).to(tl.float32),)
            else:
                new_out = new_out + (out[i],)
        out = new_out
        total = new_total
        m, u = new_m, new_u

    # the warps' partial results are parts like any other
    top = tl.max(m, 0)
    share = tl.exp2(m - top[None, :])
    sum_l = tl.sum(share * tl.sum(l, 2), 0)
    inverse = tl.where(sum_l > 0, 1.0 / sum_l, 0.0)
    base = (program.to(tl.int64) * splits + split) * ROWS + rows
    for i in tl.static_range(VALUE_GROUPS):
        if GAINS or i == 0:
            part = share * (u[i] / 32512.0)[:, None]
            sum_w = tl.sum(part * tl.sum(total[i], 2), 0)
        o = (tl.sum(out[i] * part[:, :, None], 0) - LEVEL_OFFSETS[i] * sum_w[:, None]) * inverse[:, None]
        tl.store(OUT + base[:, None] * (32 * VALUE_GROUPS) + 32 * i + tl.arange(0, 32)[None, :], o)
    tl.store(LSE + base, tl.where(sum_l > 0, top + tl.log2(sum_l), -1e30))


@triton.jit
def _scales(pointers, used, W: tl.constexpr):
    """The scales at ``pointers`` [W, 1], float32 [W, 64] in token order."""
    token = tl.arange(0, 64)[None, :]
    scales = tl.load(pointers + token, mask=used & (token >= 0), other=0.0).to(tl.float32)
    return _score_order(scales, W)


@triton.jit
def _gains(pointers, used, W: tl.constexpr):
    """The gains 2^(code/2) of one group at ``pointers`` [W, 1], float32 [W, 64] in token order."""
    word = tl.arange(0, 8)[None, :]
    words = tl.load(pointers + word, mask=used & (word >= 0), other=0)
    codes = words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :] & 15
    # the exponent in half steps; an odd step's mantissa is sqrt(2)'s, not 1.5's
    bits = (codes << 22) - (codes & 1) * 0xAFB0D + 0x3F800000
    return _score_order(bits.to(tl.float32, bitcast=True), W)


@triton.jit
def _score_order(x, W: tl.constexpr):
    """Per-token numbers as stored, [W, (q, u, r)], to token order [W, 64]."""
    return x.reshape(W, 4, 8, 2).permute(0, 2, 1, 3).reshape(W, 64)


@triton.jit
def _halves(x, W: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    """High and low rows [W, ROWS, N] of an accumulator [W, 2*ROWS, N]; both are in the same thread."""
    return tl.split(x.reshape(W, ROWS // 8, 2, 8, N).permute(0, 1, 3, 4, 2).reshape(W, ROWS, N, 2))


@triton.jit
def _quad_sum(x, W: tl.constexpr, ROWS: tl.constexpr):
    """[W, ROWS, 64] summed over the tokens that one thread holds, to [W, ROWS, 4]."""
    x = x.reshape(W, ROWS, 8, 4, 2)
    return tl.sum(tl.sum(x, 4), 2)


@triton.jit
def _weights(bits, W: tl.constexpr, ROWS: tl.constexpr):
    """Rounded weights + 128, [W, ROWS, 64] int32, to operand A of the values: int8 [W, 2*ROWS, T], high and low."""
    high = (bits >> 8).to(tl.int8)
    low = (bits ^ 0x80).to(tl.int8)
    x = tl.join(high, low).reshape(W, ROWS // 8, 8, 2, 2, 2, 4, 2, 2)  # [.., half, h, e, q, e, high/low]
    return x.permute(0, 1, 8, 2, 3, 6, 4, 5, 7).reshape(W, 2 * ROWS, 64)
