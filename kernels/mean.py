"""The logits of a removed key mean: q . R(n) m for every position n, without reading any key.

In the pairs of the rotary embedding (channels c and c + R/2) this is a trigonometric polynomial,

    q . R(n) m = sum_c  a_c cos(n t_c) + b_c sin(n t_c)      a = q1 m1 + q2 m2,  b = q2 m1 - q1 m2

whose amplitude sum_c |(a_c, b_c)| bounds it, so 16 bits of it are enough: 1/65534 of the amplitude is at most 1e-3 nats
up to 65 nats (SmolLM2-135M's largest is 55). A page that begins at n = 64p needs a and b turned once by the angle
64 p t, and then one product with the table of cos(r t), sin(r t), r < 64, which all pages share.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kvtool import packing
from kvtool.shapes import Rope


def mean_bias(
    queries: Tensor, mean: Tensor, rope: Rope | None, positions: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """:func:`mean_logits`; without ``rope`` the mean is the same at every position, and the bias float32, unscaled."""
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
    B, HQ, S, _ = queries.shape
    H, T = mean.shape[0], len(positions)
    half = len(rope.inv_freq)
    q = (scale * queries.float()).reshape(B, H, -1, queries.shape[-1])
    m = mean[:, None].float()
    q1, q2, rest = q[..., :half], q[..., half : 2 * half], (q * m)[..., 2 * half :].sum(-1)
    m1, m2 = m[..., :half], m[..., half : 2 * half]
    a, b = q1 * m1 + q2 * m2, q2 * m1 - q1 * m2  # [B, H, rows, half]
    rows = a.shape[2]
    # the table of cosines is scaled once more, by the rotary embedding
    unit = (rope.scaling * (a.square() + b.square()).sqrt().sum(-1) + rest.abs()).clamp_min(1e-30) / 32767
    start_cos, start_sin = _starts(rope, positions)
    step_cos, step_sin = _steps(rope, queries.device)
    out = torch.empty(B, H, rows, T, dtype=torch.int16, device=queries.device)
    _polynomial[(B * H, triton.cdiv(rows, 16), T // packing.PAGE)](
        a.contiguous(),
        b.contiguous(),
        rest.contiguous(),
        1 / unit,
        start_cos,
        start_sin,
        step_cos,
        step_sin,
        out,
        rows,
        T,
        HALF=half,
        BLOCK=triton.next_power_of_2(half),
    )
    return out.reshape(B, HQ, S, T), unit.reshape(B, HQ, S)


_tables = WeakIdKeyDictionary()


def _starts(rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
    # a captured step has the same positions for good, and all its layers share them
    known = _tables.setdefault(positions, {})
    if rope not in known:
        cos, sin = rope.table(positions[:: packing.PAGE])
        known[rope] = cos.contiguous(), sin.contiguous()
    return known[rope]


@lru_cache(maxsize=16)
def _steps(rope: Rope, device: torch.device) -> tuple[Tensor, Tensor]:
    cos, sin = Rope(inv_freq=rope.inv_freq).table(torch.arange(packing.PAGE))
    return cos.to(device).contiguous(), sin.to(device).contiguous()


@triton.jit
def _polynomial(
    A,  # float32 [B*H, rows, HALF]
    B,
    REST,  # float32 [B*H, rows]
    INVERSE,  # float32 [B*H, rows], of the units
    START_COS,  # float32 [pages, HALF]
    START_SIN,
    STEP_COS,  # float32 [64, HALF]
    STEP_SIN,
    OUT,  # int16 [B*H, rows, T]
    rows,
    T,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head, page = tl.program_id(0).to(tl.int64), tl.program_id(2)
    row = tl.program_id(1) * 16 + tl.arange(0, 16)
    c = tl.arange(0, BLOCK)
    r = tl.arange(0, 64)
    at = (head * rows + row)[:, None] * HALF + c[None, :]
    live = (row < rows)[:, None] & (c < HALF)[None, :]
    a, b = tl.load(A + at, mask=live, other=0.0), tl.load(B + at, mask=live, other=0.0)
    cos = tl.load(START_COS + page * HALF + c, mask=c < HALF, other=0.0)[None, :]
    sin = tl.load(START_SIN + page * HALF + c, mask=c < HALF, other=0.0)[None, :]
    table = r[None, :] * HALF + c[:, None]
    inside = (c < HALF)[:, None] & (r >= 0)[None, :]
    step_cos = tl.load(STEP_COS + table, mask=inside, other=0.0)
    step_sin = tl.load(STEP_SIN + table, mask=inside, other=0.0)
    # tf32 alone would cost 1e-3 of a logit
    logits = tl.dot(a * cos + b * sin, step_cos, input_precision="ieee")
    logits += tl.dot(b * cos - a * sin, step_sin, input_precision="ieee")
    logits += tl.load(REST + head * rows + row, mask=row < rows, other=0.0)[:, None]
    logits *= tl.load(INVERSE + head * rows + row, mask=row < rows, other=0.0)[:, None]
    logits = tl.minimum(tl.maximum(tl.floor(logits + 0.5), -32767.0), 32767.0).to(tl.int16)
    to = OUT + (head * rows + row)[:, None] * T + page * 64 + r[None, :]
    tl.store(to, logits, mask=(row < rows)[:, None] & (r >= 0)[None, :])
