"""Split-KV attention over recursive one-bit stages, plain Triton: decode.py with levels by token, stage and sub-space.

A key is n (sum_js mid_js + level_jst s_jt), s_jt its signs in sub-space s at stage j; the levels are floats of 4 bits,
read with a shift and a mask, the norm n one of 8 bits. So

    x_t = cap(n_t (c sum_js level_jst (q . s_jt) + mid) + n_t^2 noise + bias_t)
    o   = sum_t p_t n_t (sum_js level_jst s_jt + mid)

where mid and noise are numbers of the query (query.prepare_levels) and of the channel. What is fitted to the first
stage is part of the linear maps, the others have a factor (RATIOS). Signs are bytes of -64 and 64; the weights of every
stage and sub-space are quantised relative to the largest level there can be times the largest norm seen.

The extra stage of some keys of a page is a product of its own, [ROWS, EXTRA]; a product with the one-hot matrix of
their places brings its result, as two halves of 11 bits, to the tokens.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvtool.kernels.decode import _halves, _quad_sum, _score_order, _weights
from kvtool.kernels.fragments import SIGNS, fragment_bytes, fragments, key_operand, load_unit, value_operand

LARGEST = tl.constexpr(1.75)  # of the levels, which are read as eighths
NORM_UNIT = tl.constexpr(5.192296858534828e33)  # 2^112


@triton.jit(do_not_specialize=["splits"])
def decode(
    QUERY,  # int8 [programs, GROUPS, 2*ROWS, 32], high and low bytes in tiles of 8 + 8 rows
    QUERY_SCALE,  # float32 [programs, ROWS]
    QUERY_MID,  # float32 [programs, 2, ROWS], times log2 e; the second of the extra stage
    QUERY_NOISE,  # float32 [programs, 2, ROWS], times log2 e; the second what an extra stage adds
    KEY_PAGES,  # int32 words, page p of head h of sequence b at b*key_b + h*key_h + p*key_p; stage after stage
    VALUE_PAGES,
    KEY_NORMS,  # int32 words of 4 codes, 16 words a page; those of values lie alike
    VALUE_NORMS,
    KEY_LEVELS,  # int32 words of 8 codes, 8 words a page, stage and sub-space
    VALUE_LEVELS,
    EXTRA_INDEX,  # uint8, extra_n a page, or unused
    EXTRA_BITS,  # uint8, D/8 of each
    EXTRA_LEVELS,  # uint8, SPACES of each
    KEY_RATIOS,  # float32 [H, KEY_STAGES + 1, SPACES], relative to stage 0; the last of the extra stage
    VALUE_RATIOS,  # float32 [H, VALUE_STAGES, SPACES]
    VALUE_MIDS,  # float32 [H, 32*GROUPS]
    PAGES,  # int32 [B], pages in use
    BIAS,  # int16 or float32 [programs, ROWS, T], added to the logits before the cap, or unused
    BIAS_UNIT,  # float32 [programs, ROWS], what one of it is worth, times log2 e
    OUT,  # float32 [programs, splits, ROWS, 32*GROUPS]
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
    key_level_b,
    key_level_h,
    key_level_p,
    value_level_b,
    value_level_h,
    value_level_p,
    index_b,
    index_h,
    index_p,
    bits_b,
    bits_h,
    bits_p,
    level_b,
    level_h,
    level_p,
    extra_n,
    bias_row,
    softcap,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    SPACES: tl.constexpr,
    SPAN: tl.constexpr,  # groups of a sub-space, 1 or 2
    PARTS: tl.constexpr,  # sub-spaces of a group, 1 or 2
    KEY_STAGES: tl.constexpr,
    VALUE_STAGES: tl.constexpr,
    EXTRA: tl.constexpr,  # 0, or 32: of extra_n keys, and as many as a product of float16 has to have, see _placed
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
    WIDTH: tl.constexpr = 32 // PARTS  # channels of an accumulator
    rows, token, place = tl.arange(0, ROWS), tl.arange(0, 64), tl.arange(0, 32)
    key_ratios = ()
    value_ratios = ()
    for i in tl.static_range(SPACES, (KEY_STAGES + 1) * SPACES):
        key_ratios = key_ratios + (tl.load(KEY_RATIOS + h * ((KEY_STAGES + 1) * SPACES) + i),)
    for i in tl.static_range(SPACES, VALUE_STAGES * SPACES):
        value_ratios = value_ratios + (tl.load(VALUE_RATIOS + h * (VALUE_STAGES * SPACES) + i),)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    scale = tl.load(QUERY_SCALE + program * ROWS + rows)[None, :, None]
    mid = tl.load(QUERY_MID + program * 2 * ROWS + rows)[None, :, None]
    noise = tl.load(QUERY_NOISE + program * 2 * ROWS + rows)[None, :, None]
    if EXTRA:
        more_mid = tl.load(QUERY_MID + (program * 2 + 1) * ROWS + rows)[None, :, None]
        more_noise = tl.load(QUERY_NOISE + (program * 2 + 1) * ROWS + rows)[None, :, None]
    if BIASED:
        bias_unit = tl.load(BIAS_UNIT + program * ROWS + rows)[None, :, None]
    queries = ()
    for i in tl.static_range(GROUPS):
        query_at = QUERY + (program * GROUPS + i) * (2 * ROWS * 32)
        query = tl.load(query_at + tl.arange(0, 2 * ROWS)[:, None] * 32 + place[None, :])
        if PARTS == 1:
            queries = queries + (query[None, :, :].broadcast_to(WARPS, 2 * ROWS, 32),)
        else:
            # both sub-spaces meet the same unit; channels lie in the order (q, h, e), h the sub-space
            for part in tl.static_range(2):
                own = tl.where((place // 4 % 2 == part)[None, :], query, 0)
                queries = queries + (own[None, :, :].broadcast_to(WARPS, 2 * ROWS, 32),)

    m = tl.full([WARPS, ROWS], -1e30, tl.float32)
    l = tl.zeros([WARPS, ROWS, 4], tl.float32)  # one partial sum a lane of the quad
    u = tl.full([WARPS], 2.0**-24, tl.float32)
    total = tl.zeros([WARPS, ROWS, 4], tl.float32)
    out = ()
    for i in tl.static_range(GROUPS * PARTS):
        out = out + (tl.zeros([WARPS, ROWS, WIDTH], tl.float32),)

    mine = tl.arange(0, WARPS)[:, None]
    for step in tl.range(first, last, WARPS, num_stages=STAGES):
        page = step + mine
        used = page < last
        where = page.to(tl.int64)
        key_at = KEY_PAGES + b * key_b + h * key_h + where * key_p
        value_at = VALUE_PAGES + b * value_b + h * value_h + where * value_p
        norm_at = b * norm_b + h * norm_h + where * norm_p
        key_level_at = KEY_LEVELS + b * key_level_b + h * key_level_h + where * key_level_p
        value_level_at = VALUE_LEVELS + b * value_level_b + h * value_level_h + where * value_level_p
        if BIASED:
            # loaded before the products: the compiler keeps what comes first in its layout
            at = (page * 64 + token[None, :])[:, None, :]
            # 64 bits for the program, 32 for what differs inside it
            biases = BIAS + program.to(tl.int64) * ROWS * bias_row + (rows[None, :, None] * bias_row + at)
            biases = tl.load(biases, mask=used[:, :, None] & (rows >= 0)[None, :, None] & (at >= 0), other=0.0)
        x = tl.zeros([WARPS, ROWS, 64], tl.float32)
        for j in tl.static_range(KEY_STAGES):
            for i in tl.static_range(GROUPS):
                words = load_unit(key_at + 64 * (j * GROUPS + i), used, 1)
                unit = key_operand(fragments(words, words, 1, WARPS, ASM, SIGNS), WARPS)
                for part in tl.static_range(PARTS):
                    if i * PARTS // SPAN + part < SPACES:  # the last group may be half empty
                        if i % SPAN == 0:
                            score = tl.zeros([WARPS, 2 * ROWS, 64], tl.int32)
                        score = tl.dot(queries[i * PARTS + part], unit, score, out_dtype=tl.int32)
                        if i % SPAN == SPAN - 1:
                            high, low = _halves(score, WARPS, ROWS, 64)
                            y = (high * 128 + low).to(tl.float32)
                            if j > 0:
                                y *= key_ratios[(j - 1) * SPACES + i * PARTS // SPAN + part]
                            levels = key_level_at + 8 * (j * SPACES + i * PARTS // SPAN + part)
                            x += y * _levels(levels, used, WARPS)[:, None, :]
        x = x * scale + mid
        k = _norms(KEY_NORMS + norm_at, used, WARPS)[:, None, :]
        if EXTRA:
            slot = tl.arange(0, EXTRA)[None, :]
            index = EXTRA_INDEX + b * index_b + h * index_h + where * index_p
            index = tl.load(index + slot, mask=used & (slot < extra_n), other=64).to(tl.int32)
            bits_at = EXTRA_BITS + b * bits_b + h * bits_h + where * bits_p
            level_at = EXTRA_LEVELS + b * level_b + h * level_h + where * level_p
            more = tl.zeros([WARPS, ROWS, EXTRA], tl.float32)
            for i in tl.static_range(GROUPS):
                unit = _extra_operand(bits_at, used, i, extra_n, D, EXTRA, WARPS)
                for part in tl.static_range(PARTS):
                    if i * PARTS // SPAN + part < SPACES:
                        if i % SPAN == 0:
                            score = tl.zeros([WARPS, 2 * ROWS, EXTRA], tl.int32)
                        score = tl.dot(queries[i * PARTS + part], unit, score, out_dtype=tl.int32)
                        if i % SPAN == SPAN - 1:
                            high, low = _halves(score, WARPS, ROWS, EXTRA)
                            ratio = key_ratios[(KEY_STAGES - 1) * SPACES + i * PARTS // SPAN + part]
                            y = (high * 128 + low).to(tl.float32) * ratio
                            code = level_at + slot * SPACES + (i * PARTS // SPAN + part)
                            code = tl.load(code, mask=used & (slot < extra_n), other=0)
                            more += y * _level(code.to(tl.int32))[:, None, :]
            onehot = (index[:, :, None] == token[None, None, :]).to(tl.float16)
            x += _placed(more * scale + more_mid, onehot, WARPS, ROWS, EXTRA)
            ones = tl.full([WARPS, 2 * ROWS, EXTRA], 1.0, tl.float16)
            more, _ = _halves(tl.dot(ones, onehot), WARPS, ROWS, 64)
            x = k * (x + k * (noise + more * more_noise))
        else:
            x = k * (x + k * noise)
        # an absent page must neither touch the maximum nor weigh anything, even before any page was seen
        absent = tl.where(used, 0.0, -2e30)
        if BIASED:
            x += biases.to(tl.float32) * bias_unit
        if CAPPED:
            # tanh z = 1 - 2 / (e^2z + 1), in units of log2
            x = softcap * (1 - 2 / (tl.exp2(x * (2.8853900817779268 / softcap)) + 1))
        new_m = tl.maximum(m, tl.max(x, 2) + absent)
        shrink = tl.exp2(m - new_m)
        p = tl.exp2(x + (absent - new_m)[:, :, None])
        l = l * shrink[:, :, None] + _quad_sum(p, WARPS, ROWS)
        v = _norms(VALUE_NORMS + norm_at, used, WARPS)
        largest = tl.maximum(u, tl.max(v, 1))
        p = p * (v * (32512.0 / (largest * LARGEST))[:, None])[:, None, :]
        fade = shrink * (u / largest)[:, None]
        total = total * fade[:, :, None] + _quad_sum(p, WARPS, ROWS)
        for j in tl.static_range(VALUE_STAGES):
            new_out = ()
            for i in tl.static_range(GROUPS):
                words = load_unit(value_at + 64 * (j * GROUPS + i), used, 1)
                unit = value_operand(fragments(words, words, 1, WARPS, ASM, SIGNS), WARPS)
                if PARTS == 1:
                    units = (unit,)
                else:
                    units = tl.split(unit.reshape(WARPS, 64, 2, 16).permute(0, 1, 3, 2))
                for part in tl.static_range(PARTS):
                    o = out[i * PARTS + part]
                    if j == 0:
                        o = o * fade[:, :, None]
                    if i * PARTS // SPAN + part < SPACES:
                        if i % SPAN == 0:
                            levels = value_level_at + 8 * (j * SPACES + i * PARTS // SPAN + part)
                            levels = _levels(levels, used, WARPS)
                            # as in decode.py: the rounded weight + 128 in the low bits
                            w = p * levels[:, None, :] + 12583040.0
                            weights = _weights(w.to(tl.int32, bitcast=True), WARPS, ROWS)
                        high, low = _halves(tl.dot(weights, units[part], out_dtype=tl.int32), WARPS, ROWS, WIDTH)
                        y = (high * 256 + low).to(tl.float32)
                        if j > 0:
                            y *= value_ratios[(j - 1) * SPACES + i * PARTS // SPAN + part]
                        o += y
                    new_out = new_out + (o,)
            out = new_out
        m, u = new_m, largest

    # the warps' partial results are parts like any other
    top = tl.max(m, 0)
    share = tl.exp2(m - top[None, :])
    sum_l = tl.sum(share * tl.sum(l, 2), 0)
    inverse = tl.where(sum_l > 0, 1.0 / sum_l, 0.0)
    part = share * (u * LARGEST / 32512.0)[:, None]
    sum_v = tl.sum(part * tl.sum(total, 2), 0)
    base = (program.to(tl.int64) * splits + split) * ROWS + rows
    for i in tl.static_range(GROUPS * PARTS):
        channel = WIDTH * i + tl.arange(0, WIDTH)[None, :]
        mids = tl.load(VALUE_MIDS + h * (32 * GROUPS) + channel)
        o = (tl.sum(out[i] * part[:, :, None], 0) / 64 + mids * sum_v[:, None]) * inverse[:, None]
        tl.store(OUT + base[:, None] * (32 * GROUPS) + channel, o)
    tl.store(LSE + base, tl.where(sum_l > 0, top + tl.log2(sum_l), -1e30))


@triton.jit
def _level(codes):
    """(1 + (c & 3)/4) 2^((c >> 2) - 3): the code is the top of the mantissa and the bottom of the exponent."""
    return ((codes << 21) | 0x3E000000).to(tl.float32, bitcast=True)


@triton.jit
def _levels(pointers, used, W: tl.constexpr):
    """The levels of one stage and sub-space at ``pointers`` [W, 1], float32 [W, 64] in token order."""
    word = tl.arange(0, 8)[None, :]
    words = tl.load(pointers + word, mask=used & (word >= 0), other=0)
    return _score_order(_level(words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :] & 15), W)


@triton.jit
def _norms(pointers, used, W: tl.constexpr):
    """The norms at ``pointers`` [W, 1], float32 [W, 64] in token order."""
    word = tl.arange(0, 16)[None, :]
    words = tl.load(pointers + word, mask=used & (word >= 0), other=0)
    codes = words[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :] & 255
    return _score_order((codes << 20).to(tl.float32, bitcast=True) * NORM_UNIT, W)


@triton.jit
def _extra_operand(
    bits_at, used, i: tl.constexpr, extra_n, D: tl.constexpr, EXTRA: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Signs of group ``i`` of the extra stage, -64 and 64, int8 [W, 32 channels in the order (q, h, e), EXTRA]."""
    token, lane = tl.arange(0, EXTRA)[None, :, None], tl.arange(0, 8)[None, None, :]  # lane = 2q + h
    # channels 16h + 4q ... + 3 are half of byte 2h + q/2
    byte = 4 * i + 2 * (lane % 2) + lane // 4
    inside = used[:, :, None] & (token < extra_n) & (byte < D // 8)
    bits = tl.load(bits_at[:, :, None] + token * (D // 8) + byte, mask=inside, other=0).to(tl.int32)
    bits = bits >> (4 * (lane // 2 % 2)) & 15
    # bit e to the top of byte e
    f = ((bits * 0x10204080) & -0x7F7F7F80) ^ -0x3F3F3F40
    return fragment_bytes(f).permute(0, 2, 3, 4, 1).reshape(W, 32, EXTRA)


@triton.jit
def _placed(x, onehot, W: tl.constexpr, ROWS: tl.constexpr, EXTRA: tl.constexpr):
    """``x`` [W, ROWS, EXTRA] at the places of ``onehot`` [W, EXTRA, 64], good to 21 bits.

    What is traced to loads of bytes is given to lanes 8 at a time, so a product needs at least 32 numbers to sum: of 16
    Triton 3.6 multiplies half, with the wrong partners.
    """
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    both = tl.join(high, low).reshape(W, ROWS // 8, 8, EXTRA, 2).permute(0, 1, 4, 2, 3).reshape(W, 2 * ROWS, EXTRA)
    high, low = _halves(tl.dot(both, onehot), W, ROWS, 64)
    return high + low
