"""Random rotations that make every coordinate of a vector look alike, one per KV head.

Two kinds, told apart by their dtype in the artifact:

    haar      uniform over the orthogonal group (QR of a Gaussian matrix, signs fixed); float32 [H, D, D]
    hadamard  rounds of random signs and a normalised Hadamard transform; int8 signs [H, R, D]

One round of Hadamard sends a one-hot vector to a constant one, the worst input of a scalar quantiser, so there are
three. Nothing is padded: a head_dim that is no power of two is cut into blocks that are (112 = 64 + 32 + 16), and the
channels change places between rounds, by a fixed stride, so that the blocks mix. docs/methods/turboquant.md has the
measured worst cases.
"""

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from kvtool.shapes import TensorSpec

RotationKind = Literal["hadamard", "haar"]
ROUNDS = 3


def spec(kind: RotationKind, heads: int, dim: int) -> TensorSpec:
    """What the artifact stores for ``heads`` rotations of ``dim`` channels."""
    if kind == "haar":
        return TensorSpec("float32", (heads, dim, dim))
    return TensorSpec("int8", (heads, ROUNDS, dim))


def draw(kind: RotationKind, heads: int, dim: int, generator: torch.Generator) -> Tensor:
    """Fresh random rotations, as :func:`spec` says."""
    if kind == "haar":
        gaussian = torch.randn(heads, dim, dim, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        # without fixing the signs of r's diagonal, QR is not uniform
        return (q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]).float()
    bits = torch.randint(0, 2, (heads, ROUNDS, dim), generator=generator)
    return (2 * bits - 1).to(torch.int8)


def matrix(rotation: Tensor) -> Tensor:
    """The orthogonal matrices Pi, float32 [H, D, D], of a stored rotation: a column vector x turns into Pi x."""
    if rotation.is_floating_point():
        return rotation
    H, R, D = rotation.shape
    pi = torch.eye(D, device=rotation.device).expand(H, D, D)
    stride, blocks = _stride(D).to(rotation.device), _blocks(D).to(rotation.device)
    for i in range(R):
        pi = blocks @ (rotation[:, i, :, None].float() * pi[:, stride])
    return pi


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Pi x for every vector of ``x`` [..., H, T, D]; float32."""
    return x.float() @ matrix(rotation).mT


def unrotate(y: Tensor, rotation: Tensor) -> Tensor:
    """The inverse of :func:`rotate`."""
    return y.float() @ matrix(rotation)


@lru_cache(maxsize=64)
def _blocks(dim: int) -> Tensor:
    """Normalised Hadamard matrices along the diagonal, one for each power of two in ``dim``, the largest first."""
    powers = [1 << bit for bit in range(dim.bit_length()) if dim >> bit & 1]
    return torch.block_diag(*(_sylvester(power) for power in reversed(powers)))


@lru_cache(maxsize=64)
def _stride(dim: int) -> Tensor:
    """Channels c*s mod dim, with s the first number above 0.618 dim that has no factor in common with it."""
    stride = next(s for s in range(round(0.618 * dim) or 1, 2 * dim + 1) if math.gcd(s, dim) == 1)
    return torch.arange(dim) * stride % dim


def hadamard(dim: int, last: bool) -> Tensor:
    """The normalised Hadamard matrix of the largest 2^k <= dim, on the first or last channels; identity elsewhere."""
    h = _sylvester(1 << (dim.bit_length() - 1))
    eye = torch.eye(dim - len(h))
    return torch.block_diag(eye, h) if last else torch.block_diag(h, eye)


@lru_cache(maxsize=16)
def _sylvester(dim: int) -> Tensor:
    h = torch.ones(1, 1)
    while len(h) < dim:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)]) / 2**0.5
    return h
