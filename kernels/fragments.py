"""From packed words to tensor-core operands, for plain Triton: the other side of ``kvtool/packing.py``.

A *fragment* is a 32-bit word of 4 signed bytes, the levels of 4 codes. A unit of any width becomes fragments
[W, 8 slots, 8 g, 4 q, 2 h] (W warps of one page each; g, q, h as in packing.py), and fragments become the B operand
of one ``tl.dot`` by renaming axes: every byte already is in the lane and register that ``mma.m16n8k32`` wants.

Levels are bytes minus a constant, ``OFFSET[width]``:

    1 bit     64 times the bit, offset 32
    2, 3 bits table of 4 or 8 signed bytes, offset 0
    4 bits    table of 16 bytes 0..127, offset 63.5: a selector nibble above 7 makes ``prmt`` replicate the sign of
              the chosen byte, which is 0, so two half tables are joined by OR
    8 bits    code - 128, offset -1/2: level code - 127.5

The grids are alike in size, so that groups of different widths can share one 16-bit query. Where all groups have one
bit, it need not even be moved: in raw form the byte of slot s is 2^s times the bit (keys) or 4^(s >> 1) times (values),
and whoever multiplies by a scale anyhow divides it out. As signs a bit is -64 or 64, without an offset.
"""

import triton
import triton.language as tl

OFFSET = {0: 0.0, 1: 32.0, 2: 0.0, 3: 0.0, 4: 63.5, 8: -0.5}
RAW_KEYS, RAW_VALUES, SIGNS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
TABLE_WORDS = 8  # words 0-3: 16 levels of 4 bits; 4-5: 8 levels of 3 bits; 6: 4 levels of 2 bits


@triton.jit
def prmt(a, b, selector, ASM: tl.constexpr):
    """Four of the eight bytes (b, a), by the low four nibbles of ``selector``; a nibble's top bit asks for the sign."""
    if ASM:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        low = (selector * 0 + a).to(tl.int64) & 0xFFFFFFFF
        bytes8 = low | ((selector * 0 + b).to(tl.int64) << 32)
        out = selector.to(tl.int64) * 0
        for i in tl.static_range(4):
            nibble = (selector >> (4 * i)).to(tl.int64) & 15
            byte = (bytes8 >> (8 * (nibble & 7))) & 255
            sign = ((byte >> 7) & 1) * 255
            out |= tl.where(nibble > 7, sign, byte) << (8 * i)
        return out.to(tl.int32)


@triton.jit
def fragments(words, table, WIDTH: tl.constexpr, W: tl.constexpr, ASM: tl.constexpr, RAW: tl.constexpr = 0):
    """``words``: the unit's planes, int32 [W, 64*WIDTH] (for 3 bits a tuple of three [W, 64])."""
    if WIDTH == 1:
        w = words.reshape(W, 8, 4, 2)
        s0 = tl.join(
            tl.join(_bit(w, 0, RAW), _bit(w, 4, RAW)),
            tl.join(_bit(w, 2, RAW), _bit(w, 6, RAW)),
        )
        if RAW == RAW_VALUES:
            w = w >> 1
            s1 = tl.join(
                tl.join(_bit(w, 0, RAW), _bit(w, 4, RAW)),
                tl.join(_bit(w, 2, RAW), _bit(w, 6, RAW)),
            )
        else:
            s1 = tl.join(
                tl.join(_bit(w, 1, RAW), _bit(w, 5, RAW)),
                tl.join(_bit(w, 3, RAW), _bit(w, 7, RAW)),
            )
        f = tl.join(s0, s1)  # [W, g, q, h, slot bit 2, bit 1, bit 0]
        return f.permute(0, 4, 5, 6, 1, 2, 3).reshape(W, 8, 8, 4, 2)
    elif WIDTH == 2:
        w = words.reshape(W, 8, 4, 2, 2)  # [W, g, q, plane, h]
        even, odd = w & 0x33333333, (w >> 2) & 0x33333333
        t = table[6]
        j0 = tl.join(prmt(t, t, even, ASM), prmt(t, t, even >> 16, ASM))
        j1 = tl.join(prmt(t, t, odd, ASM), prmt(t, t, odd >> 16, ASM))
        f = tl.join(j0, j1)  # [W, g, q, plane, h, i, j]
        return f.permute(0, 3, 6, 5, 1, 2, 4).reshape(W, 8, 8, 4, 2)
    elif WIDTH == 3:
        top = ((words[0] >> 3) & 0x11111111) | ((words[1] >> 2) & 0x22222222) | ((words[2] >> 1) & 0x44444444)
        w = tl.join(tl.join(words[0] & 0x77777777, words[2] & 0x77777777), tl.join(words[1] & 0x77777777, top))
        w = w.reshape(W, 8, 4, 2, 2, 2)  # [W, g, q, h, plane bit 1, bit 0]
        f = tl.join(prmt(table[4], table[5], w, ASM), prmt(table[4], table[5], w >> 16, ASM))
        return f.permute(0, 4, 5, 6, 1, 2, 3).reshape(W, 8, 8, 4, 2)
    elif WIDTH == 4:
        w = words.reshape(W, 2, 8, 4, 2, 2)  # [W, plane pair, g, q, plane, h]
        x = w ^ -0x77777778  # 0x88888888
        low = prmt(table[0], table[1], w, ASM) | prmt(table[2], table[3], x, ASM)
        high = prmt(table[0], table[1], w >> 16, ASM) | prmt(table[2], table[3], x >> 16, ASM)
        f = tl.join(low, high)
        return f.permute(0, 1, 4, 6, 2, 3, 5).reshape(W, 8, 8, 4, 2)
    else:
        tl.static_assert(WIDTH == 8)
        w = words.reshape(W, 4, 8, 4, 2, 2) ^ -0x7F7F7F80  # 0x80808080
        return w.permute(0, 1, 4, 2, 3, 5).reshape(W, 8, 8, 4, 2)


