"""Half bits: the loudest channels of a head are a vector of their own, with one bit more (arXiv 2504.19874, sec. 4.3).

Each part has its own rotation, codebook and scale, and the codebook is scaled by *its* 1/sqrt(dim): 32 channels are a
vector in R^32, whatever the head_dim. Loud channels come first in the stored order, so a packed group has one width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool import packing
from kvtool.errors import MethodOptionError


class Part(NamedTuple):
    """Channels quantised as one vector; its tensors are ``<name>_rotation``, ``<name>_levels`` and ``<name>_step``."""

    name: str
    dim: int
    bits: int


def parts_of(side: str, bits: float, head_dim: int) -> list[Part]:
    """The parts of a key or value, ``side``, at ``bits``: one at whole bits, two at half bits.

    A quarter of the channels is loud, as in the paper's 32 of 128, rounded down to whole groups of 32, at least one.
    """
    if bits == int(bits):
        return [Part(side, head_dim, int(bits))]
    loud = max(packing.GROUP, head_dim // 4 // packing.GROUP * packing.GROUP)
    if head_dim <= loud:
        raise MethodOptionError(
            f"turboquant {side[0]}_bits: half bits set {packing.GROUP} channels apart, and the model's head_dim "
            f"is only {head_dim}; use whole bits"
        )
    return [Part(f"{side}_outlier", loud, int(bits + 0.5)), Part(side, head_dim - loud, int(bits))]


def loudest(energy: Tensor, count: int) -> Tensor:
    """Stored order of the channels, int16 [H, D]: the ``count`` of most ``energy`` [H, D], then the others."""
    H, D = energy.shape
    loud = energy.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values
    quiet = torch.ones(H, D, dtype=torch.bool).scatter_(-1, loud, False)
    return torch.cat([loud, quiet.nonzero()[:, 1].reshape(H, D - count)], -1).to(torch.int16)


def split(x: Tensor, parts: Sequence[Part], order: Tensor | None) -> Sequence[Tensor]:
    """The parts of ``x`` [..., H, T, D]; ``order`` [H, D] is None for a single one."""
    if order is None:
        return [x]
    channels = order.long()[:, None].expand(x.shape)
    pieces: Sequence[Tensor] = x.gather(-1, channels).split([part.dim for part in parts], -1)
    return pieces


def join(pieces: Sequence[Tensor], order: Tensor | None) -> Tensor:
    """The inverse of :func:`split`."""
    x = torch.cat(list(pieces), -1)
    return x if order is None else torch.empty_like(x).scatter_(-1, order.long()[:, None].expand(x.shape), x)
