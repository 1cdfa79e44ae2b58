"""The Gluon decode: the same pages, inputs and results as ``decode.py``, with the codes as operand A.

The scores of 16 tokens and 4 query heads (high and low byte of the query: 8 columns) are one ``mma.m16n8k32``, so a
thread holds exactly one score per token and no lane works on padding, which is what limits ``decode.py`` below 4 bits.
For the product with the values the weights must become operand B, tokens along k: ``movmatrix`` turns an 8x8 matrix
of byte pairs around inside the warp. Pages reach shared memory by ``cp.async``, STAGES - 1 steps ahead, each warp its
own; with programmatic dependent launch the first ones are under way before the query is ready.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvtool.kernels.copies import allocate, allocate_scales, fetch, unit_words
from kvtool.kernels.fragments import RAW_KEYS, RAW_VALUES, fragment_bytes, fragments, load_table

# [warp, row, column], one warp per batch entry
MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8]))
OPERAND_A = gl.constexpr(gl.DotOperandLayout(0, MMA.value, 8))
OPERAND_B = gl.constexpr(gl.DotOperandLayout(1, MMA.value, 8))
# stored at [q][u][r] is token 8u + 2q + r; here lane 4g + any holds tokens 8u + g
TOKENS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 2], [0, 4], [0, 8]], [[0, 0], [0, 0], [0, 1], [0, 16], [0, 32]], [[1, 0], [2, 0]], [], [4, 64]
    )
)
# names that later releases of Triton changed
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

TURN = gl.constexpr(
    # two weights + 128 -> bytes (high, high', low, low'); turn around; bytes in the order of tokens
    "{ .reg .b32 t; prmt.b32 t, $1, $2, 0x4051; xor.b32 t, t, 0x80800000;"
    " movmatrix.sync.aligned.m8n8.trans.b16 t, t; prmt.b32 $0, t, t, 0x3120; }"
)


@gluon.jit(do_not_specialize=["splits"])
def decode(
    QUERY,
    QUERY_SCALE,
    QUERY_START,
    KEY_PAGES,
    VALUE_PAGES,
    KEY_SCALES,
    VALUE_SCALES,
    KEY_TABLE,
    VALUE_TABLE,
    PAGES,
    PAGE_TABLE,
    BIAS,
    BIAS_UNIT,
    OUT,
    LSE,
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
    H: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCKS: gl.constexpr,
    KEY_GROUPS: gl.constexpr,
    VALUE_GROUPS: gl.constexpr,
    KEY_WIDTHS: gl.constexpr,
    VALUE_WIDTHS: gl.constexpr,
    KEY_OFFSETS: gl.constexpr,
    VALUE_OFFSETS: gl.constexpr,
    LEVEL_OFFSETS: gl.constexpr,
    PAGED: gl.constexpr,
    BIASED: gl.constexpr,
    CAPPED: gl.constexpr,
    RAW: gl.constexpr,  # all keys have one bit
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """As ``decode.decode``, with ROWS a multiple of 4."""
    program = gl.program_id(0)
    split = gl.program_id(1)
    b = (program // BLOCKS // H).to(gl.int64)
    h = (program // BLOCKS % H).to(gl.int64)
    pages = gl.load(PAGES + b)
    first, last = (split * pages) // splits, ((split + 1) * pages) // splits
    KEY_PAGES += b * key_b + h * key_h
    VALUE_PAGES += b * value_b + h * value_h
    KEY_SCALES += b * key_scale_b + h * key_scale_h
    VALUE_SCALES += b * key_scale_b + h * key_scale_h  # they lie alike
    PAGE_TABLE += b * table_b
    key_table = load_table(KEY_TABLE, True)
    value_table = load_table(VALUE_TABLE, True)

    key_store = allocate(KEY_WIDTHS, STAGES)
    value_store = allocate(VALUE_WIDTHS, STAGES)
    scale_store = allocate_scales(STAGES)
    for i in gl.static_range(STAGES - 1):
        fetch(
            KEY_PAGES, VALUE_PAGES, KEY_SCALES, VALUE_SCALES, PAGE_TABLE, first + 4 * i, last, i,
            key_store, value_store, scale_store, key_p, value_p, key_scale_p, KEY_WIDTHS, VALUE_WIDTHS, PAGED,
        )  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()

    N: gl.constexpr = 2 * ROWS
    column = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(1, MMA)))
    start = gl.load(QUERY_START + program * ROWS + column // 2)
    start = gl.where(column % 2 == 0, 0, start)
    zero = gl.full([4, 64, N], 0, gl.int32, MMA)
    start = zero if RAW else start[None, None, :] + zero
    queries = ()
    w3 = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, OPERAND_B)))[:, None, None]
    c3 = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, OPERAND_B)))[None, :, None]
    n3 = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(1, OPERAND_B)))[None, None, :]
    row3 = (n3 // 16) * 16 + (n3 % 2) * 8 + (n3 // 2) % 8
    for i in gl.static_range(KEY_GROUPS):
        at = (program * KEY_GROUPS + i) * (2 * QUERY_ROWS(ROWS) * 32) + row3 * 32 + c3 + 0 * w3
        queries = queries + (gl.load(QUERY + at),)

    some, _ = gl.split(zero.reshape([4, 64, ROWS, 2]))
    SCORE: gl.constexpr = some.type.layout
    PER_ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    PER_TOKEN: gl.constexpr = gl.SliceLayout(2, SCORE)
    PER_WARP: gl.constexpr = gl.SliceLayout(1, PER_TOKEN)
    rows = gl.arange(0, ROWS, gl.SliceLayout(0, PER_ROW))
    scale = gl.load(QUERY_SCALE + program * ROWS + rows)[None, :][:, None, :]
    if BIASED:
        bias_unit = gl.load(BIAS_UNIT + program * ROWS + rows)[None, :][:, None, :]
    offset = gl.load(QUERY_START + program * ROWS + rows).to(gl.float32)[None, :][:, None, :]
    m = gl.full([4, ROWS], -1e30, gl.float32, PER_ROW)
    u = gl.full([4], 2.0**-24, gl.float32, PER_WARP)
    l = _lane_sum(some.to(gl.float32), ROWS)
    total = l
    zero32 = gl.full([4, 32, N], 0, gl.int32, MMA)
    nothing, _ = gl.split(zero32.reshape([4, 32, ROWS, 2]))
    OUTPUT: gl.constexpr = nothing.type.layout
    out = ()
    for i in gl.static_range(VALUE_GROUPS):
        out = out + (nothing.to(gl.float32),)

    mine = gl.arange(0, 4, PER_WARP)
    stage = 0
    for step in range(first, last, 4):
        async_copy.wait_group(STAGES - 2)
        ahead = stage + STAGES - 1
        ahead = gl.where(ahead >= STAGES, ahead - STAGES, ahead)
        fetch(
            KEY_PAGES, VALUE_PAGES, KEY_SCALES, VALUE_SCALES, PAGE_TABLE, step + 4 * (STAGES - 1), last, ahead,
            key_store, value_store, scale_store, key_p, value_p, key_scale_p, KEY_WIDTHS, VALUE_WIDTHS, PAGED,
        )  # fmt: skip
        k = _token_order(scale_store.index(2 * stage).load(TOKENS), PER_TOKEN)
        v = _token_order(scale_store.index(2 * stage + 1).load(TOKENS), PER_TOKEN)
        score = start
        for i in gl.static_range(KEY_GROUPS):
            if KEY_WIDTHS[i] > 0:
                words = unit_words(key_store, stage, KEY_WIDTHS, i)
                f = fragment_bytes(fragments(words, key_table, KEY_WIDTHS[i], 4, True, RAW_KEYS if RAW else 0))
                unit = f.reshape([4, 64, 32])  # (slot, g), (q, h, e)
                score = mma_v2(gl.convert_layout(unit, OPERAND_A, assert_trivial=True), queries[i], score)
        high, low = gl.split(score.reshape([4, 64, ROWS, 2]))
        x = (high * 128 + low).to(gl.float32)
        if RAW:
            x = x * _raw_unit(PER_TOKEN)[:, :, None] + offset
        x = x * k[:, :, None]
        x = x * scale
        if BIASED:
            token = step * 64 + gl.arange(0, 4, PER_WARP)[:, None] * 64
            token += gl.arange(0, 64, gl.SliceLayout(0, PER_TOKEN))[None, :]
            biases = BIAS + program.to(gl.int64) * ROWS * bias_row
            biases += rows[None, :][:, None, :] * bias_row + token[:, :, None]
            inside = (token[:, :, None] < last * 64) & (rows >= 0)[None, :][:, None, :]
            x += gl.load(biases, mask=inside, other=0.0).to(gl.float32) * bias_unit
        if CAPPED:
            # tanh z = 1 - 2 / (e^2z + 1), in units of log2
            x = softcap * (1 - 2 / (gl.exp2(x * (2.8853900817779268 / softcap)) + 1))
        absent = gl.where(step + mine < last, 0.0, -2e30)
        absent = gl.convert_layout(absent, gl.SliceLayout(1, PER_ROW), assert_trivial=True)[:, None]
        new_m = gl.maximum(m, gl.max(x, 1) + absent)
        new_u = gl.maximum(u, gl.max(v, 1))
        shrink = gl.exp2(m - new_m)
        p = gl.exp2(x + (absent - new_m)[:, None, :])
        w = p * (v * (32512.0 / new_u)[:, None])[:, :, None] + 12583040.0
        l = _decay(l, shrink) + _lane_sum(p, ROWS)
        fade = shrink * gl.convert_layout(u / new_u, gl.SliceLayout(1, PER_ROW), assert_trivial=True)[:, None]
        total = _decay(total, fade) + _lane_sum(w - 12583040.0, ROWS)
        weights = _operand(w.to(gl.int32, bitcast=True), ROWS)
        fade = gl.convert_layout(fade, gl.SliceLayout(1, OUTPUT), assert_trivial=True)[:, None, :]
        new_out = ()
        for i in gl.static_range(VALUE_GROUPS):
            if VALUE_WIDTHS[i] > 0:
                words = unit_words(value_store, stage, VALUE_WIDTHS, i)
                f = fragment_bytes(fragments(words, value_table, VALUE_WIDTHS[i], 4, True, RAW_VALUES))
                unit = f.reshape([4, 4, 2, 8, 4, 2, 2, 2]).permute([0, 1, 3, 2, 4, 5, 6, 7]).reshape([4, 32, 64])
                sums = mma_v2(gl.convert_layout(unit, OPERAND_A, assert_trivial=True), weights, zero32)
                high, low = gl.split(sums.reshape([4, 32, ROWS, 2]))
                new_out = new_out + (out[i] * fade + (high * 256 + low).to(gl.float32),)
            else:
                new_out = new_out + (out[i],)
        out = new_out
        m, u = new_m, new_u
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    # copies still under way, of absent pages, must not land in what the reductions below use
    async_copy.wait_group(0)
    barrier()

    top = gl.max(m, 0)
    share = gl.exp2(m - top[None, :])
    sum_l = gl.sum(share * gl.convert_layout(gl.sum(l, 1), PER_ROW), 0)
    share = share * gl.convert_layout(u * (1 / 32512.0), gl.SliceLayout(1, PER_ROW), assert_trivial=True)[:, None]
    sum_w = gl.sum(share * gl.convert_layout(gl.sum(total, 1), PER_ROW), 0)
    inverse = gl.where(sum_l > 0, 1.0 / sum_l, 0.0)
    base = (program.to(gl.int64) * splits + split) * ROWS
    gl.store(LSE + base + rows, gl.where(sum_l > 0, top + gl.log2(sum_l), -1e30))
    ROW: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, OUTPUT))
    sum_w = gl.convert_layout(sum_w, ROW)
    inverse = gl.convert_layout(inverse, ROW)
    share = gl.convert_layout(share, gl.SliceLayout(1, OUTPUT))[:, None, :]
    for i in gl.static_range(VALUE_GROUPS):
        o = gl.sum(out[i] * share, 0)
        channel = gl.arange(0, 32, gl.SliceLayout(1, gl.SliceLayout(0, OUTPUT)))
        if VALUE_WIDTHS[i] == 1:
            o = o * gl.exp2((6 - 2 * (channel // 8)).to(gl.float32))[:, None]
        o = (o - LEVEL_OFFSETS[i] * sum_w[None, :]) * inverse[None, :]
        row = gl.arange(0, ROWS, ROW)
        gl.store(OUT + (base + row)[None, :] * (32 * VALUE_GROUPS) + 32 * i + channel[:, None], o)


@gluon.constexpr_function
def QUERY_ROWS(rows):
    """Rows of the stored query tile: blocks of 8, whatever ROWS is."""
    return max(rows, 8)


@gluon.jit
def _token_order(x, LAYOUT: gl.constexpr):
    x = x.to(gl.float32).reshape([4, 4, 8, 2]).permute([0, 2, 1, 3]).reshape([4, 64])
    return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def _raw_unit(LAYOUT: gl.constexpr):
    """64 over the byte that stands for a set bit of raw keys, [1, 64]: slot s holds tokens 8s to 8s + 7."""
    slot = gl.arange(0, 64, gl.SliceLayout(0, LAYOUT)) // 8
    power = ((133 - slot) << 23).to(gl.float32, bitcast=True)  # 2^(6 - slot), built so that it folds to a constant
    return gl.where(slot == 7, -power, power)[None, :]


@gluon.jit
def _lane_sum(x, ROWS: gl.constexpr):
    """[4, 64, ROWS] summed over the tokens that one thread holds, to [4, 8, ROWS]."""
    return gl.sum(x.reshape([4, 8, 8, ROWS]), 1)


@gluon.jit
def _decay(x, factor):
    """``x`` [4, 8, ROWS] times ``factor`` [4, ROWS]."""
    return x * gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout), assert_trivial=True)[:, None, :]


@gluon.jit
def _operand(bits, ROWS: gl.constexpr):
    """Rounded weights + 128, int32 [4, 64, ROWS], to operand B: int8 [4, 64 tokens, 2*ROWS]."""
    pairs = bits.reshape([4, 4, 2, 8, ROWS]).permute([0, 1, 3, 4, 2])  # tokens 8u + g and 8(u+1) + g
    first, second = gl.split(pairs)
    turned = gl.inline_asm_elementwise(TURN, "=r,r,r", [first, second], dtype=gl.int32, is_pure=True, pack=1)
    # what lane (g, q) holds now belongs to column g and to the tokens of quad q
    x = fragment_bytes(turned).reshape([4, 2, 2, 8, ROWS // 4, 4, 2, 2])  # [warp, half, h, g, tile, q, e, e]
    x = x.permute([0, 1, 5, 2, 6, 7, 4, 3]).reshape([4, 64, 2 * ROWS])
    return gl.convert_layout(x, OPERAND_B, assert_trivial=True)
