"""The logits of a removed key mean: q . R(n) m for every position n, without reading any key.

In the pairs of the rotary embedding (channels c and c + R/2) this is a trigonometric polynomial,

    q . R(n) m = sum_c  a_c cos(n t_c) + b_c sin(n t_c)      a = q1 m1 + q2 m2,  b = q2 m1 - q1 m2

whose amplitude sum_c |(a_c, b_c)| bounds it, so 16 bits of it are enough: 1/65534 of the amplitude is at most 1e-3 nats
up to 65 nats (SmolLM2-135M's largest is 55). A page that begins at n = 64p needs a and b turned once by the angle
64 p t, and then one product with the table of cos(r t), sin(r t), r < 64, which all pages share. The rows of that
product are the query rows of a KV head for as many pages as fill a tile of the tensor cores.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kvtool import packing
from kvtool.kernels.launch import check_queries, processors
from kvtool.shapes import Rope

_RESIDENT = 2  # programs a multiprocessor holds, by their registers


def mean_bias(
    queries: Tensor, mean: Tensor, rope: Rope | None, positions: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """:func:`mean_logits`; without ``rope`` the mean is the same at every position, and the bias float32, unscaled."""
    check_queries(queries, *mean.shape)
    if rope is not None:
        return mean_logits(queries, mean, rope, positions, scale)
    group = queries.shape[1] // mean.shape[0]
    one = scale * (queries.float() * mean.repeat_interleave(group, 0)[:, None]).sum(-1, keepdim=True)
    return one.expand(*queries.shape[:3], len(positions)), None


def mean_logits(queries: Tensor, mean: Tensor, rope: Rope, positions: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``scale`` * q . R(n) m for ``queries`` [B, HQ, S, D], ``mean`` [H, D], ``positions`` [T].

    Returns int16 [B, HQ, S, T] and the unit of each query's row, float32 [B, HQ, S].

    Positions are consecutive and T is a multiple of 64. Channels beyond the rotary width add the same to all logits.
    """
    B, HQ, S, D = queries.shape
    H, T = mean.shape[0], len(positions)
    half, rows, pages = len(rope.inv_freq), HQ // H * S, T // packing.PAGE
    padded, block = triton.next_power_of_2(rows), max(16, triton.next_power_of_2(half))
    tile = max(padded, 64)
    queries = queries if queries.stride(-1) == 1 else queries.contiguous()
    out = torch.empty(B, HQ, S, T, dtype=torch.int16, device=queries.device)
    unit = torch.empty(B, HQ, S, dtype=torch.float32, device=queries.device)
    tiles = triton.cdiv(pages, tile // padded)
    # one table serves several tiles, as long as all programs fit the card at once
    each = triton.cdiv(tiles * B * H, _RESIDENT * processors(queries.device))
    _polynomial[(B * H, triton.cdiv(tiles, each))](
        queries,
        mean.float().contiguous(),
        *starts(rope, positions),
        *_halves(rope, queries.device),
        out,
        unit,
        rows,
        pages,
        each,
        *queries.stride()[:3],
        scale,
        rope.scaling,
        H=H,
        S=S,
        D=D,
        DIMS=triton.next_power_of_2(D),
        HALF=half,
        BLOCK=block,
        ROWS=padded,
        TILE=tile,
        num_warps=4 * max(1, block // 64),
    )
    return out, unit


_tables = WeakIdKeyDictionary()


def starts(rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [T/64, R/2], of where every page of ``positions`` [T] begins."""
    # a captured step has the same positions for good, and all its layers share them
    known = _tables.setdefault(positions, {})
    if rope not in known:
        cos, sin = rope.table(positions[:: packing.PAGE])
        known[rope] = cos.contiguous(), sin.contiguous()
    return known[rope]


@lru_cache(maxsize=16)
def steps(rope: Rope, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [64, R/2], of how far every token of a page is turned from its first; not scaled."""
    cos, sin = Rope(inv_freq=rope.inv_freq).table(torch.arange(packing.PAGE))
    return cos.to(device).contiguous(), sin.to(device).contiguous()


@lru_cache(maxsize=16)
def _halves(rope: Rope, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same as float16 [2, R/2, 64]: rounded, and what rounding left."""
    both = ((x.mT, x.mT - x.mT.half().float()) for x in steps(rope, device))
    cos, sin = (torch.stack(parts).half().contiguous() for parts in both)
    return cos, sin


@triton.jit(do_not_specialize=["each"])
def _polynomial(
    QUERIES,  # [B, HQ, S, D], any float
    MEAN,  # float32 [H, D]
    START_COS,  # float32 [pages, HALF]
    START_SIN,
    STEP_COS,  # float16 [2, HALF, 64], high and low
    STEP_SIN,
    OUT,  # int16 [B*H, rows, 64*pages]
    UNIT,  # float32 [B*H, rows]
    rows,  # query heads per KV head * S
    pages,
    each,  # tiles of a program
    query_b,
    query_h,
    query_s,
    scale,
    scaling,  # of the rotary embedding's table
    H: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,  # D, HALF and rows, rounded up to powers of two
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,  # rows of the product: TILE / ROWS pages of all query rows
):
    """One program: all query rows of a KV head over a few tiles of pages."""
    head, first = tl.program_id(0), tl.program_id(1) * each
    m, c, r = tl.arange(0, TILE), tl.arange(0, BLOCK), tl.arange(0, 64)
    row = m % ROWS
    live, turns = row < rows, c < HALF
    h = head % H
    at = (head // H).to(tl.int64) * query_b + (h * (rows // S) + row // S) * query_h + (row % S) * query_s
    known = live[:, None] & turns[None, :]
    q1 = tl.load(QUERIES + at[:, None] + c[None, :], mask=known, other=0.0).to(tl.float32)
    q2 = tl.load(QUERIES + at[:, None] + HALF + c[None, :], mask=known, other=0.0).to(tl.float32)
    m1 = scale * tl.load(MEAN + h * D + c, mask=turns, other=0.0)[None, :]
    m2 = scale * tl.load(MEAN + h * D + HALF + c, mask=turns, other=0.0)[None, :]
    a, b = q1 * m1 + q2 * m2, q2 * m1 - q1 * m2
    amplitude = tl.sum(tl.sqrt(a * a + b * b), 1)
    rest = tl.zeros([TILE], tl.float32)
    if D > 2 * HALF:
        d = tl.arange(0, DIMS)
        still = (d >= 2 * HALF) & (d < D)
        q = tl.load(QUERIES + at[:, None] + d[None, :], mask=live[:, None] & still[None, :], other=0.0).to(tl.float32)
        rest = scale * tl.sum(q * tl.load(MEAN + h * D + d, mask=still, other=0.0)[None, :], 1)
    # the table of cosines is scaled once more, by the rotary embedding
    amplitude = tl.maximum(scaling * amplitude + tl.abs(rest), 1e-30)
    if first == 0:
        tl.store(UNIT + head * rows + row, amplitude / 32767, mask=live & (m < ROWS))
    a, b, rest = a / amplitude[:, None], b / amplitude[:, None], rest / amplitude
    table = c[:, None] * 64 + r[None, :]
    inside = turns[:, None] & (r >= 0)[None, :]
    cos_high = tl.load(STEP_COS + table, mask=inside, other=0.0)
    cos_low = tl.load(STEP_COS + HALF * 64 + table, mask=inside, other=0.0)
    sin_high = tl.load(STEP_SIN + table, mask=inside, other=0.0)
    sin_low = tl.load(STEP_SIN + HALF * 64 + table, mask=inside, other=0.0)
    for tile in tl.range(first, first + each, num_stages=1):
        page = tile * (TILE // ROWS) + m // ROWS
        seen = (page < pages)[:, None] & turns[None, :]
        start = page[:, None] * HALF + c[None, :]
        cos = tl.load(START_COS + start, mask=seen, other=0.0)
        sin = tl.load(START_SIN + start, mask=seen, other=0.0)
        u, v = a * cos + b * sin, b * cos - a * sin
        # a float16 and what it leaves, of both factors: 22 bits; only the product of the two remainders is left out
        u_high, v_high = u.to(tl.float16), v.to(tl.float16)
        u_low, v_low = (u - u_high.to(tl.float32)).to(tl.float16), (v - v_high.to(tl.float32)).to(tl.float16)
        logits = tl.dot(u_high, cos_high)
        logits = tl.dot(u_low, cos_high, logits)
        logits = tl.dot(u_high, cos_low, logits)
        logits = tl.dot(v_high, sin_high, logits)
        logits = tl.dot(v_low, sin_high, logits)
        logits = tl.dot(v_high, sin_low, logits)
        logits = tl.floor((logits + rest[:, None]) * 32767 + 0.5)
        logits = tl.minimum(tl.maximum(logits, -32767.0), 32767.0).to(tl.int16)
        to = OUT + ((head.to(tl.int64) * rows + row) * (pages * 64) + page * 64)[:, None] + r[None, :]
        tl.store(to, logits, mask=(live & (page < pages))[:, None] & (r >= 0)[None, :])
