"""The codec of RINA: logarithmic norms, recursive one-bit stages over sub-spaces, error feedback along a page.

Everything here is per vector and free of fitted state but for what is passed in; ``rina.py`` has the method.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NORM_STEPS = 8  # per octave: a norm is off by at most 4.4 %
_NORM_ZERO = 128  # the code of norm 1
HALF_STEPS = 4  # per octave
_HALF_ZERO = 8


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
    """Codes uint8 of positive norms; 0 stands for zero. 2^-15.8 to 2^15.9."""
    code = (norm.float().clamp_min(1e-30).log2() * NORM_STEPS + _NORM_ZERO).round().clamp(1, 255)
    return torch.where(norm > 0, code, torch.zeros_like(code)).to(torch.uint8)


def decode_norm(code: Tensor) -> Tensor:
    """The inverse of :func:`encode_norm`, float32."""
    return torch.where(code > 0, ((code.float() - _NORM_ZERO) / NORM_STEPS).exp2(), 0.0)


def encode(x: Tensor, stages: Stages) -> Coded:
    """One-bit stages of ``x`` [..., H, T, D], already divided by norm / sqrt(D)."""
    m, J = stages.mids.shape[1:]
    r = x.unflatten(-1, (m, -1))  # [..., H, T, m, s]
    bits, codes = [], []
    for j in range(J):
        mid, fitted = (field[:, None, :, j, None] for field in stages)  # [H, 1, m, 1]
        centred = r - mid
        best = centred.abs().mean(-1, keepdim=True)  # the half distance of least error, given the threshold
        code = ((best / fitted).clamp_min(1e-6).log2() * HALF_STEPS + _HALF_ZERO).round().clamp(0, 15)
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


def pack_nibbles(codes: Tensor) -> Tensor:
    """4-bit codes [..., 2n] to bytes [..., n]."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_nibbles`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def _half(code: Tensor, fitted: Tensor) -> Tensor:
    return fitted * ((code.float() - _HALF_ZERO) / HALF_STEPS).exp2()
