"""The codec of RINA: norms, recursive one-bit stages over sub-spaces, error feedback along a page.

Everything here is per vector and free of fitted state but for what is passed in; ``rina.py`` has the method.
Norms and level distances are small unsigned floats, so that a kernel reads one by shifting it into place:

    norm    8 bits, 5 of exponent and 3 of mantissa, subnormals included
    half    4 bits, 2 and 2: (1 + (c & 3)/4) 2^(c >> 2), in units of a sixth of the fitted one, which has code 10
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.packing import pack_nibbles, unpack_nibbles

NORM_UNIT = 2.0**112  # between exponents of 5 bits and those of float32
HALF_UNIT = 6.0


class Stages(NamedTuple):
    """The fitted shape of the stages of one side, in units of norm / sqrt(D).

    mids, halves: float32 [H, m, J], the centre and half distance of the two levels.
    """

    mids: Tensor
    halves: Tensor


class Coded(NamedTuple):
    """bits: uint8 [J, ..., D]; half_codes: uint8 [..., m, J]; decoded: [..., D], as it will be read back."""

    bits: Tensor
    half_codes: Tensor
    decoded: Tensor


def encode_norm(norm: Tensor) -> Tensor:
    """Codes uint8 of norms from 2^-17 to 2^16.9; 0 stands for zero. Off by at most a seventeenth from 2^-14 on."""
    bits = (norm.float() / NORM_UNIT).view(torch.int32)
    return ((bits + (1 << 19)) >> 20).clamp(0, 255).to(torch.uint8)


def decode_norm(code: Tensor) -> Tensor:
    """The inverse of :func:`encode_norm`, float32."""
    return (code.to(torch.int32) << 20).view(torch.float32) * NORM_UNIT


def encode(x: Tensor, stages: Stages) -> Coded:
    """One-bit stages of ``x`` [..., H, T, D], already divided by norm / sqrt(D)."""
    m, J = stages.mids.shape[1:]
    levels = _level(torch.arange(16, device=x.device))
    middles = (levels[1:] + levels[:-1]) / 2
    r = x.unflatten(-1, (m, -1))  # [..., H, T, m, s]
    bits, codes = [], []
    for j in range(J):
        mid, fitted = (field[:, None, :, j, None] for field in stages)  # [H, 1, m, 1]
        centred = r - mid
        best = centred.abs().mean(-1, keepdim=True)  # the half distance of least error, given the threshold
        code = torch.bucketize(best / fitted * HALF_UNIT, middles)
        sign = torch.where(centred > 0, 1.0, -1.0)
        r = centred - sign * _half(code, fitted)
        bits.append((sign > 0).to(torch.uint8).flatten(-2))
        codes.append(code.squeeze(-1).to(torch.uint8))
    return Coded(torch.stack(bits), torch.stack(codes, -1), x - r.flatten(-2))


def decode(bits: Tensor, half_codes: Tensor, stages: Stages) -> Tensor:
    """The inverse of :func:`encode`: [..., H, T, D] in units of norm / sqrt(D)."""
    m = stages.mids.shape[1]
    total = torch.zeros((), device=bits.device)
    for j, stage in enumerate(bits):
        mid, fitted = (field[:, None, :, j, None] for field in stages)
        sign = 2.0 * stage.unflatten(-1, (m, -1)) - 1
        total = total + mid + sign * _half(half_codes[..., j, None], fitted)
    return total.flatten(-2)


def fit_stages(x: Tensor, subspace: int, count: int) -> Stages:
    """Stages of least error for ``x`` [H, T, D]: the mean of each residual, then its mean size around that."""
    r = x.unflatten(-1, (-1, subspace))  # [H, T, m, s]
    mids, halves = [], []
    for _ in range(count):
        mid = r.mean((1, 3))  # [H, m]
        centred = r - mid[:, None, :, None]
        half = centred.abs().mean((1, 3))
        own = centred.abs().mean(-1, keepdim=True)
        r = centred - torch.where(centred > 0, own, -own)
        mids.append(mid)
        halves.append(half.clamp_min(1e-6))
    return Stages(torch.stack(mids, -1), torch.stack(halves, -1))


def noise(y: Tensor, stages: Stages) -> Tensor:
    """Mean squared error per coordinate left after each stage, [H, m, J], for ``y`` [H, T, D] in units of the norm."""
    left = []
    for j in range(stages.mids.shape[-1]):
        upto = Stages(stages.mids[..., : j + 1], stages.halves[..., : j + 1])
        error = (y - encode(y, upto).decoded).unflatten(-1, (stages.mids.shape[1], -1))
        left.append(error.square().mean((1, 3)))
    return torch.stack(left, -1)


def feedback(x: Tensor, beta: Tensor, norms: Tensor, stages: Stages) -> tuple[Tensor, Coded]:
    """Code ``x`` [..., H, 64, D] token by token, adding ``beta`` [H] times the error of the token before.

    norms: [..., H, 64], the decoded norm over sqrt(D) of each token. The error is clipped at three of them, so the
    state is bounded whatever comes. Returns the decoded vectors and the codes.
    """
    error = torch.zeros_like(x[..., :1, :])
    parts = []
    for t in range(x.shape[-2]):
        unit = norms[..., t : t + 1, None].clamp_min(1e-30)
        target = x[..., t : t + 1, :] + beta[:, None, None] * error
        coded = encode(target / unit, stages)
        error = (target - coded.decoded * unit).clamp(-3 * unit, 3 * unit)
        parts.append(coded)
    coded = Coded(
        torch.cat([p.bits for p in parts], -2),
        torch.cat([p.half_codes for p in parts], -3),
        torch.cat([p.decoded for p in parts], -2),
    )
    return coded.decoded * norms[..., None], coded


def pack_halves(codes: Tensor) -> Tensor:
    """Codes [..., T, m, J] to bytes [..., N, 32 J m]: by stage and sub-space, as ``packing.pack_nibbles``."""
    return pack_nibbles(codes.movedim(-3, -1).transpose(-3, -2).flatten(-3, -2))


def unpack_halves(packed: Tensor, spaces: int, stages: int) -> Tensor:
    """The inverse of :func:`pack_halves`."""
    codes = unpack_nibbles(packed, stages * spaces).unflatten(-2, (stages, spaces))
    return codes.transpose(-3, -2).movedim(-1, -3)


def _half(code: Tensor, fitted: Tensor) -> Tensor:
    return fitted / HALF_UNIT * _level(code)


def _level(code: Tensor) -> Tensor:
    code = code.to(torch.int32)
    return torch.ldexp(1 + (code & 3) / 4, code >> 2)
