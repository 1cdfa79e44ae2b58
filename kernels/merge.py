"""Merging the splits of one decode step, fused with the way back from the stored space to the model's."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["splits"])
def merge(
    OUT,  # float32 [programs, splits, ROWS, C]
    LSE,  # float32 [programs, splits, ROWS], log2
    MAP,  # float32 [H or 1, C, D], the value map
    MERGED,  # float32 [B, HQ, S, D]
    MERGED_LSE,  # float32 [B, HQ, S], natural log
    splits,
    used_rows,
    map_h,
    SPLITS: tl.constexpr,  # splits, rounded up to a power of two
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    DIMS: tl.constexpr,  # D and C, rounded up to powers of two
    CHANNELS: tl.constexpr,
    PDL: tl.constexpr,
    SLOTS=None,  # int32 [B*H + 1], where each KV head's splits begin in OUT [slots, BLOCKS, ROWS, C], if they differ
):
    """One program: one query row."""
    program = tl.program_id(0)
    r = tl.program_id(1)
    head = program // BLOCKS
    row = (program % BLOCKS) * ROWS + r
    d, c, s = tl.arange(0, DIMS), tl.arange(0, CHANNELS), tl.arange(0, SPLITS)
    inside = (c < C)[:, None] & (d < D)[None, :]
    matrix = tl.load(MAP + (head % H) * map_h + c[:, None] * D + d[None, :], mask=inside, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if SLOTS is None:
        at = (program.to(tl.int64) * splits + s) * ROWS + r
    else:
        first = tl.load(SLOTS + head)
        splits = tl.load(SLOTS + head + 1) - first
        at = ((first + s).to(tl.int64) * BLOCKS + program % BLOCKS) * ROWS + r
    parts = tl.load(OUT + at[:, None] * C + c[None, :], mask=(s < splits)[:, None] & (c < C)[None, :], other=0.0)
    lse = tl.load(LSE + at, mask=s < splits, other=-1e30)
    top = tl.max(lse, 0)
    share = tl.exp2(lse - top)
    total = tl.sum(share, 0)
    stored = tl.sum(parts * share[:, None], 0) / total
    out = tl.sum(stored[:, None] * matrix, 0)
    if row < used_rows:
        to = head.to(tl.int64) * used_rows + row  # [B, H, group, S] is [B, HQ, S]
        tl.store(MERGED + to * D + d, out, mask=d < D)
        seen = top > -1e29
        tl.store(MERGED_LSE + to, tl.where(seen, (top + tl.log2(total)) * 0.6931471805599453, -float("inf")))
