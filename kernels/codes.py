"""Codes of coordinates, and their packed words: what encoders do behind their product, on its accumulators.

Tokens are the product's rows and channels its columns, so a sum over a token's channels stays within a warp. The order
of tokens and channels in it (:func:`row_token`, :func:`column_order`) leaves in one thread the codes of a key's word,
and of a value's as soon as four lanes have exchanged nibbles. Levels are symmetric, so a table holds the positive half.
Words are those of ``kvtool/packing.py``.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kvtool import packing

LIFT = tl.constexpr(float(1 << 23))  # a float whose last bit is worth 1: what is added to it becomes an integer
STEEP = tl.constexpr(float(1 << 40))  # v less a boundary, times this, is far above 1


def column_order(groups: int, keys: bool) -> Tensor:
    """The channel of every column of the product: keys have (e, q, h) for (h, q, e), so that a thread has all e."""
    inside = torch.arange(packing.GROUP)
    if keys:
        inside = 16 * (inside & 1) + 4 * (inside >> 1 & 3) + (inside >> 3)
    return (packing.GROUP * torch.arange(groups)[:, None] + inside).flatten()


def search_table(width: int, levels: Tensor, step: float) -> Tensor:
    """float32 [18] for the positive half of ``step * levels``; 1 bit is -1 and 1, 8 bits are code - 127.5.

    From place 0 the boundaries as :func:`quantise` searches them, from 8 the coefficients of level i as a polynomial of
    i, and in the last two eight levels as bytes.
    """
    half = torch.tensor([{1: 1.0, 8: 0.5}.get(width, 0.0)], dtype=torch.float64)
    table = torch.zeros(18, dtype=torch.float64)
    if 1 < width < 8:
        half = levels.double().cpu()[1 << (width - 1) :]
        cuts = STEEP.value * step * (half[1:] + half[:-1]) / 2
        if width == 2:
            table[0] = cuts[0]
        elif width == 3:
            table[:3] = torch.stack([cuts[1], cuts[0], cuts[2] - cuts[0]])
        else:
            b1, b2, b3, b4, b5, b6, b7 = cuts
            table[:7] = torch.stack([b4, b2, b6 - b2, b1, b5 - b1, b3 - b1, b7 - b5 - b3 + b1])
    powers = torch.arange(len(half), dtype=torch.float64)[:, None] ** torch.arange(len(half))
    table[8 : 8 + len(half)] = torch.linalg.solve(powers, half)
    table = table.float()
    table[16:] = F.pad(half, (0, 8 - len(half))).byte().view(torch.float32)
    return table


@triton.jit
def quantise(v, TABLE, step, WIDTH: tl.constexpr, SCALE: tl.constexpr, ASM: tl.constexpr):
    """Codes of ``v``, as floats, and what each adds to v . levels (of 8 bits with SCALE 1: to ||levels||^2).

    Below 8 bits v comes times STEEP, and a code is the index among the levels of its sign plus half of all if positive.
    """
    if WIDTH == 8:
        code = tl.minimum(tl.maximum(tl.ceil(v / step) + 127, 0.0), 255.0)
        level = code - 127.5
        return code, level * (v if SCALE == 2 else level)
    else:
        index, sign = _search(v, TABLE, WIDTH, ASM)
        worth = v
        if SCALE == 2:
            worth = _level(index, TABLE, WIDTH) * tl.abs(v) * (1 / STEEP)
        return index + (1 << (WIDTH - 1)) * sign, worth


@triton.jit
def quantise_levels(v, TABLE, step, WIDTH: tl.constexpr, ASM: tl.constexpr):
    """Codes of ``v`` as :func:`quantise` has them, and their levels."""
    if WIDTH == 8:
        code = tl.minimum(tl.maximum(tl.ceil(v / step) + 127, 0.0), 255.0)
        return code, code - 127.5
    else:
        index, sign = _search(v, TABLE, WIDTH, ASM)
        return index + (1 << (WIDTH - 1)) * sign, _level(index, TABLE, WIDTH) * (2 * sign - 1)


@triton.jit
def _search(v, TABLE, WIDTH: tl.constexpr, ASM: tl.constexpr):
    """Index of the level of |v| / STEEP in the positive half, and 1 where v is positive."""
    # by bisection: b1, b2 and b3 are 0 or 1, and every boundary is linear in those before it
    if WIDTH == 1:
        index = v * 0
    elif WIDTH == 2:
        index = _beyond(v, tl.load(TABLE), ASM)
    else:
        b1 = _beyond(v, tl.load(TABLE), ASM)
        b2 = _beyond(v, tl.load(TABLE + 1) + b1 * tl.load(TABLE + 2), ASM)
        index = 2 * b1 + b2
        if WIDTH == 4:
            start = tl.load(TABLE + 3) + b1 * tl.load(TABLE + 4)
            rise = tl.load(TABLE + 5) + b1 * tl.load(TABLE + 6)
            index = 2 * index + _beyond(v, start + b2 * rise, ASM)
    return index if WIDTH > 1 else 0.0, _above(v, 0.0, ASM)


@triton.jit
def _level(index, TABLE, WIDTH: tl.constexpr):
    """The level that an index stands for, in the positive half."""
    HALF: tl.constexpr = 1 << (WIDTH - 1)
    level = tl.load(TABLE + 7 + HALF)
    for i in tl.static_range(1, HALF):
        level = tl.load(TABLE + 7 + HALF - i) + index * level
    return level


@triton.jit
def _above(v, boundary, ASM: tl.constexpr):
    """1 where ``v`` is above ``boundary``, else 0; both are so large that nothing lies between."""
    if ASM:
        return tl.inline_asm_elementwise(
            "sub.rn.sat.f32 $0, $1, $2;", "=f,f,f", [v, boundary], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return (v > boundary).to(tl.float32)


@triton.jit
def _beyond(v, boundary, ASM: tl.constexpr):
    """The same of the size of ``v``."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 a; abs.f32 a, $1; sub.rn.sat.f32 $0, a, $2; }",
            "=f,f,f", [v, boundary], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return (tl.abs(v) > boundary).to(tl.float32)


