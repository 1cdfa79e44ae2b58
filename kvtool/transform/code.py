"""A vector as a chain of 32-channel stages, each quantised at one width: the code behind the method ``transform``.

A basis W (64 x 64, say) turns a vector into coefficients z = W x of known variance. Stage s picks the 32 coefficients
whose variance is largest *after what the stages before it have taken away*, normalises and rotates them, and quantises
them with one gain per token:

    y_s = R diag(1/sigma_s) P_s z        g_s = 2^(base_s + code/2)       c_s = nearest level to y_s / g_s
    z  <-  z - P_s^T diag(sigma_s) R^T g_s c_s

A coefficient picked twice is refined, one never picked costs nothing: reverse water-filling coefficient by coefficient,
although a packed page only knows groups of 32 channels of one width. Decoding is linear whatever was picked,

    x' = sum_s g_s A_s c_s

so that kernels see ``32 S`` channels and one linear map, which goes into the query or the output projection.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool import codebooks, rotation
from kvtool.packing import GROUP, PAGE

GAIN_CODES = 16  # 4 bits
GAIN_STEP = 0.5  # octaves

# of each width: levels above zero, what one unit of them is worth, mean squared error. These are
# codebooks.sphere_codebook(32, width), written out because serving should not wait seconds for them (tests compare).
BOOKS: dict[int, tuple[tuple[int, ...], float, float]] = {
    1: ((1,), 0.8041414256519029, 0.35335656755048395),
    2: ((20, 66), 0.022569083802884398, 0.11160032139992021),
    3: ((14, 43, 76, 120), 0.01726605053100198, 0.03226199853238222),
    4: ((5, 15, 25, 35, 47, 61, 77, 99), 0.025908861034420243, 0.008808096252801852),
    8: ((), 0.027405079338774518, 6.851989906824243e-05),
}


class Code(NamedTuple):
    """How the vectors of each head are coded; S stages, C >= 32 coefficients.

    widths: bits of each stage, non-increasing.
    basis: W, float32 [H, C, D]. order: int64 [H, S, 32]. deviation: sigma, float32 [H, S, 32].
    gain_base: log2 of the smallest gain, float32 [H, S].
    """

    widths: tuple[int, ...]
    basis: Tensor
    order: Tensor
    deviation: Tensor
    gain_base: Tensor


class Coded(NamedTuple):
    """What is stored, before packing.

    codes: uint8 [..., H, T, 32 S]. gains: gain codes, uint8 [..., H, S, T].
    clipped: bool [..., H, T], the token is larger than its largest gain.
    """

    codes: Tensor
    gains: Tensor
    clipped: Tensor


def encode(x: Tensor, code: Code) -> Coded:
    """Code the vectors ``x`` [..., H, T, D]."""
    return encode_coefficients(x.float() @ code.basis.mT, code)


def encode_coefficients(z: Tensor, code: Code) -> Coded:
    """Code vectors given by their coefficients ``z`` [..., H, T, C]."""
    turn = stage_rotation(z.device)
    codes, gains = [], []
    clipped = torch.zeros(z.shape[:-1], dtype=torch.bool, device=z.device)
    for s, width in enumerate(code.widths):
        picked = code.order[:, s, None].expand(*z.shape[:-1], GROUP)
        sigma = code.deviation[:, s, None]  # [H, 1, 32]
        y = (z.gather(-1, picked) / sigma) @ turn.mT
        octave = (log_rms(y) - code.gain_base[:, s, None]) / GAIN_STEP
        clipped |= octave > GAIN_CODES - 0.5
        gain_code = octave.round().clamp(0, GAIN_CODES - 1)
        gain = gain_of(gain_code, code.gain_base[:, s, None])[..., None]
        levels, step = table(width, z.device)
        chosen = codebooks.nearest(y / gain, levels, step)
        codes.append(chosen)
        gains.append(gain_code.to(torch.uint8))
        if s + 1 < len(code.widths):
            z = z.scatter_add(-1, picked, -((gain * step * codebooks.look_up(levels, chosen)) @ turn) * sigma)
    if not codes:
        empty = z.new_empty((*z.shape[:-1], 0), dtype=torch.uint8)
        return Coded(empty, empty.movedim(-1, -2), clipped)
    return Coded(torch.cat(codes, -1), torch.stack(gains, -2), clipped)


def encode_guarded(x: Tensor, code: Code, plain: Callable[[], Code], share: float) -> tuple[Coded, Tensor]:
    """Codes of ``x`` [..., H, T, D], T in pages of 64, and which pages [..., H, N] are coded plainly.

    plain: the code of the same widths for pages of which more than ``share`` is beyond the calibrated range.
    """
    coded = encode(x, code)
    outside = coded.clipped.unflatten(-1, (-1, PAGE)).float().mean(-1) > share
    if outside.any():
        other = encode(x, plain())
        tokens = outside.repeat_interleave(PAGE, -1)
        coded = Coded(
            torch.where(tokens[..., None], other.codes, coded.codes),
            torch.where(tokens[..., None, :], other.gains, coded.gains),
            coded.clipped,
        )
    return coded, outside


def decode_guarded(coded: Coded, code: Code, maps: Tensor, plain: Callable[[], Code], outside: Tensor) -> Tensor:
    """The vectors [..., H, T, D]: ``features @ maps`` [H, 32 S, D], pages ``outside`` [..., H, N] plainly."""
    x = features(coded, code) @ maps
    if outside.any():
        other = plain()
        tokens = outside.bool().repeat_interleave(PAGE, -1)[..., None]
        x = torch.where(tokens, features(coded, other) @ decoder(other), x)
    return x


def features(coded: Coded, code: Code) -> Tensor:
    """What a decoder maps: gain times level, float32 [..., H, T, 32 S], in units of the kernels' integer levels."""
    parts = []
    for s, width in enumerate(code.widths):
        levels, _ = table(width, coded.codes.device)
        gain = gain_of(coded.gains[..., s, :], code.gain_base[:, s, None])
        chosen = coded.codes[..., GROUP * s : GROUP * (s + 1)]
        parts.append(codebooks.look_up(levels, chosen) * gain[..., None])
    return torch.cat(parts, -1) if parts else coded.codes.float()


