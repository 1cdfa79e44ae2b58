"""Which tokens attention reads: nucleus (top-p) selection without a sort, by estimate and exact rescoring.

Sources: Twilight, https://arxiv.org/abs/2502.02770 (the smallest set holding a share p of the softmax) and RaBitQCache,
https://arxiv.org/abs/2606.31519 (an unbiased 1-bit estimate of the logits to find it by).

Taking top-p of the *estimate* keeps less true mass than asked, for noise fattens its top. So: candidates hold p' > p of
the softmax, their exact logits are computed, and the smallest set of candidates is kept that holds p of

    Z^ = sum of exp(exact logit) over candidates + 2 * sum of E[exp(logit) | estimate] over the rest,

the expectation being an upper one (``likely_logits``), so that the *true* mass kept is at least p.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool import scores

# exp(-88) is the least normal float32: what lies further below the maximum has no mass
_DEPTH = 88.0
# halvings of that depth, to below the resolution of a float32 logit
_ROUNDS = 32
_CACHED = 1 << 16  # logits that are halved at a time on a CPU: they stay in its cache
_CAUTION = math.log(2)


class Selection(NamedTuple):
    """kept, candidates: bool, the shape of the logits [..., T]; kept is within candidates."""

    kept: Tensor
    candidates: Tensor


def top_p(logits: Tensor, p: float, total: Tensor | None = None) -> Tensor:
    """The smallest set of tokens whose share of the softmax reaches ``p``, the one that crosses it included.

    logits: [..., T]; ``-inf`` is never kept. total: [...] logsumexp that shares are of, if not that of ``logits``; if
    they cannot reach p of it, all are kept. Tokens with equal logits are kept together.
    """
    total = logits.logsumexp(-1) if total is None else total
    return logits > -torch.inf if p >= 1 else _heaviest(logits, p * (total - _peak(logits)).exp())


def _heaviest(logits: Tensor, need: Tensor) -> Tensor:
    """The smallest set whose sum of exp(logits - peak) reaches ``need`` [...]; everything visible if none does."""
    return _down_to(logits, need, lambda weights, inside, need: (weights * inside).sum(-1, keepdim=True) >= need)


def _all_but(logits: Tensor, allowed: Tensor) -> Tensor:
    """The smallest set that leaves out tokens of no more than ``allowed`` [...], a sum of exp(logits - peak).

    What is left out is summed by itself: beside the peak it may be less than a float32 resolves.
    """
    return _down_to(
        logits, allowed, lambda weights, inside, allowed: (weights * ~inside).sum(-1, keepdim=True) <= allowed
    )


def _down_to(logits: Tensor, amount: Tensor, enough: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """The smallest set of heaviest tokens that is ``enough`` by weights, who is inside, and ``amount``."""
    depth = logits - _peak(logits)[..., None]
    rows, wanted = depth.reshape(-1, depth.shape[-1]), amount.expand(logits.shape[:-1]).reshape(-1, 1)
    step = max(1, _CACHED // max(1, rows.shape[1])) if rows.device.type == "cpu" else max(1, len(rows))
    low = torch.cat([_threshold(rows[i : i + step], wanted[i : i + step], enough) for i in range(0, len(rows), step)])
    return (logits > -torch.inf) & (depth >= low.reshape(*logits.shape[:-1], 1))


def _threshold(depth: Tensor, amount: Tensor, enough: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """The largest threshold [n, 1] whose set of ``depth`` [n, T] is enough, by halving."""
    weights = depth.exp()
    low, high = torch.full_like(amount, -_DEPTH), torch.full_like(amount, 1e-3)
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        met = enough(weights, depth >= middle, amount)
        low, high = torch.where(met, middle, low), torch.where(met, high, middle)
    return low


def _peak(logits: Tensor) -> Tensor:
    return logits.amax(-1).clamp_min(torch.finfo(logits.dtype).min)


def select(estimate: Tensor, noise: Tensor | float, exact: Tensor, p: float, share: float | None = None) -> Selection:
    """Tokens to read for each query, from estimated and exact logits [..., T].

    noise: variance of the estimate, broadcastable to it. Only candidates' ``exact`` logits are looked at. share: what
    candidates hold, at least ``p``; None: all but a fifth of what may be missing.
    """
    share = 1 - (1 - p) / 5 if share is None else share
    likely = likely_logits(estimate, noise)
    candidates = top_p(likely, share)
    if share < 1:
        # the estimate's noise made candidates look heavier than they are: admit more until the rest is light enough
        found = torch.where(candidates, exact, -torch.inf).logsumexp(-1)
        allowed = (found - _peak(likely)).exp() * (1 - share) / share
        candidates = candidates | _all_but(likely, allowed)
    # the rest is counted twice over: it is small, and what is known of it is a guess
    total = torch.where(candidates, exact, likely + _CAUTION).logsumexp(-1)
    return Selection(top_p(torch.where(candidates, exact, -torch.inf), p, total), candidates)


def likely_logits(estimate: Tensor, noise: Tensor | float) -> Tensor:
    """An upper estimate of log E[exp(logit) | estimate] for each token [..., T], the larger of two.

    If nothing is known of logits, it is estimate + noise/2: right for the few that stand out. If those of a query are
    N(m, s^2), the logit given the estimate is N(m + rho (estimate - m), rho noise), rho = s^2 / (s^2 + noise), with m
    and s^2 + noise the row's own moments: right for the bulk, where a low estimate is often bad luck.
    """
    mean = estimate.mean(-1, keepdim=True)
    variance = estimate.var(-1, keepdim=True, correction=0).clamp_min(torch.finfo(estimate.dtype).tiny)
    noise = torch.as_tensor(noise)
    rho = (1 - noise / variance).clamp(0.0, 1.0)
    return torch.maximum(mean + rho * (estimate - mean) + rho * noise / 2, estimate + noise / 2)


def mass(logits: Tensor, kept: Tensor) -> Tensor:
    """The share of softmax(``logits``) that falls on ``kept``, [...]."""
    chosen = torch.where(kept, logits, -torch.inf).logsumexp(-1)
    return (chosen - logits.logsumexp(-1)).exp()


def output_bound(missing: Tensor, values: Tensor, kept: Tensor, out: Tensor) -> Tensor:
    """An upper bound of ||o - o_kept||, [..., S]: the missing mass times the farthest value that was left out.

    o = (1 - m) o_kept + m o_rest, and o_rest is a mean of the rest. missing: [..., S]; values: [..., T, D]; kept:
    [..., S, T]; out: o_kept [..., S, D].
    """
    farthest = torch.where(kept, 0.0, scores.apart(out, values)).amax(-1).sqrt()
    return missing * farthest


def quest_scores(queries: Tensor, keys: Tensor, page: int = 16) -> Tensor:
    """Quest's upper bound of q.k in each page of ``page`` tokens, [..., S, T/page].

    https://arxiv.org/abs/2406.10774: the sum over channels of max(q * min, q * max). queries: [..., S, D]; keys:
    [..., T, D], T a multiple of ``page``.
    """
    pages = keys.unflatten(-2, (-1, page))
    low, high = pages.amin(-2), pages.amax(-2)
    return queries.clamp_min(0) @ high.mT + queries.clamp_max(0) @ low.mT
