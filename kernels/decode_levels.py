"""Split-KV attention over pages of different widths, one launch: ``decode.py`` for the levels of rdkv.

A *step* is up to four pages of one level, one a warp. Its record says where they lie and how wide their groups are, so
one program walks the levels of a KV head in turn, and a *slot*, a program's share of steps, is as long for a head that
kept much as for one that kept little. Widths are branched on; what they mean is two numbers each, a factor and an
offset in units of the bytes that a look-up gives (fragments.py):

    x_t = cap(c * k_t * sum_i factor_i (128 high_i + low_i - offset_i * Y_i) + bias_t)
    o   = u / 32512 * sum over steps of (sum w_t byte_t - offset sum w_t)              w_t of gain times factor

with Y_i the sum of the query over group i. Keys come in one of two rotations, so there are two prepared queries. The
bias is the logit of the removed mean (waves.py), worked out while the page's words are on their way.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvtool.kernels.decode import _halves, _quad_sum, _weights
from kvtool.kernels.fragments import fragment_bytes, key_operand, load_table, value_operand
from kvtool.kernels.planes import SIXTEEN, fragments_of, fragments_of_eight, load_planes
from kvtool.kernels.waves import mean_logits

RECORD = tl.constexpr(8)  # numbers of a step
_GAIN_ZERO, _GAIN_STEPS = tl.constexpr(144.0), tl.constexpr(8.0)  # those of rdkv/pages.py


@triton.jit
def decode(
    QUERY_WORDS,  # int32 words of int8 [programs, 2, GROUPS, 2*ROWS*32], in both rotations, as query_levels.py stores
    QUERY_SCALE,  # float32 [programs, 2, ROWS]
    QUERY_SUMS,  # float32 [programs, 2, GROUPS, ROWS]
    KEY_CODES,  # int32 words
    VALUE_CODES,
    KEY_GAINS,  # int32 words of uint8, 64 a page
    VALUE_GAINS,
    TABLE,
    WIDTHS,  # float32 [11, 2], factor and offset of each width; of 16 bits at 10
    SHARES,  # int32 [slots, 3]: KV head (of all sequences), first step and the step after the last
    STEPS,  # int32 [steps, 8]: keys, values (in 256 bytes), first page, tokens, widths, value width, rotation, key size
    POSITIONS,  # int32 [pages, 2, 8 g, 4], token 8u + g at u / 4, g and u % 4
    TURNS,  # int32 [H, 2, COUNT], 2^32 turns per token of a pair of channels, and 2^31 times what is left
    WAVE_WORDS,  # int32 words of float16, as query_levels.py stores them
    WAVE_UNIT,  # float32 [programs, 2, ROWS]
    OUT,  # float32 [slots, BLOCKS, ROWS, 32*GROUPS]
    LSE,  # float32 [slots, BLOCKS, ROWS], log2
    softcap,
    H: tl.constexpr,
    COUNT: tl.constexpr,  # pairs of channels in which the mean turns, a power of two
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPPED: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Attention of ROWS queries over the steps of this program's slot, normalised, with its log-sum-exp."""
    slot, block = tl.program_id(0), tl.program_id(1)
    head = tl.load(SHARES + 3 * slot)
    first, last = tl.load(SHARES + 3 * slot + 1), tl.load(SHARES + 3 * slot + 2)
    program = head * BLOCKS + block
    table = load_table(TABLE, ASM)
    rows = tl.arange(0, ROWS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()

    m = tl.full([WARPS, ROWS], -1e30, tl.float32)
    u = tl.full([WARPS, ROWS], 2.0**-24, tl.float32)  # the same in every row
    l = tl.zeros([WARPS, ROWS, 4], tl.float32)
    total = tl.zeros([WARPS, ROWS, 4], tl.float32)
    out = ()
    for i in tl.static_range(GROUPS):
        out = out + (tl.zeros([WARPS, ROWS, 32], tl.float32),)

    mine = tl.arange(0, WARPS)[:, None]
    token = tl.arange(0, 64)[None, :]
    for step in tl.range(first, last, num_stages=STAGES):
        record = STEPS + step * RECORD
        page, tokens = tl.load(record + 2) + mine, tl.load(record + 3)
        widths, value_width, turn = tl.load(record + 4), tl.load(record + 5), tl.load(record + 6)
        used = mine * 64 < tokens
        key_at = KEY_CODES + (tl.load(record) + mine * tl.load(record + 7)).to(tl.int64) * 64
        value_size = GROUPS * tl.where(value_width == SIXTEEN, 16, value_width)
        value_at = VALUE_CODES + (tl.load(record + 1) + mine * value_size).to(tl.int64) * 64
        # all of the keys is asked for before any of it is needed, and values as keys leave their registers
        key_planes, value_planes, factors, at = (), (), (), key_at
        for i in tl.static_range(GROUPS):
            width = widths >> 4 * i & 15
            key_planes = key_planes + (load_planes(at, used, width),)
            at += 64 * tl.minimum(width, 8)
        key_gains, value_gains = _load_gains(KEY_GAINS, page, used, WARPS), _load_gains(VALUE_GAINS, page, used, WARPS)
        turned = program * 2 + turn
        scale = tl.load(QUERY_SCALE + turned * ROWS + rows)
        shift = tl.zeros([ROWS], tl.float32)
        for i in tl.static_range(GROUPS):
            width = widths >> 4 * i & 15
            factor, offset = tl.load(WIDTHS + 2 * width) * scale, tl.load(WIDTHS + 2 * width + 1)
            shift += factor * offset * tl.load(QUERY_SUMS + (turned * GROUPS + i) * ROWS + rows)
            factors = factors + (factor[None, :, None],)
        value_factor, value_offset = tl.load(WIDTHS + 2 * value_width), tl.load(WIDTHS + 2 * value_width + 1)

        bias = mean_logits(WAVE_WORDS, WAVE_UNIT, POSITIONS, TURNS, page, used, program, head % H, turn >> 1,
                           COUNT, WARPS, ROWS, ASM)  # fmt: skip
        x = tl.zeros([WARPS, ROWS, 64], tl.float32) - shift[None, :, None]
        at = key_at
        value_unit = 64 * tl.minimum(value_width, 8)
        for i in tl.static_range(GROUPS):
            width = widths >> 4 * i & 15
            query = _query(QUERY_WORDS + (turned * GROUPS + i) * (16 * ROWS), WARPS, ROWS)
            f = fragments_of(key_planes[i], at, used, width, table, WARPS, ASM)
            part = _product(query, key_operand(f, WARPS), 128, WARPS, ROWS, 64)
            if width == SIXTEEN:
                low = fragments_of_eight(at + GROUPS * 512, used, table, WARPS, ASM)
                part = 256 * part + _product(query, key_operand(low, WARPS), 128, WARPS, ROWS, 64)
            x += factors[i] * part
            value_planes = value_planes + (load_planes(value_at + i * value_unit, used, value_width),)
            at += 64 * tl.minimum(width, 8)
        x = x * _gains(key_gains, WARPS, ROWS) + bias
        if CAPPED:
            # tanh z = 1 - 2 / (e^2z + 1), in units of log2
            x = softcap * (1 - 2 / (tl.exp2(x * (2.8853900817779268 / softcap)) + 1))
        # what pads a page must neither touch the maximum nor weigh anything
        x = tl.where((mine * 64 + token < tokens)[:, None, :], x, -2e30)
        new_m = tl.maximum(m, tl.max(x, 2))
        shrink = tl.exp2(m - new_m)
        p = tl.exp2(x - new_m[:, :, None])
        l = l * shrink[:, :, None] + _quad_sum(p, WARPS, ROWS)
        # comparing with the scores also keeps the gains from being worked out before them, which takes registers
        v = tl.where(x > -1e30, _gains(value_gains, WARPS, ROWS), 0.0)
        new_u = tl.maximum(u, tl.max(v, 2) * value_factor)
        # 1.5 * 2^23 puts the rounded weight in the low bits; + 128 makes the low byte signed
        w = p * (v * (32512.0 * value_factor / new_u)[:, :, None]) + 12583040.0
        fade = shrink * (u / new_u)
        total = total * fade[:, :, None] + value_offset * _quad_sum(w - 12583040.0, WARPS, ROWS)
        weights = _weights(w.to(tl.int32, bitcast=True), WARPS, ROWS)
        new_out = ()
        for i in tl.static_range(GROUPS):
            at = value_at + i * value_unit
            f = fragments_of(value_planes[i], at, used, value_width, table, WARPS, ASM)
            part = _product(weights, value_operand(f, WARPS), 256, WARPS, ROWS, 32)
            if value_width == SIXTEEN:
                low = fragments_of_eight(at + GROUPS * 512, used, table, WARPS, ASM)
                part = 256 * part + _product(weights, value_operand(low, WARPS), 256, WARPS, ROWS, 32)
            new_out = new_out + (out[i] * fade[:, :, None] + part,)
        out = new_out
        m, u = new_m, new_u

    # the warps' partial results are parts like any other
    top = tl.max(m, 0)
    share = tl.exp2(m - top[None, :])
    sum_l = tl.sum(share * tl.sum(l, 2), 0)
    inverse = tl.where(sum_l > 0, 1.0 / sum_l, 0.0)
    part = share * (u / 32512.0)
    sum_w = tl.sum(part * tl.sum(total, 2), 0)
    base = (slot.to(tl.int64) * BLOCKS + block) * ROWS + rows
    for i in tl.static_range(GROUPS):
        o = (tl.sum(out[i] * part[:, :, None], 0) - sum_w[:, None]) * inverse[:, None]
        tl.store(OUT + base[:, None] * (32 * GROUPS) + 32 * i + tl.arange(0, 32)[None, :], o)
    tl.store(LSE + base, tl.where(sum_l > 0, top + tl.log2(sum_l), -1e30))


@triton.jit
def _product(rows, unit, base: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    """The integer product of 16-bit rows, high and low, with bytes: float32 [W, ROWS, N]."""
    high, low = _halves(tl.dot(rows, unit, out_dtype=tl.int32), W, ROWS, N)
    return (high * base + low).to(tl.float32)


@triton.jit
def _query(pointer, W: tl.constexpr, ROWS: tl.constexpr):
    """Operand A of a group for every warp, int8 [W, 2*ROWS, 32]: as words, each lane loads what it will hold."""
    at = pointer + tl.arange(0, 16 * ROWS)[None, :] + 0 * tl.arange(0, W)[:, None]
    words = fragment_bytes(tl.load(at).reshape(W, ROWS // 8, 8, 4, 2, 2))  # [W, tile, g, q, h, high/low, e, e]
    return words.permute(0, 1, 5, 2, 3, 4, 6, 7).reshape(W, 2 * ROWS, 32)


@triton.jit
def _load_gains(pointer, page, used, W: tl.constexpr):
    """The words of the gains of each warp's ``page`` [W, 1], [W, 128]: every lane loads those of its scores."""
    word = tl.arange(0, 128)[None, :]
    at = pointer + page.to(tl.int64) * 16 + (word // 4 % 4 * 4 + word % 4)
    return tl.load(at, mask=used & (word >= 0), other=0)


@triton.jit
def _gains(words, W: tl.constexpr, ROWS: tl.constexpr):
    """Gains float32 [W, ROWS, 64] in token order, the same in every row."""
    codes = words.reshape(W, 8, 4, 4)[:, :, :, :, None] >> (8 * tl.arange(0, 4)) & 255  # [W, g, q, u, u and r]
    gains = tl.exp2(codes.to(tl.float32) * (1 / _GAIN_STEPS) - _GAIN_ZERO / _GAIN_STEPS)
    gains = gains.reshape(W, 8, 4, 8, 2).permute(0, 1, 3, 2, 4).reshape(W, 1, 8, 64)
    return gains.broadcast_to(W, ROWS // 8, 8, 64).reshape(W, ROWS, 64)
