"""Exact attention as a mergeable state, and the float64 yardstick every kernel is judged by.

Attention over a set of tokens is the pair (out, lse). Two disjoint sets merge exactly, so sinks, the recent window,
tiers and split-KV partials are all one thing: parts.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Attended(NamedTuple):
    """Attention over one part of the cache.

    out: [B, HQ, S, D], the softmax-weighted values of this part.
    lse: [B, HQ, S] float32 or better, natural log of the sum of exp(logits) of this part.
    """

    out: Tensor
    lse: Tensor


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    causal: bool = False,
) -> Attended:
    """Attention of ``queries`` [B, HQ, S, D] over ``keys`` and ``values`` [B, H, T, D], computed in at least float32.

    bias: added to the scaled (and capped) logits, broadcastable to [B, H, 1, T]; ``-inf`` evicts a token.
    causal: the last S of the T tokens are the queries' own; each sees itself and what came before.
    A part with no visible token returns out = 0 and lse = -inf, which merges as nothing.
    """
    scores = logits(queries, keys, scale=scale, softcap=softcap)  # [B, H, G, S, T]
    if bias is not None:
        scores = scores + bias.reshape(*bias.shape[:2], 1, 1, bias.shape[-1])
    if causal:
        S, T = scores.shape[-2:]
        hidden = future(S, T, scores.device)
        scores = scores.masked_fill(hidden, -torch.inf)
    return from_logits(scores, values)


def from_logits(scores: Tensor, values: Tensor) -> Attended:
    """Attention with the final logits ``scores`` [B, H, G, S, T] over ``values`` [B, H, T, D], for estimators."""
    limits = torch.finfo(scores.dtype)
    # finite also where no token is visible; one exponential serves weights and sum
    nothing = scores.new_full((*scores.shape[:-1], 1), limits.min)
    top = scores.amax(-1, keepdim=True).maximum(nothing) if scores.shape[-1] else nothing
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    summed = (weights.flatten(2, 3) @ values.to(weights.dtype)).unflatten(2, weights.shape[2:4])
    out = summed / total.clamp(min=limits.tiny)  # [B, H, G, S, D]
    lse = (total.log() + top).squeeze(-1)
    return Attended(out.flatten(1, 2), lse.flatten(1, 2))


def logits(queries: Tensor, keys: Tensor, *, scale: float, softcap: float | None = None) -> Tensor:
    """Scaled, capped logits [B, H, G, S, T] of ``queries`` [B, HQ, S, D] against ``keys`` [B, H, T, D]."""
    B, HQ, S, D = queries.shape
    H = keys.shape[1]
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    # the query heads of a group as rows of one product: broadcasting would copy the keys for each of them
    grouped = queries.reshape(B, H, HQ // H * S, D).to(dtype) * scale
    scores = (grouped @ keys.to(dtype).mT).unflatten(2, (HQ // H, S))
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def future(S: int, T: int, device: torch.device) -> Tensor:
    """What the last S of T tokens do not see: boolean [S, T]."""
    return torch.ones(S, T, dtype=torch.bool, device=device).triu_(T - S + 1)


def block_shares(
    queries: Tensor, keys: Tensor, *, first: int, block: int, scale: float, softcap: float | None = None
) -> Tensor:
    """The share of the softmax on each ``block`` of keys from index ``first`` on, [B, HQ, S, N]: exp(lse_block - lse).

    ``queries`` [B, HQ, S, D] are the last of the tokens whose ``keys`` [B, H, T, D] are given; the last block may be
    shorter. A kernel that splits the cache has these lse as its partial results.
    """
    before, blocks = block_lse(queries, keys, first=first, block=block, scale=scale, softcap=softcap)
    whole = torch.cat([before[..., None], blocks], -1).logsumexp(-1, keepdim=True)
    return (blocks - whole).exp()


def block_lse(
    queries: Tensor, keys: Tensor, *, first: int, block: int, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The lse of the keys before ``first``, [B, HQ, S], and of each ``block`` after, [B, HQ, S, N]; arguments as in
    :func:`block_shares`."""
    scores = logits(queries, keys, scale=scale, softcap=softcap).flatten(1, 2)
    S, T = scores.shape[-2:]
    hidden = future(S, T, scores.device)
    scores = scores.masked_fill(hidden, -torch.inf)
    tail = torch.nn.functional.pad(scores[..., first:], (0, -(T - first) % block), value=-torch.inf)
    return scores[..., :first].logsumexp(-1), tail.unflatten(-1, (-1, block)).logsumexp(-1)


def merge(*parts: Attended) -> Attended:
    """Attention over the union of disjoint parts; exact."""
    lses = torch.stack([part.lse for part in parts])
    lse = lses.logsumexp(0)
    # all parts at once: in a captured step it is launches that cost
    out = (torch.stack([part.out for part in parts]) * weight(lses, lse)[..., None]).sum(0)
    return Attended(out, lse)


def weight(part: Tensor, lse: Tensor) -> Tensor:
    """The share of the softmax that falls on a part, [B, HQ, S], given its log-sum-exp and that of the whole."""
    return (part - lse).exp().nan_to_num(nan=0.0)  # -inf - -inf: nothing of nothing


def relative_error(found: Tensor, exact: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Relative L2 error ||found - exact|| / ||exact||, over ``dim`` or everything, in float64."""
    exact = exact.double()
    return torch.linalg.vector_norm(found.double() - exact, dim=dim) / torch.linalg.vector_norm(exact, dim=dim)
