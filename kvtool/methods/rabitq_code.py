"""The RaBitQ code of a vector: the grid point of a random cube nearest in angle, and what that is worth.

Sources: Gao and Long, https://arxiv.org/abs/2405.12497 (1 bit); Gao et al., https://arxiv.org/abs/2409.09913 (B bits).

    paper        here
    D            P: head_dim padded to a multiple of 32, the width of a packed group
    P^-1         rotation: Haar, or FhtKac (random signs and Hadamard transforms); x' = P^-1 x is ``rotated``
    o            the residual k - c, unit length; obar its code's direction
    x_u + c_B    ``grid(codes)``: half integers u
    <obar, o>    ``cosine``

With r = k - c and u its code: <q, r> is estimated by rescale * <q', u>, rescale = ||r||^2 / <r', u>. It is unbiased
over the rotation, and its error is that of one coordinate of a uniform unit vector (lemma B.3): see ``bounds.theory``.
"""

import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool import rotation as rotations
from kvtool.packing import GROUP, groups
from kvtool.shapes import TensorSpec

RotationKind = Literal["fhtkac", "haar"]
Delta = Literal["unbiased", "least-squares"]

# uniform step of least squared error for N(0,1) (Max 1960, table II; 6-8 bits by the same iteration)
_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0568, 8: 0.0308}
# scales tried for each vector; the MSE is within 0.6 % of the best scale's up to 4 bits, within 4 % at 5
_TRIALS = {2: 12, 3: 16, 4: 24, 5: 32, 6: 48, 7: 48, 8: 48}
# <obar, o> of a long 1-bit code; .804 at P = 32
COSINE = (2 / math.pi) ** 0.5
_TINY = torch.finfo(torch.float32).tiny


def padded(head_dim: int) -> int:
    """P: the channels a code has."""
    return GROUP * groups(head_dim)


def rotation_spec(kind: RotationKind, heads: int, head_dim: int) -> TensorSpec:
    """What the artifact stores: float32 [H, P, P], or the signs int8 [H, 4, P]."""
    P = padded(head_dim)
    return TensorSpec("float32", (heads, P, P)) if kind == "haar" else TensorSpec("int8", (heads, 4, P))


def draw_rotation(kind: RotationKind, heads: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """A fresh rotation for every head, as :func:`rotation_spec` says."""
    P = padded(head_dim)
    if kind == "haar":
        return rotations.draw("haar", heads, P, generator)
    return (2 * torch.randint(0, 2, (heads, 4, P), generator=generator) - 1).to(torch.int8)


def rotation_matrix(rotation: Tensor) -> Tensor:
    """The orthogonal matrix [H, P, P] that takes a column x to x'.

    FhtKac: four rounds of random signs, then a Hadamard transform of the largest 2^k <= P channels, the first ones
    and the last ones in turn; if P is no power of two, each round ends with a turn by 45 degrees of the two halves.
    """
    if rotation.is_floating_point():
        return rotation
    H, R, P = rotation.shape
    turn = torch.eye(P, device=rotation.device)
    if P & (P - 1):
        half = torch.eye(P // 2, device=rotation.device)
        turn = torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)]) / 2**0.5
    product = torch.eye(P, device=rotation.device).expand(H, P, P)
    for i in range(R):
        hadamard = rotations.hadamard(P, last=bool(i % 2)).to(rotation.device)
        product = turn @ (hadamard @ (rotation[:, i, :, None].float() * product))
    return product


def rotate(x: Tensor, matrix: Tensor) -> Tensor:
    """x' [..., H, T, P] of ``x`` [..., H, T, D], padded with zeros."""
    return F.pad(x, (0, matrix.shape[-1] - x.shape[-1])) @ matrix.mT


def unrotate(y: Tensor, matrix: Tensor, head_dim: int) -> Tensor:
    """The inverse of :func:`rotate`."""
    return (y @ matrix)[..., :head_dim]


def encode(rotated: Tensor, bits: int) -> Tensor:
    """Codes uint8 of ``rotated`` [..., P]: the grid point nearest in angle, over the scales tried for each vector."""
    positive = rotated > 0
    if bits == 1:
        return positive.to(torch.uint8)
    size = rotated.abs()
    deviation = size.square().mean(-1, keepdim=True).sqrt().clamp_min(_TINY)
    best, chosen = torch.full_like(deviation, -1.0), torch.zeros_like(deviation)
    for step in _STEP[bits] * torch.linspace(0.70, 1.30, _TRIALS[bits]):
        u = _magnitudes(size, step * deviation, bits)
        found = (u * size).sum(-1, keepdim=True) / u.norm(dim=-1, keepdim=True)
        better = found > best
        best, chosen = torch.where(better, found, best), torch.where(better, step * deviation, chosen)
    u = _magnitudes(size, chosen, bits)
    return (torch.where(positive, u, -u) + (2**bits - 1) / 2).round().to(torch.uint8)


def _magnitudes(size: Tensor, step: Tensor, bits: int) -> Tensor:
    return (size / step).floor_().clamp_(max=2 ** (bits - 1) - 1).add_(0.5)


def grid(codes: Tensor, bits: int) -> Tensor:
    """The half integers u of ``codes``, float32."""
    return codes.float() - (2**bits - 1) / 2


def cosine(rotated: Tensor, codes: Tensor, bits: int) -> Tensor:
    """<obar, o> of each vector [...]; 1 for a zero vector, which needs no estimate."""
    u = grid(codes, bits)
    norms = rotated.norm(dim=-1) * u.norm(dim=-1)
    return torch.where(norms > 0, (rotated * u).sum(-1) / norms.clamp_min(_TINY), 1.0)


def rescale(rotated: Tensor, codes: Tensor, bits: int, delta: Delta) -> Tensor:
    """What the grid point is multiplied by, [...]; 0 for a zero vector.

    unbiased: ||r||^2 / <r', u>, so that inner products are right on average. least-squares: <r', u> / ||u||^2.
    """
    u = grid(codes, bits)
    product = (rotated * u).sum(-1)
    if delta == "least-squares":
        return product / u.square().sum(-1)
    energy = rotated.square().sum(-1)
    # not `energy > 0`: a NaN must stay one, to be refused
    return torch.where(energy == 0, 0.0, energy / product.clamp_min(_TINY))


@lru_cache(maxsize=64)
def expected_distortion(dim: int, bits: int, delta: Delta) -> float:
    """E ||r - r^||^2 / ||r||^2 over Haar rotations of R^``dim``: that of a random vector, whatever r is.

    The mean of 4096 draws from a fixed seed; its own standard error is .2 % at 1 bit, less above.
    """
    r = torch.randn(4096, dim, generator=torch.Generator().manual_seed(0))
    codes = encode(r, bits)
    found = rescale(r, codes, bits, delta)[:, None] * grid(codes, bits)
    return float(((found - r).square().sum(-1) / r.square().sum(-1)).double().mean())
