"""QJL: one bit per channel from which an inner product is estimated without bias (Zandieh et al., arXiv 2406.03482).

With S a d x d matrix and r a vector, the sketch is sign(S r) and gamma = ||r||. For every q, over the draw of S,

    Gaussian S     E[ gamma sqrt(pi/2)/d       <S q, sign(S r)> ] = <q, r>      variance <= pi/(2d) ||q||^2 ||r||^2
    orthogonal S   E[ gamma sqrt(pi/2)/sqrt(d) <S q, sign(S r)> ] = <q, r>      to O(1/d), with about a third of it

The estimate is linear in q, so what stands for r is the vector gamma * constant * S^T sign(S r).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from kvtool import packing, rotation

Sketch = Literal["gaussian", "orthogonal"]


def draw(kind: Sketch, heads: int, dim: int, generator: torch.Generator) -> Tensor:
    """S of every head, float32 [H, D, D]."""
    if kind == "orthogonal":
        return rotation.draw("haar", heads, dim, generator)
    return torch.randn(heads, dim, dim, generator=generator)


def sketch(residual: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Pages of sign bits and packed float16 gammas of ``residual`` [B, H, T, D]."""
    signs = (residual @ s.mT > 0).to(torch.uint8)
    pages = packing.pack_keys(signs, [1] * packing.groups(residual.shape[-1]))
    return pages, packing.pack_tokens(residual.norm(dim=-1)).half()


def unsketch(pages: Tensor, gammas: Tensor, s: Tensor, kind: Sketch) -> Tensor:
    """The vectors [B, H, T, D] float32 whose inner product with a query is the estimate."""
    D = s.shape[-1]
    signs = 2.0 * packing.unpack_keys(pages, [1] * packing.groups(D), D) - 1
    constant = math.sqrt(math.pi / 2) / (D if kind == "gaussian" else math.sqrt(D))
    return packing.unpack_tokens(gammas).float()[..., None] * constant * (signs @ s)
