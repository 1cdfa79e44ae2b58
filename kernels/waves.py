"""The logits of a rotated mean at any positions, as the decode evaluates them beside the scores.

    q . R(n) m = sum_c  a_c cos(n t_c) + b_c sin(n t_c)

Tokens that were kept are not consecutive, so every cosine is taken anew, once for all query rows of a program: phases
are integers in units of 2^-32 turns, which wrap by themselves, counted from those of a page's first token.
``query_levels.py`` prepares a and b.
"""

import triton
import triton.language as tl

from kvtool.kernels.decode import _halves
from kvtool.kernels.query_levels import CHUNK, FINER


@triton.jit
def mean_logits(
    WAVE_WORDS, WAVE_UNIT, POSITIONS, TURNS, page, used, program, h, zero,
    COUNT: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Of the tokens of each warp's ``page`` [W, 1], float32 [W, ROWS, 64], times log2 e.

    zero: 0, but the compiler must not know: what is the same for all pages would fill the registers.
    """
    rows = tl.arange(0, ROWS)
    first = tl.load(POSITIONS + page.to(tl.int64) * 64, mask=used, other=0)[:, :, None]
    n = _positions(POSITIONS, page, used, W) - first
    x = tl.zeros([W, 2 * ROWS, 64], tl.float32)
    for k in tl.static_range(COUNT // CHUNK):
        pair = TURNS + 2 * h * COUNT + zero + k * CHUNK + tl.arange(0, CHUNK)
        turns, less = tl.load(pair)[None, :, None], tl.load(pair + COUNT)[None, :, None]
        # 32 bits of a turn are off by n * 2^-33 turns; 31 more bits of the frequency mend that for a page's first token
        phase = first * turns + tl.umulhi(first + first, less) + n * (turns + (less >> 30))
        cos, sin = _circle(phase.to(tl.float32) * 1.4629180792671596e-9, ASM)  # 2 pi / 2^32
        at = WAVE_WORDS + (program * (COUNT // CHUNK) + k) * (32 * ROWS) + zero
        x = tl.dot(_operand(at, W, ROWS), cos.to(tl.float16), x)
        x = tl.dot(_operand(at + 16 * ROWS, W, ROWS), sin.to(tl.float16), x)
    high, low = _halves(x, W, ROWS, 64)
    unit, rest = tl.load(WAVE_UNIT + program * 2 * ROWS + rows), tl.load(WAVE_UNIT + (program * 2 + 1) * ROWS + rows)
    return (high + low * (1 / FINER)) * unit[None, :, None] + rest[None, :, None]


@triton.jit
def _positions(pointer, page, used, W: tl.constexpr):
    """Positions int32 [W, CHUNK, 64], the same for all pairs; every lane loads those of its cosines."""
    word = tl.arange(0, 128)[None, :]  # g, q, 4 of the 8 slots
    at = pointer + page.to(tl.int64) * 64 + (word // 16 * 4 + word % 4)
    early = tl.load(at, mask=used & (word >= 0), other=0)
    late = tl.load(at + 32, mask=used & (word >= 0), other=0)
    n = tl.join(early, late).reshape(W, 8, 4, 4, 2).permute(0, 2, 4, 3, 1)
    n = n[:, :, None, :, :, :].broadcast_to(W, 4, CHUNK // 4, 2, 4, 8)
    return n.reshape(W, CHUNK, 64)


@triton.jit
def _operand(pointer, W: tl.constexpr, ROWS: tl.constexpr):
    """float16 [W, 2*ROWS, 16]: as words, each lane loads what it will hold."""
    at = pointer + tl.arange(0, 16 * ROWS)[None, :] + 0 * tl.arange(0, W)[:, None]
    words = tl.load(at).reshape(W, ROWS // 8, 8, 4, 2, 2)  # [W, tile, g, q, h, value/rest]
    both = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16)).to(tl.float16, bitcast=True)
    return both.permute(0, 1, 5, 2, 3, 4, 6).reshape(W, 2 * ROWS, 16)


@triton.jit
def _circle(angle, ASM: tl.constexpr):
    """Cosine and sine within half a turn."""
    if ASM:
        # the hardware's, 2^-20 off here
        cos = tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, is_pure=True, pack=1)
        sin = tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, is_pure=True, pack=1)
        return cos, sin
    else:
        # those of a quarter of the angle, doubled twice: what compilers take serves any angle, and spills
        x = angle * 0.25
        y = x * x
        cos = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y / 40320)))
        sin = x * (1 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y / 362880))))
        for _ in tl.static_range(2):
            cos, sin = cos * cos - sin * sin, 2 * sin * cos
        return cos, sin
