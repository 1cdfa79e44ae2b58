"""Merging the splits of one decode step, fused with the way back from the stored space to the model's."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["splits"])
def merge(
    OUT,  # float32 [programs, splits, ROWS, 32*GROUPS]
    LSE,  # float32 [programs, splits, ROWS], log2
    MAP,  # float32 [H or 1, 32*GROUPS, D], the value map
    MERGED,  # float32 [B, HQ, S, D]
    MERGED_LSE,  # float32 [B, HQ, S], natural log
    splits,
    used_rows,
    map_h,
    H: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,  # D, rounded up to a power of two
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,  # splits, rounded up to a power of two
    PDL: tl.constexpr,
):
    """One program: one query row."""
    program = tl.program_id(0)
    r = tl.program_id(1)
    head = program // BLOCKS
    row = (program % BLOCKS) * ROWS + r
    d = tl.arange(0, DIMS)
    c = tl.arange(0, 32)
    maps = ()
    for i in tl.static_range(GROUPS):
        at = (head % H) * map_h + (32 * i + c)[:, None] * D + d[None, :]
        maps = maps + (tl.load(MAP + at, mask=(d < D)[None, :], other=0.0),)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    s = tl.arange(0, SPLITS)
    at = (program.to(tl.int64) * splits + s) * ROWS + r
    lse = tl.load(LSE + at, mask=s < splits, other=-1e30)
    top = tl.max(lse, 0)
    share = tl.exp2(lse - top)
    total = tl.sum(share, 0)
    out = tl.zeros([DIMS], tl.float32)
    for i in tl.static_range(GROUPS):
        part = OUT + at[:, None] * (32 * GROUPS) + 32 * i + c[None, :]
        part = tl.load(part, mask=(s < splits)[:, None], other=0.0)
        part = tl.sum(part * share[:, None], 0)
        out += tl.sum(part[:, None] * maps[i], 0)
    # [B, H, group, S] is [B, HQ, S]
    to = head.to(tl.int64) * used_rows + row
    if row < used_rows:
        tl.store(MERGED + to * D + d, out / total, mask=d < D)
        seen = top > -1e29
        tl.store(MERGED_LSE + to, tl.where(seen, (top + tl.log2(total)) * 0.6931471805599453, -float("inf")))