@triton.jit
def inverse_root(x, ASM: tl.constexpr):
    """1 / sqrt(x)."""
    if ASM:
        return tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1 / tl.sqrt(x)


@triton.jit
def level_bytes(TABLE):
    """The eight levels of the positive half as bytes."""
    return tl.load(TABLE + 16).to(tl.int32, bitcast=True), tl.load(TABLE + 17).to(tl.int32, bitcast=True)


@triton.jit
def sum_of_squares(bytes4, ASM: tl.constexpr):
    """The sum of the squares of the four bytes of a word."""
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, $1, 0;", "=r,r", [bytes4], dtype=tl.int32, is_pure=True, pack=1
        ).to(tl.float32)
    else:
        total = bytes4 * 0
        for i in tl.static_range(4):
            byte = (bytes4 >> (8 * i)) & 255
            total += byte * byte
        return total.to(tl.float32)


@triton.jit
def row_token(row, KEYS: tl.constexpr):
    """The token of a page in each of the product's 64 rows."""
    if KEYS:
        return row
    else:
        # rows are (q, slot & 1, h, e), tokens (slot & 1, h, e >> 1, q, e & 1)
        return row // 8 % 2 * 32 + row // 4 % 2 * 16 + row // 2 % 2 * 8 + row // 16 * 2 + row % 2


@triton.jit
def pack(codes, places):
    """Codes, floats along the last axis, from the bits ``places`` on, below 23; the bits from 23 on are not of use."""
    axis: tl.constexpr = len(codes.shape) - 1
    weights = (1 << places).to(tl.float32)
    for _ in tl.static_range(axis):
        weights = weights[None]
    # a float of LIFT and a sum below it has the sum as its last bits
    return (tl.sum(codes * weights, axis) + LIFT).to(tl.int32, bitcast=True)


