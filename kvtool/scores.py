"""How much a token matters: scores [B, H, T] from the attention of the last queries of a prompt.

Symbols: p_t = softmax weight of token t for one query, o = sum_t p_t v_t, W queries in the observation window.

    mass          mean p_t, the vote of SnapKV (arXiv 2404.14469) and of RDKV (arXiv 2605.08317)
    second_order  mean p_t^2 ||v_t - o||^2: the error of the attention output per unit of independent noise on the
                  logit of token t; with p_t / (1 - p_t) for p_t it is exactly what evicting t and renormalising costs
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool import attention
from kvtool.attention import Attended
from kvtool.shapes import LayerShape


class Observed(NamedTuple):
    """What the last queries saw.

    weights: softmax weights [B, H, G, W, T] over the scored tokens; they sum to less than 1 if more was attended.
    out: attention output over everything, [B, H, G, W, D].
    """

    weights: Tensor
    out: Tensor


def observe(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rest: Attended | None,
    *,
    scale: float,
    softcap: float | None = None,
) -> Observed:
    """Attention of ``queries`` [B, HQ, W, D] over ``keys``, ``values`` [B, H, T, D] and the ``rest`` of the cache."""
    B, HQ, W, D = queries.shape
    H = keys.shape[1]
    scores = attention.logits(queries, keys, scale=scale, softcap=softcap)  # [B, H, G, W, T]
    lse = scores.logsumexp(-1)
    if rest is not None:
        lse = torch.logaddexp(lse, rest.lse.reshape(B, H, HQ // H, W))
    weights = (scores - lse[..., None]).exp()
    out = weights @ values[:, :, None].to(weights.dtype)
    if rest is not None:
        share = (rest.lse.reshape(B, H, HQ // H, W) - lse).exp()
        out = out + share[..., None] * rest.out.reshape(B, H, HQ // H, W, D).to(out.dtype)
    return Observed(weights, out)


def around(queries: Tensor, keys: Tensor, values: Tensor, shape: LayerShape, *, sinks: int) -> Attended:
    """Attention of the last ``queries`` over what stays exact: ``sinks`` first tokens and the newest ones, causally."""
    scale, softcap = shape.scale, shape.softcap
    first = attention.attend(queries, keys[:, :, :sinks], values[:, :, :sinks], scale=scale, softcap=softcap)
    newest = attention.attend(
        queries, keys[:, :, sinks:], values[:, :, sinks:], scale=scale, softcap=softcap, causal=True
    )
    return attention.merge(first, newest)


def mass(seen: Observed) -> Tensor:
    """Mean attention weight, [B, H, T]."""
    return seen.weights.mean((2, 3))


def second_order(seen: Observed, values: Tensor, importance: Tensor, *, evicted: bool) -> Tensor:
    """Mean importance * p^2 ||v - o||^2, [B, H, T]; with p / (1 - p) if the token is ``evicted``.

    importance: [HQ], what a squared error of each query head's output is worth.
    """
    H, G = seen.weights.shape[1:3]
    values = values[:, :, None].to(seen.weights.dtype)
    apart = values.pow(2).sum(-1)[..., None, :] - 2 * seen.out @ values.mT + seen.out.pow(2).sum(-1, keepdim=True)
    p = seen.weights / (1 - seen.weights).clamp(min=1e-3) if evicted else seen.weights
    worth = importance.reshape(1, H, G, 1, 1)
    return (worth * p.pow(2) * apart.clamp(min=0)).mean((2, 3))


def smooth(scores: Tensor, kernel: int) -> Tensor:
    """Average over ``kernel`` neighbouring tokens: what surrounds an attended token is read with it."""
    T = scores.shape[-1]
    pad = min(kernel // 2, T - 1)
    if pad == 0:
        return scores
    flat = F.pad(scores.reshape(1, -1, T), (pad, pad), mode="reflect")
    return F.avg_pool1d(flat, 2 * pad + 1, 1).reshape(scores.shape)
