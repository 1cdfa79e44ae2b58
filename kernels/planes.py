"""Units whose width is known only when they are read: words of any width first, then a branch on it.

Planes are asked for long before they are needed, whatever the widths, so that a page costs one latency.
The branch is the same for all threads of a program, whose pages have one level.
"""

import triton
import triton.language as tl

from kvtool.kernels.fragments import fragments

SIXTEEN = tl.constexpr(10)  # how a record says 16 bits: two units of 8, high codes and low ones; even, as 8 is


@triton.jit
def load_planes(pointers, used, width):
    """Planes 0 to 3 of the units at ``pointers`` [W, 1], int32 [W, 64] each; absent ones are zeros."""
    return (
        _plane(pointers, used, width, 0),
        _plane(pointers, used, width, 1),
        _plane(pointers, used, width, 2),
        _plane(pointers, used, width, 3),
    )


@triton.jit
def _plane(pointers, used, width, plane: tl.constexpr):
    word = tl.arange(0, 64)[None, :]
    odd = width & 1
    # two planes of an even width lie side by side, 16 bytes a lane
    at = pointers + (word // 2) * (2 * (2 - odd)) + word % 2
    at += odd * (64 * plane) + (1 - odd) * (128 * (plane // 2) + 2 * (plane % 2))
    return tl.load(at, mask=used & (word >= 0) & (width > plane), other=0)


@triton.jit
def fragments_of(planes, pointers, used, width, table, W: tl.constexpr, ASM: tl.constexpr):
    """Fragments int32 [W, 8, 8, 4, 2] of units of ``width`` bits; of 8 and more, the first 8."""
    p0, p1, p2, p3 = planes[0], planes[1], planes[2], planes[3]
    if width == 4:
        w = tl.join(tl.join(p0, p2), tl.join(p1, p3)).reshape(W, 8, 4, 2, 2, 2)  # [W, g, q, h, plane bit 1, bit 0]
        f = fragments(w.permute(0, 4, 1, 2, 5, 3).reshape(W, 256), table, 4, W, ASM)
    elif width == 2:
        w = tl.join(p0, p1).reshape(W, 8, 4, 2, 2)
        f = fragments(w.permute(0, 1, 2, 4, 3).reshape(W, 128), table, 2, W, ASM)
    elif width == 3:
        f = fragments((p0, p1, p2), table, 3, W, ASM)
    elif width == 1:
        f = fragments(p0, table, 1, W, ASM)
    elif width >= 8:
        f = _eight(p0, p1, p2, p3, pointers, used, table, W, ASM)
    else:
        f = tl.zeros([W, 8, 8, 4, 2], tl.int32)
    return f


@triton.jit
def fragments_of_eight(pointers, used, table, W: tl.constexpr, ASM: tl.constexpr):
    """Fragments of units of 8 bits at ``pointers`` [W, 1]."""
    p0, p1, p2, p3 = load_planes(pointers, used, 8)
    return _eight(p0, p1, p2, p3, pointers, used, table, W, ASM)


@triton.jit
def _eight(p0, p1, p2, p3, pointers, used, table, W: tl.constexpr, ASM: tl.constexpr):
    p4, p5, p6, p7 = load_planes(pointers + 256, used, 8)
    even = tl.join(tl.join(p0, p4), tl.join(p2, p6))
    w = tl.join(even, tl.join(tl.join(p1, p5), tl.join(p3, p7))).reshape(W, 8, 4, 2, 2, 2, 2)  # [W, g, q, h, plane]
    return fragments(w.permute(0, 4, 5, 1, 2, 6, 3).reshape(W, 512), table, 8, W, ASM)
