"""Encoding, fused: centre, transform, normalise, quantise by table and pack one page per program, straight into place.

    y = (x - R(n) m) M          M: [D, C], per KV head; m: the calibrated mean of keys, turned to the position
    v = sqrt(D) y / ||y||       code: index of the level nearest to v, by binary search among boundaries
    scale                       one number per token: ``mse``, ``norm`` or ``unbiased``, as in methods/turboquant.py

Levels are symmetric, so a table row holds the positive half. Words are those of ``kvtool/packing.py``.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool import packing
from kvtool.shapes import Rope

SCALES = {"mse": 0, "norm": 1, "unbiased": 2}


class Encoder(NamedTuple):
    """How one side, keys or values, is encoded; see :func:`encoder`.

    matrix: float32 [H or 1, D, C].  table: float32 [groups, 16], 8 levels and 8 boundaries of the positive half.
    step: what one unit of a level is worth.
    """

    widths: tuple[int, ...]
    matrix: Tensor
    table: Tensor
    step: float
    scale: str


def encoder(widths: Sequence[int], matrix: Tensor, levels: Mapping[int, Tensor], step: float, scale: str) -> Encoder:
    """An encoder for groups of ``widths`` whose levels are ``step * levels[width]``; 1 bit is -1 and 1."""
    rows = torch.zeros(len(widths), 16)
    for row, width in zip(rows, widths, strict=True):
        if width in (1, 2, 3, 4):
            half = levels[width].float().cpu()[1 << (width - 1) :] if width > 1 else torch.ones(1)
            row[: len(half)] = half
            row[9 : 8 + len(half)] = step * (half[1:] + half[:-1]) / 2
    return Encoder(tuple(widths), matrix.float().contiguous(), rows.to(matrix.device), float(step), scale)


def encode(
    x: Tensor,
    how: Encoder,
    *,
    keys: bool,
    mean: Tensor | None = None,
    rope: Rope | None = None,
    positions: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Pages uint8 [B, H, N, bytes] and scales float16 [B, H, N, 64] of ``x`` [B, H, T, D], T a multiple of 64.

    mean: float32 [H, D], subtracted; with ``rope``, turned to ``positions`` [T] first.
    out: pages and scales to write into, for instance a slice of a cache with room to grow.
    """
    B, H, T, D = x.shape
    N, size = T // packing.PAGE, packing.page_bytes(how.widths)
    if out is None:
        pages = torch.empty(B, H, N, size, dtype=torch.uint8, device=x.device)
        out = pages, torch.empty(B, H, N, packing.PAGE, dtype=torch.float16, device=x.device)
    pages, scales = out
    words = pages.view(torch.int32)
    turned = mean is not None and rope is not None and positions is not None
    cos, sin = rope.table(positions) if turned else (how.table, how.table)
    half = len(rope.inv_freq) if turned else 1
    C = packing.GROUP * len(how.widths)
    _encode[(B * H, N)](
        x,
        how.matrix,
        how.table,
        mean if mean is not None else how.table,
        cos.contiguous(),
        sin.contiguous(),
        words,
        scales,
        *x.stride()[:3],
        how.matrix.stride(0) if how.matrix.shape[0] > 1 else 0,
        *words.stride()[:3],
        *scales.stride()[:3],
        how.step,
        D**0.5,
        H=H,
        D=D,
        C=C,
        DIMS=max(16, triton.next_power_of_2(D)),
        HALF=half,
        GROUPS=len(how.widths),
        WIDTHS=how.widths,
        OFFSETS=tuple(64 * sum(how.widths[:i]) for i in range(len(how.widths))),
        KEYS=keys,
        CENTRED=mean is not None,
        TURNED=turned,
        SCALE=SCALES[how.scale],
        num_warps=4,
    )
    return pages, scales