@triton.jit
def _bit(w, s: tl.constexpr, RAW: tl.constexpr):
    if RAW == SIGNS:
        x = w << (7 - s) if s < 7 else w
        return (x & -0x7F7F7F80) ^ -0x3F3F3F40  # 0x80808080, 0xC0C0C0C0
    elif RAW:
        BIT: tl.constexpr = (1 << s) * 0x01010101
        return w & (BIT if s < 7 else BIT - (1 << 32))
    elif s < 6:
        return (w << (6 - s)) & 0x40404040
    else:
        return (w >> (s - 6)) & 0x40404040


@triton.jit
def fragment_bytes(f):
    """int32 [...] to its four bytes, int8 [..., 4]; no instruction is left of it."""
    even = tl.join(f.to(tl.int8), (f >> 16).to(tl.int8))
    odd = tl.join((f >> 8).to(tl.int8), (f >> 24).to(tl.int8))
    return tl.join(even, odd)  # [..., byte bit 1, byte bit 0]


@triton.jit
def key_operand(f, W: tl.constexpr):
    """Fragments to int8 [W, 32 channels in the order (q, h, e), 64 tokens]."""
    b = fragment_bytes(f)  # [W, slot, g, q, h, e, e]
    return b.permute(0, 3, 4, 5, 6, 1, 2).reshape(W, 32, 64)


@triton.jit
def value_operand(f, W: tl.constexpr):
    """Fragments to int8 [W, 64 tokens, 32 channels]; the tokens of a page in the order (half, q, h, e)."""
    b = fragment_bytes(f).reshape(W, 4, 2, 8, 4, 2, 2, 2)  # [W, block, half, g, q, h, e, e]
    return b.permute(0, 2, 4, 5, 6, 7, 1, 3).reshape(W, 64, 32)


@triton.jit
def load_unit(pointers, mask, WIDTH: tl.constexpr):
    """The words of a unit at ``pointers`` [W, 1], as :func:`fragments` takes them."""
    # the last axis is what one warp loads at once, so that no warp loads for another
    N: tl.constexpr = 64 if WIDTH % 2 else 128
    at = pointers[:, :, None] + tl.arange(0, N)[None, None, :]
    used = mask[:, :, None] & (tl.arange(0, N) >= 0)[None, None, :]
    if WIDTH == 3:
        return (
            tl.load(at, mask=used, other=0),
            tl.load(at + 64, mask=used, other=0),
            tl.load(at + 128, mask=used, other=0),
        )
    else:
        chunk = tl.arange(0, 64 * WIDTH // N)[None, :, None]
        return tl.load(at + N * chunk, mask=used & (chunk >= 0), other=0)


@triton.jit
def load_table(pointer, ASM: tl.constexpr):
    """The words of one side's tables, stored four times over."""
    if ASM:
        # an address that differs by lane keeps the words in vector registers; uniform ones cost a move per use
        pointer += tl.inline_asm_elementwise(
            "{ .reg .b32 t; mov.b32 t, %laneid; and.b32 $0, t, 3; }", "=r,r", [0], dtype=tl.int32, is_pure=True, pack=1
        )
    return (
        tl.load(pointer),
        tl.load(pointer + 4),
        tl.load(pointer + 8),
        tl.load(pointer + 12),
        tl.load(pointer + 16),
        tl.load(pointer + 20),
        tl.load(pointer + 24),
    )
