"""Encoding a chain of stages, fused: centre, transform, gains, quantise one after the other, pack straight into place.

A stage takes from the coefficients what it coded, which is linear, so stage s sees (symbols as in transform/code.py)

    y_s = A_s x - sum_{r < s} g_r B_sr c_r      A_s = R diag(1/sigma_s) P_s W      B_sr = R diag(sigma_r/sigma_s) R^T

with B_sr only where both pick a coefficient. Products run in fp16: what has more bits than its 11, matrices and the
vectors unless they are values of 16 bits, is the sum of two; levels c are whole numbers.

Two launches: the first codes all pages and says of which too many tokens are louder than their largest gain; the second
codes those again, in a plain rotation. Nothing goes back to the host in between.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool import packing
from kvtool.kernels.codes import STEEP, column_order, quantise_levels, row_token, search_table, store
from kvtool.kernels.encode import centred_rows, columns
from kvtool.kernels.launch import nvidia, processors
from kvtool.kernels.mean import starts, steps
from kvtool.shapes import Rope
from kvtool.transform import code as chain
from kvtool.transform.code import GAIN_CODES, GAIN_STEP, Code

LOUDEST = tl.constexpr(GAIN_CODES - 1.0)
OCTAVE = tl.constexpr(GAIN_STEP)
INFINITE = tl.constexpr(3e38)


class Stages(NamedTuple):
    """How one side is encoded; see :func:`stages`.

    matrix: float16 [H, S, 2, 32, D]: A_s / unit as a sum of two.  unit, base: float32 [H, S].
    correction: float16 [H, S, S, 2, 32, 32]: at [r, s], B_sr of integer levels, transposed, likewise.
    table: float32 [S, 18], see :func:`codes.search_table`.
    """

    widths: tuple[int, ...]
    steps: tuple[float, ...]
    keys: bool
    matrix: Tensor
    unit: Tensor
    base: Tensor
    correction: Tensor
    table: Tensor


def stages(code: Code, keys: bool) -> Stages:
    """The stages of ``code``."""
    turn = chain.stage_rotation(code.basis.device)
    order = column_order(1, keys).to(turn.device)
    books = [chain.table(width, turn.device) for width in code.widths]
    D = code.basis.shape[-1]
    picked = code.basis[:, None].expand(-1, len(code.widths), -1, -1)
    picked = picked.gather(2, code.order[..., None].expand(*code.order.shape, D)) / code.deviation[..., None]
    matrix = (turn @ picked)[:, :, order]
    unit = matrix.abs().amax((-2, -1))
    matrix = matrix / unit[..., None, None]
    same = code.order[:, :, None, :, None] == code.order[:, None, :, None, :]  # [H, s, r, 32, 32]
    ratio = code.deviation[:, None, :, None, :] / code.deviation[:, :, None, :, None]
    step = torch.tensor([step for _, step in books], device=turn.device)
    correction = step[:, None, None] * (turn @ (same * ratio) @ turn.mT)
    table = torch.zeros(len(books), 18)
    for row, width, (levels, step_of_one) in zip(table, code.widths, books, strict=True):
        row[:] = search_table(width, levels, step_of_one)
    return Stages(
        code.widths,
        tuple(step for _, step in books),
        keys,
        torch.stack(_halved(matrix), 2).contiguous(),
        unit.contiguous(),
        code.gain_base.contiguous(),
        torch.stack(_halved(correction[..., order, :][..., order].permute(0, 2, 1, 4, 3)), 3).contiguous(),
        table.to(turn.device),
    )


def _halved(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.half()
    return high, (x - high).half()


def encode_stages(
    x: Tensor,
    fitted: Stages,
    plain: Stages,
    share: float,
    *,
    mean: Tensor | None = None,
    rope: Rope | None = None,
    positions: Tensor | None = None,
    launch: dict[str, int] | None = None,
    resident: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pages uint8 [B, H, N, bytes], gains uint8 [B, H, N, 32 S] and flags uint8 [B, H, N] of ``x`` [B, H, T, D].

    Bit 0 of a flag: coded by ``plain``, because more than ``share`` of the tokens were clipped. Bit 1: not finite.
    mean: float32 [H, D], subtracted; with ``rope``, turned to ``positions`` [T] first.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    B, H, T, D = x.shape
    N, S = T // packing.PAGE, len(fitted.widths)
    pages = torch.empty(B, H, N, packing.page_bytes(fitted.widths), dtype=torch.uint8, device=x.device)
    gains = torch.empty(B, H, N, packing.GROUP * S, dtype=torch.uint8, device=x.device)
    flags = torch.zeros(B, H, N, dtype=torch.uint8, device=x.device)
    if not S:
        return pages, gains, flags
    words = pages.view(torch.int32)
    turned = mean is not None and rope is not None and positions is not None
    turns = (*starts(rope, positions), *steps(rope, x.device)) if turned else (fitted.table,) * 4
    asm = nvidia(x.device)
    for how, again in ((fitted, False), (plain, True)):
        # pages that are coded again are few: their programs do not keep the matrices
        held = asm and not again and D <= 128 and S <= 4
        run = triton.cdiv(B * H * N, (resident or 2) * processors(x.device))
        _encode_stages[(B * H, triton.cdiv(N, run))](
            x,
            how.matrix,
            how.correction,
            how.unit,
            how.base,
            how.table,
            how.table if mean is None else mean.float().contiguous(),
            *turns,
            flags,
            words,
            gains,
            *x.stride()[:3],
            *words.stride()[:3],
            *gains.stride()[:3],
            N,
            run,
            share * packing.PAGE,
            H=H,
            D=D,
            BLOCK=triton.next_power_of_2(D) if held else 64,
            HALF=len(rope.inv_freq) if turned else 1,
            STAGES=S,
            WIDTHS=how.widths,
            STEPS=how.steps,
            KEYS=how.keys,
            CENTRED=mean is not None,
            TURNED=turned,
            SPLIT=mean is not None or x.dtype == torch.float32,
            AGAIN=again,
            HELD=held,
            ASM=asm,
            **({"num_warps": 4, "num_stages": 1} | (launch or {})),
        )
    return pages, gains, flags


@triton.jit(do_not_specialize=["pages", "run"])
def _encode_stages(
    X, MATRIX, CORRECTION, UNITS, BASES, TABLE, MEAN, START_COS, START_SIN, STEP_COS, STEP_SIN, FLAGS, WORDS, GAINS,
    x_b, x_h, x_t, words_b, words_h, words_p, gains_b, gains_h, gains_p, pages, run, limit,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, STAGES: tl.constexpr,
    WIDTHS: tl.constexpr, STEPS: tl.constexpr, KEYS: tl.constexpr, CENTRED: tl.constexpr, TURNED: tl.constexpr,
    SPLIT: tl.constexpr, AGAIN: tl.constexpr, HELD: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    X += b * x_b + h * x_h
    MATRIX += h * (STAGES * 64 * D)
    CORRECTION += h * (STAGES * STAGES * 2048)
    UNITS += h * STAGES
    BASES += h * STAGES
    MEAN += h * D
    WORDS += b * words_b + h * words_h
    GAINS += b * gains_b + h * gains_h
    FLAGS += tl.program_id(0).to(tl.int64) * pages
    first = tl.program_id(1).to(tl.int64) * run
    matrices = ()
    if HELD:
        for s in tl.static_range(2 * STAGES):
            matrices = matrices + (_stage(MATRIX + 32 * s * D, tl.arange(0, BLOCK), D),)
    for i in range(tl.minimum(run, pages - first)):
        page = first + i
        wanted = (tl.load(FLAGS + page) & 1) == 1 if AGAIN else True
        if wanted:
            flag = _page(
                X + page * 64 * x_t, MATRIX, matrices, CORRECTION, UNITS, BASES, TABLE,
                MEAN, START_COS, START_SIN, STEP_COS, STEP_SIN, WORDS + page * words_p, GAINS + page * gains_p,
                x_t, page, limit, D, BLOCK, HALF, STAGES, WIDTHS, STEPS, KEYS, CENTRED, TURNED, SPLIT, HELD, ASM,
            )  # fmt: skip
            if not AGAIN:
                tl.store(FLAGS + page, flag.to(tl.uint8))


@triton.jit
def _stage(MATRIX, d, D: tl.constexpr):
    """Half of a sum of two: the operand [channels, 32] of one stage."""
    c = tl.arange(0, 32)
    return columns(MATRIX + c[:, None] * D, d, D, c >= 0).trans()


@triton.jit
def _page(
    X, MATRIX, matrices, CORRECTION, UNITS, BASES, TABLE, MEAN, START_COS, START_SIN, STEP_COS, STEP_SIN, WORDS, GAINS,
    x_t, page, limit,
    D: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, STAGES: tl.constexpr, WIDTHS: tl.constexpr,
    STEPS: tl.constexpr, KEYS: tl.constexpr, CENTRED: tl.constexpr, TURNED: tl.constexpr, SPLIT: tl.constexpr,
    HELD: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Code one page; returns its flag."""
    t, c = row_token(tl.arange(0, 64), KEYS), tl.arange(0, 32)
    X += t[:, None].to(tl.int64) * x_t
    if HELD:
        d = tl.arange(0, BLOCK)
        x = columns(X, d, D, t >= 0)
        x = centred_rows(x, MEAN, START_COS, START_SIN, STEP_COS, STEP_SIN, page, t, d, D, HALF, CENTRED, TURNED)
        high, low = _halves(x)
    clipped, broken = t < 0, t < 0
    coded = ()
    for s in tl.static_range(STAGES):
        y = tl.zeros([64, 32], tl.float32)
        if HELD:
            y = _product(y, high, low, matrices[2 * s], matrices[2 * s + 1], SPLIT)
        else:
            for start in range(0, D, BLOCK):
                d = start + tl.arange(0, BLOCK)
                x = columns(X, d, D, t >= 0)
                x = centred_rows(
                    x, MEAN, START_COS, START_SIN, STEP_COS, STEP_SIN, page, t, d, D, HALF, CENTRED, TURNED
                )
                high, low = _halves(x)
                first, second = _stage(MATRIX + 64 * s * D, d, D), _stage(MATRIX + (64 * s + 32) * D, d, D)
                y = _product(y, high, low, first, second, SPLIT)
        y *= tl.load(UNITS + s)
        for r in tl.static_range(s):
            at = CORRECTION + (r * STAGES + s) * 2048 + c[:, None] * 32 + c[None, :]
            taken = tl.dot(coded[2 * r], tl.load(at), tl.dot(coded[2 * r], tl.load(at + 1024)))
            y -= coded[2 * r + 1][:, None] * taken
        power = tl.sum(y * y, 1) / 32
        base = tl.load(BASES + s)
        octave = (0.5 * tl.log2(tl.maximum(power, 1e-30)) - base) / OCTAVE
        clipped |= octave > LOUDEST + 0.5
        broken |= (power < INFINITE) == 0
        loud = tl.minimum(tl.maximum(tl.floor(octave + 0.5), 0.0), LOUDEST)
        exponent = base + OCTAVE * loud
        v = y * (tl.exp2(-exponent) * (STEEP if WIDTHS[s] < 8 else 1.0))[:, None]
        code, level = quantise_levels(v, TABLE + 18 * s, STEPS[s], WIDTHS[s], ASM)
        coded = coded + (level.to(tl.float16), tl.exp2(exponent))
        _store_gains(GAINS + 32 * s, loud, KEYS)
        signed = code.reshape(64, 1, 4, 8).permute(0, 1, 3, 2)
        store(WORDS + _start(WIDTHS, s), signed, WIDTHS[s], KEYS, 32, 1, 1)
    over = tl.sum(clipped.to(tl.int32), 0).to(tl.float32) > limit
    return over.to(tl.int32) + 2 * tl.max(broken.to(tl.int32), 0)


@triton.jit
def _halves(x):
    """``x`` as a sum of two in fp16."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _product(y, high, low, first, second, SPLIT: tl.constexpr):
    """``y`` and the product of two sums of two, the least of the four left out."""
    y = tl.dot(high, first, tl.dot(high, second, y))
    if SPLIT:
        y = tl.dot(low, first, y)
    return y


@triton.jit
def _start(WIDTHS: tl.constexpr, s: tl.constexpr):
    """The first word of a stage's unit."""
    start = 0
    for r in tl.static_range(s):
        start += 64 * WIDTHS[r]
    return start


@triton.jit
def _store_gains(GAINS, loud, KEYS: tl.constexpr):
    """Gain codes of the product's rows as nibbles, in the order of ``packing.pack_nibbles``."""
    if KEYS:
        loud = loud.reshape(8, 4, 2)  # u, q, r
    else:
        loud = loud.reshape(4, 8, 2).permute(1, 0, 2)
    low, high = tl.split(loud)
    at = GAINS + 8 * tl.arange(0, 4)[None, :] + tl.arange(0, 8)[:, None]
    tl.store(at, (low + 16 * high).to(tl.uint8))
