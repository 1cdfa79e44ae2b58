"""Query preparation, fused: transform the queries, then quantise them to 16 bits as two int8 rows.

y = q M                    M: the key map, [D, 32*groups], per KV head; steps of the levels are folded into it
y = s (128 high + low)     s = max|y| / 16256 per row, |high| <= 127, -64 <= low < 64
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LARGEST = tl.constexpr(16256.0)  # 127 * 128


@triton.jit
def prepare(
    QUERIES,  # [B, HQ, S, D], any float
    MAP,  # float32 [H or 1, D, 32*GROUPS]
    QUERY,  # int8 [programs, GROUPS, TILE, 32], rows 0-7 of every 16 high and 8-15 low
    QUERY_SCALE,  # float32 [programs, ROWS]
    QUERY_START,  # int32 [programs, ROWS]
    used_rows,  # query heads per KV head * S
    query_b,
    query_h,
    query_s,
    map_h,
    factor,  # softmax scale * log2 e
    S: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,  # D, rounded up to a power of two
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    LEVEL_OFFSETS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one query row (query head of the group, then position); unused rows become zeros."""
    program = tl.program_id(0)
    r = tl.program_id(1)
    head = program // BLOCKS
    b, h = (head // H).to(tl.int64), head % H
    row = (program % BLOCKS) * ROWS + r
    d = tl.arange(0, DIMS)
    c = tl.arange(0, 32)
    maps = ()
    for i in tl.static_range(GROUPS):
        at = h * map_h + d[:, None] * (32 * GROUPS) + 32 * i + c[None, :]
        maps = maps + (tl.load(MAP + at, mask=(d < D)[:, None], other=0.0),)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = b * query_b + (h * (used_rows // S) + row // S) * query_h + (row % S) * query_s
    q = tl.load(QUERIES + at + d, mask=d < tl.where(row < used_rows, D, 0), other=0.0).to(tl.float32)
    turned = ()
    largest = 1e-30
    for i in tl.static_range(GROUPS):
        y = tl.sum(q[:, None] * maps[i], 0)
        largest = tl.maximum(largest, tl.max(tl.abs(y), 0))
        turned = turned + (y,)
    start = 0.0
    # channel 16h + 4q + e lies at 8q + 4h + e
    place = ((c // 4) % 4) * 8 + (c // 16) * 4 + c % 4
    base = program.to(tl.int64) * GROUPS * TILE + (r // 8) * 16 + r % 8
    for i in tl.static_range(GROUPS):
        y = tl.floor(turned[i] * (LARGEST / largest) + 0.5)
        high = tl.floor((y + 64) / 128)
        to = QUERY + (base + i * TILE) * 32 + place
        tl.store(to, high.to(tl.int8))
        tl.store(to + 8 * 32, (y - 128 * high).to(tl.int8))
        start -= LEVEL_OFFSETS[i] * tl.sum(y, 0)
    tl.store(QUERY_START + program * ROWS + r, tl.floor(start + 0.5).to(tl.int32))
    tl.store(QUERY_SCALE + program * ROWS + r, largest / LARGEST * factor)
