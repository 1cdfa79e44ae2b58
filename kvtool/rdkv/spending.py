"""A budget over the pages of a prompt: tokens in order of worth, in pages of 64, and a level for each page.

B sequences, H KV heads, P = ceil(T/64) pages of each, L levels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.allocation import allocate
from kvtool.packing import PAGE


def page_sums(ordered: Tensor) -> Tensor:
    """Sums over runs of 64 tokens: [B, H, T] to [B, H, P]."""
    padded = F.pad(ordered, (0, -ordered.shape[-1] % PAGE))
    return padded.unflatten(-1, (-1, PAGE)).sum(-1)


def spend(cost: Tensor, distortion: Tensor, each: float, left: Tensor, *, heads: int) -> tuple[Tensor, Tensor]:
    """The level of each page, uint8 [B, H, P], and what remains of the budget, [B].

    cost: [H, P, L]. distortion: [B, H, P, L]. each: budget of a head; ``heads`` of them share theirs.
    left: [B], what earlier runs did not spend.
    """
    H = distortion.shape[1]
    levels = torch.zeros(distortion.shape[:3], dtype=torch.uint8, device=distortion.device)
    remains = left.clone()
    for b in range(len(distortion)):
        remains[b] += each * H
        for first in range(0, H, heads):
            part = slice(first, first + heads)
            c, d = cost[part].flatten(0, 1), distortion[b, part].flatten(0, 1)
            chosen = allocate(c, d, max(0.0, each * heads + float(left[b]) * heads / H))
            levels[b, part] = chosen.reshape(heads, -1).to(torch.uint8)
            remains[b] -= float(c.gather(1, chosen[:, None]).sum())
    return levels, remains


def in_order(levels: Tensor, worth: Tensor) -> Tensor:
    """Levels of pages [B, H, P] as levels of tokens [B, H, T], the pages in falling order of ``worth`` [B, H, T]."""
    tokens = levels.repeat_interleave(PAGE, -1)[..., : worth.shape[-1]]
    return torch.zeros_like(tokens).scatter_(-1, worth.argsort(-1, descending=True), tokens)
