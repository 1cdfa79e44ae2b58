"""The 4-bit query of RaBitQ and its inner product with codes in integers.

Source: https://arxiv.org/abs/2405.12497, section 3.3. A rotated query q' becomes low + step * level, level in
0..2^bits - 1. Then

    <u, q'>  ~  step * <x, level> + low * sum(x) - (2^B - 1)/2 * (step * sum(level) + P * low)

with x the B-bit codes and u = x - (2^B - 1)/2, and <x, level> is a sum over pairs of bit planes of popcounts: exact.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_POPCOUNT = torch.tensor([byte.bit_count() for byte in range(256)])


class QuantisedQuery(NamedTuple):
    """levels: uint8 [..., P]. low, step: float32 [..., 1]."""

    levels: Tensor
    low: Tensor
    step: Tensor

    def dequantised(self) -> Tensor:
        """low + step * level, [..., P]."""
        return self.low + self.step * self.levels.float()


def quantise(rotated: Tensor, bits: int, generator: torch.Generator | None = None) -> QuantisedQuery:
    """``rotated`` [..., P] on a uniform grid between its smallest and largest coordinate.

    generator: round at random, so that the query is unbiased (theorem 3.3); None rounds to the nearest, which has 0.7
    times the error, and after a random rotation a negligible bias.
    """
    low = rotated.amin(-1, keepdim=True)
    step = (rotated.amax(-1, keepdim=True) - low) / (2**bits - 1)
    step = step.clamp_min(torch.finfo(torch.float32).tiny)
    shift = 0.5 if generator is None else torch.rand(rotated.shape, generator=generator)
    levels = ((rotated - low) / step + shift).floor().clamp_(0, 2**bits - 1)
    return QuantisedQuery(levels.to(torch.uint8), low, step)


def inner_products(query: QuantisedQuery, codes: Tensor, *, query_bits: int, bits: int) -> Tensor:
    """<u, low + step * level> of every query [..., S, P] with every code [..., T, P]: [..., S, T]."""
    P = codes.shape[-1]
    whole = plane_products(query.levels, codes, query_bits=query_bits, bits=bits).float()
    sum_x = codes.sum(-1, dtype=torch.int64).float()[..., None, :]
    sum_levels = query.levels.sum(-1, dtype=torch.int64).float()[..., :, None]
    centre = (2**bits - 1) / 2
    return query.step * whole + query.low * sum_x - centre * (query.step * sum_levels + P * query.low)


def plane_products(levels: Tensor, codes: Tensor, *, query_bits: int, bits: int) -> Tensor:
    """<x, level> in integers, by popcounts of ANDed bit planes: [..., S, T] int64."""
    total = torch.zeros((), dtype=torch.int64)
    for i in range(bits):
        x = _plane(codes, i)[..., None, :, :]
        for j in range(query_bits):
            hits = _POPCOUNT[(x & _plane(levels, j)[..., :, None, :]).long()].sum(-1)
            total = total + (hits << (i + j))
    return total


def _plane(levels: Tensor, bit: int) -> Tensor:
    """Bit ``bit`` of uint8 [..., P], eight channels to a byte: [..., P/8]."""
    bits = ((levels >> bit) & 1).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