def decoder(code: Code) -> Tensor:
    """The map that undoes the encoder, float32 [H, 32 S, D]: x' = features @ decoder."""
    D = code.basis.shape[-1]
    # coefficients beyond D are padding, with nothing behind them
    back = torch.linalg.inv(code.basis[:, :D].double()).float().mT  # [H, D, D]
    back = torch.nn.functional.pad(back, (0, 0, 0, code.basis.shape[1] - D))
    turn = stage_rotation(back.device)
    maps = []
    for s, width in enumerate(code.widths):
        rows = back.gather(1, code.order[:, s, :, None].expand(-1, -1, back.shape[-1]))
        maps.append(table(width, back.device)[1] * (turn @ (code.deviation[:, s, :, None] * rows)))
    return torch.cat(maps, 1) if maps else back[:, :0]


def gain_of(gain_code: Tensor, base: Tensor) -> Tensor:
    """The gain that a gain code stands for."""
    return torch.exp2(base + GAIN_STEP * gain_code.float())


def log_rms(y: Tensor) -> Tensor:
    """log2 of the root mean square over the last dimension; very small for zeros."""
    return 0.5 * torch.log2(y.square().mean(-1).clamp_min(1e-30))


@lru_cache(maxsize=64)
def table(width: int, device: torch.device) -> tuple[Tensor, float]:
    """Levels float32 [2^width] on the kernels' grid, and what one unit is worth, for 32 coordinates of unit rms."""
    positive, step, _ = BOOKS[width]
    if width == 8:
        return torch.arange(256, device=device) - 127.5, step
    levels = [*(-level for level in reversed(positive)), *positive]
    return torch.tensor(levels, dtype=torch.float32, device=device), step


def distortion(width: int) -> float:
    """Expected squared error of a coordinate of unit variance at ``width`` bits."""
    return BOOKS[width][2] if width else 1.0


def stage_rotation(device: torch.device) -> Tensor:
    """R, the rotation inside every stage: one round of fixed signs and a Hadamard transform, [32, 32].

    The coefficients it mixes are already those of a data-dependent basis; it only has to make them alike.
    """
    signs = 2.0 * torch.randint(0, 2, (GROUP,), generator=torch.Generator().manual_seed(32)) - 1
    return (rotation.hadamard(GROUP, last=False) * signs).to(device)


def pick(variance: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Which coefficients each stage codes, greedily, given ``variance`` [H, C] >= 0.

    Returns order int64 [H, S, 32], deviation float32 [H, S, 32], and the expected distortion that is left, [H].
    """
    left, order, deviation = variance.double(), [], []
    for width in widths:
        top, where = left.topk(GROUP, -1)
        order.append(where)
        deviation.append(top.clamp_min(1e-30).sqrt())
        left = left.scatter(-1, where, top * distortion(width))
    H = variance.shape[0]
    if not order:
        empty = torch.zeros(H, 0, GROUP)
        return empty.long(), empty, left.sum(-1)
    return torch.stack(order, 1), torch.stack(deviation, 1).float(), left.sum(-1)