@triton.jit
def store(
    WORDS, signed, WIDTH: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """Codes [64 rows, groups, 8 columns, 4] of :func:`quantise` to the words of GROUPS units."""
    words = _bytes(signed, KEYS, ROWS) if WIDTH == 8 else _nibbles(signed, KEYS, ROWS)
    # [group, g, q, h, plane], a nibble a code unless it is a byte
    PLANES: tl.constexpr = 8 if WIDTH == 8 else 4
    if WIDTH == 2 or WIDTH == 3 or WIDTH == 4:
        # below zero the levels count downwards
        negative = ~words & (-0x77777778 if WIDTH == 4 else 0x11111111 << (WIDTH - 1))
        words ^= negative - ((negative >> (WIDTH - 1)) & 0x11111111)
    group = tl.arange(0, ROWS)[:, None, None, None, None]
    g, q = tl.arange(0, 8)[None, :, None, None, None], tl.arange(0, 4)[None, None, :, None, None]
    h = tl.arange(0, 2)[None, None, None, :, None]
    plane = tl.arange(0, PLANES)[None, None, None, None, :]
    if 32 * ROWS > D:
        # channels from D on are padding, whose code is 0
        if KEYS:
            inside = 32 * group + 16 * h + 4 * q < D
        else:
            inside = 32 * group + 8 * (plane * 4 // PLANES) + g < D
        words = tl.where(inside & (plane >= 0), words, 0)
    if WIDTH == 1:
        # nibble 4 i + e of plane p to bit 8 e + 2 p + i
        low, high = _spread(words & 0xFFFF), _spread((words >> 16) & 0xFFFF)
        words = tl.sum((low | (high << 1)) << (2 * plane), 4)[:, :, :, :, None]
    elif WIDTH == 2:
        first, second = tl.split(words.reshape(ROWS, 8, 4, 2, 2, 2))
        words = first | (second << 2)
    elif WIDTH == 3:
        # the codes of plane 3 lie bit by bit in the other planes' top bits
        top = tl.sum(tl.where(plane == 3, words, 0), 4)[:, :, :, :, None]
        words |= ((top >> plane) & 0x11111111) << 3
    KEPT: tl.constexpr = WIDTH if WIDTH < 3 else PLANES
    PAIR: tl.constexpr = 2 - WIDTH % 2
    plane = tl.arange(0, KEPT)[None, None, None, None, :]
    at = ((plane // PAIR * 32 + 4 * g + q) * PAIR + plane % PAIR) * 2 + h
    stored = (group < GROUPS) & (g >= 0) & (q >= 0) & (h >= 0) & (plane < WIDTH)
    tl.store(WORDS + 64 * WIDTH * group + at, words, mask=stored)


@triton.jit
def _nibbles(signed, KEYS: tl.constexpr, ROWS: tl.constexpr):
    """Words [group, g, q, h, plane], nibble 4 i + e the code of slot 2 plane + i."""
    halves = pack(signed, 4 * tl.arange(0, 4)).reshape(4, 2, 8, ROWS, 8)
    words = _join16(halves.permute(0, 2, 3, 4, 1))
    if KEYS:
        return words.reshape(4, 8, ROWS, 4, 2).permute(2, 1, 3, 4, 0)  # from plane, g, group, q, h
    else:
        words = words.reshape(4, 2, 2, 2, ROWS, 8).permute(4, 5, 0, 1, 2, 3)  # q, h, e, e, group, g
        return _transposed(words, 4).reshape(ROWS, 8, 4, 2, 4)


@triton.jit
def _bytes(signed, KEYS: tl.constexpr, ROWS: tl.constexpr):
    """Words [group, g, q, h, slot], byte e the code."""
    words = _join16(pack(signed.reshape(64, ROWS, 8, 2, 2), 8 * tl.arange(0, 2)))
    if KEYS:
        return words.reshape(8, 8, ROWS, 4, 2).permute(2, 1, 3, 4, 0)  # from slot, g, group, q, h
    else:
        words = words.reshape(4, 2, 2, 2, 2, ROWS, 8).permute(5, 6, 0, 2, 1, 3, 4)  # q, slot, h, e, e, group, g
        words = _transposed(words, 8)  # group, g, q, h, slot & 1, slot >> 1
        return words.permute(0, 1, 2, 3, 5, 4).reshape(ROWS, 8, 4, 2, 8)


@triton.jit
def _join16(halves):
    """The last 16 bits of two words along the last axis as one."""
    low, high = tl.split(halves)
    return (low & 0xFFFF) | (high << 16)


@triton.jit
def _spread(x):
    """Bits 4 e of 16 to bits 8 e."""
    x = (x | (x << 8)) & 0x00FF00FF
    return (x | (x << 4)) & 0x0F0F0F0F


@triton.jit
def _transposed(words, BITS: tl.constexpr):
    """Four words of four fields (8 of 4 bits) along the last two axes as four of which each has one field of all."""
    even, odd = tl.split(words)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    SINGLE: tl.constexpr = 0x0F0F0F0F if BITS == 4 else 0x00FF00FF
    DOUBLE: tl.constexpr = 0x00FF00FF if BITS == 4 else 0x0000FFFF
    a0, a1 = _exchanged(x0, x1, BITS, SINGLE)
    a2, a3 = _exchanged(x2, x3, BITS, SINGLE)
    y0, y2 = _exchanged(a0, a2, 2 * BITS, DOUBLE)
    y1, y3 = _exchanged(a1, a3, 2 * BITS, DOUBLE)
    joined = tl.join(tl.join(y0, y2), tl.join(y1, y3))
    return joined.reshape(joined.shape[:-2] + (4,))


@triton.jit
def _exchanged(a, b, BITS: tl.constexpr, MASK: tl.constexpr):
    """The even fields of both, and the odd ones."""
    return (a & MASK) | ((b & MASK) << BITS), ((a >> BITS) & MASK) | (b & (-1 - MASK))