@triton.jit
def _encode(
    X, MATRIX, TABLE, MEAN, COS, SIN, WORDS, SCALES,
    x_b, x_h, x_t, matrix_h, words_b, words_h, words_p, scales_b, scales_h, scales_p, step, root,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, DIMS: tl.constexpr, HALF: tl.constexpr, GROUPS: tl.constexpr,
    WIDTHS: tl.constexpr, OFFSETS: tl.constexpr, KEYS: tl.constexpr, CENTRED: tl.constexpr, TURNED: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    page = tl.program_id(1).to(tl.int64)
    t, d, c = tl.arange(0, 64), tl.arange(0, DIMS), tl.arange(0, 32)
    token = page * 64 + t
    x = X + b * x_b + h * x_h + token[:, None] * x_t + d[None, :]
    x = tl.load(x, mask=(d < D)[None, :] & (t >= 0)[:, None], other=0.0).to(tl.float32)
    if CENTRED:
        x -= _mean(MEAN + h * D, COS, SIN, token, d, D, HALF, TURNED)
    turned = ()
    square = tl.zeros([64], tl.float32)
    for i in tl.static_range(GROUPS):
        at = MATRIX + h * matrix_h + d[:, None] * C + 32 * i + c[None, :]
        matrix = tl.load(at, mask=(d < D)[:, None] & (c >= 0)[None, :], other=0.0)
        y = tl.dot(x, matrix)
        square += tl.sum(y * y, 1)
        turned = turned + (y,)
    norm = tl.sqrt(square)
    inverse = root / tl.maximum(norm, 1e-30)
    WORDS += b * words_b + h * words_h + page * words_p
    decoded = tl.zeros([64], tl.float32)  # ||levels||^2, or v . levels
    for i in tl.static_range(GROUPS):
        if WIDTHS[i] > 0:
            v = turned[i] * inverse[:, None]
            code, level = _quantise(v, TABLE + 16 * i, step, WIDTHS[i])
            if 32 * (i + 1) > D:
                # padding has no level, and its code is 0
                inside = (32 * i + c < D)[None, :]
                code, level = tl.where(inside, code, 0), tl.where(inside, level, 0.0)
            decoded += tl.sum(level * (v if SCALE == 2 else level), 1)
            _store_words(WORDS + OFFSETS[i], code, WIDTHS[i], KEYS)
    if SCALE == 0:
        scale = norm * step / root
    elif SCALE == 1:
        scale = norm / tl.sqrt(tl.maximum(decoded, 1e-30))
    else:
        scale = norm * root / tl.maximum(decoded, 1e-30)
    at = scales_b * b + scales_h * h + scales_p * page + (t % 8 // 2) * 16 + (t // 8) * 2 + t % 2
    tl.store(SCALES + at, scale.to(tl.float16))


@triton.jit
def _mean(MEAN, COS, SIN, token, d, D: tl.constexpr, HALF: tl.constexpr, TURNED: tl.constexpr):
    """The mean at every token, [64, DIMS]."""
    mean = tl.load(MEAN + d, mask=d < D, other=0.0)[None, :]
    if TURNED:
        # channel c turns with c + HALF; channels beyond 2*HALF are left alone
        rotary = d < 2 * HALF
        other = tl.load(MEAN + tl.where(d < HALF, d + HALF, d - HALF), mask=rotary, other=0.0)[None, :]
        at = token[:, None] * HALF + (d % HALF)[None, :]
        inside = rotary[None, :] & (token >= 0)[:, None]
        cos, sin = tl.load(COS + at, mask=inside, other=1.0), tl.load(SIN + at, mask=inside, other=0.0)
        return mean * cos + tl.where(d < HALF, -1.0, 1.0)[None, :] * other * sin
    else:
        return mean + tl.zeros([64, 1], tl.float32)


@triton.jit
def _quantise(v, TABLE, step, WIDTH: tl.constexpr):
    """Codes int32 and levels float32 of ``v``."""
    if WIDTH == 8:
        code = tl.minimum(tl.maximum(tl.floor(v / step) + 128, 0.0), 255.0)
        return code.to(tl.int32), code - 127.5
    else:
        a = tl.abs(v)
        HALF: tl.constexpr = 1 << (WIDTH - 1)
        index = v.to(tl.int32) * 0
        level = tl.load(TABLE) + v * 0
        if WIDTH == 2:
            up = a > tl.load(TABLE + 9)
            index, level = up.to(tl.int32), tl.where(up, tl.load(TABLE + 1), level)
        elif WIDTH == 3:
            high = a > tl.load(TABLE + 10)
            index, level = _bisect(a, TABLE, high.to(tl.int32) * 0, high, 0, 2)
        elif WIDTH == 4:
            top = a > tl.load(TABLE + 12)
            high = a > tl.where(top, tl.load(TABLE + 14), tl.load(TABLE + 10))
            low_index, low_level = _bisect(a, TABLE, index, high, 0, 2)
            high_index, high_level = _bisect(a, TABLE, index, high, 4, 6)
            index, level = tl.where(top, high_index, low_index), tl.where(top, high_level, low_level)
        positive = v > 0
        return tl.where(positive, HALF + index, HALF - 1 - index), tl.where(positive, level, -level)


@triton.jit
def _bisect(a, TABLE, zero, high, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The last step of the search, in the pair of levels that begins at LOW or at HIGH."""
    up = a > tl.where(high, tl.load(TABLE + 9 + HIGH), tl.load(TABLE + 9 + LOW))
    index = zero + tl.where(high, HIGH, LOW) + up.to(tl.int32)
    first = tl.where(high, tl.load(TABLE + HIGH), tl.load(TABLE + LOW))
    second = tl.where(high, tl.load(TABLE + HIGH + 1), tl.load(TABLE + LOW + 1))
    return index, tl.where(up, second, first)


@triton.jit
def _store_words(WORDS, code, WIDTH: tl.constexpr, KEYS: tl.constexpr):
    """Codes [64 tokens, 32 channels] to the words of one unit."""
    if KEYS:
        code = code.reshape(8, 8, 2, 4, 4).permute(0, 1, 3, 2, 4)  # [slot, g, q, h, e]
    else:
        # [half, h, e, q, e, block, g] to [block, half, g, q, h, e, e]
        code = code.reshape(2, 2, 2, 4, 2, 4, 8).permute(5, 0, 6, 3, 1, 2, 4).reshape(8, 8, 4, 2, 4)
    s = tl.arange(0, 8)[:, None, None, None, None]
    e = tl.arange(0, 4)[None, None, None, None, :]
    if WIDTH == 8:
        PLANES: tl.constexpr = 8
        words = tl.sum(code << (8 * e), 4)
    elif WIDTH == 1:
        PLANES: tl.constexpr = 1
        words = tl.sum(tl.sum(code << (8 * e + s), 4), 0).reshape(1, 8, 4, 2)
    elif WIDTH == 2:
        PLANES: tl.constexpr = 2
        words = tl.sum(code << (16 * (s % 2) + 4 * e + 2 * (s // 2 % 2)), 4)
        words = tl.sum(words.reshape(2, 4, 8, 4, 2), 1)
    else:
        PLANES: tl.constexpr = 4
        words = tl.sum(tl.sum(code << (16 * (s % 2) + 4 * e), 4).reshape(4, 2, 8, 4, 2), 1)
    plane = tl.arange(0, PLANES)[:, None, None, None]
    lane = 4 * tl.arange(0, 8)[None, :, None, None] + tl.arange(0, 4)[None, None, :, None]
    h = tl.arange(0, 2)[None, None, None, :]
    if WIDTH == 3:
        # the codes of plane 3 lie bit by bit in the other planes' top bits
        top = tl.sum(tl.where(plane == 3, words, 0), 0)[None, :, :, :]
        words |= ((top >> plane) & 0x11111111) << 3
        tl.store(WORDS + (plane * 32 + lane) * 2 + h, words.to(tl.int32), mask=(plane < 3) & (lane >= 0) & (h >= 0))
    elif WIDTH == 1:
        tl.store(WORDS + (plane * 32 + lane) * 2 + h, words.to(tl.int32))
    else:
        tl.store(WORDS + ((plane // 2 * 32 + lane) * 2 + plane % 2) * 2 + h, words.to(tl.int32))
