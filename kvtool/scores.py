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
from kvtool.shapes import LayerShape, Rope


class Observed(NamedTuple):
    """What some queries saw.

    weights: softmax weights [B, H, G, W, T] over the scored tokens; they sum to less than 1 if more was attended.
    out: attention output over everything, [B, H, G, W, D].
    votes: [T], how many of the W queries come after each token.
    """

    weights: Tensor
    out: Tensor
    votes: Tensor


def observe(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rest: Attended | None,
    *,
    scale: float,
    softcap: float | None = None,
    ago: Tensor | None = None,
) -> Observed:
    """Attention of ``queries`` [B, HQ, W, D] over ``keys``, ``values`` [B, H, T, D] and the ``rest`` of the cache.

    ago: how many of the T tokens, counted from the last, each query comes before, [W]; None: every query sees all.
    """
    B, HQ, W, D = queries.shape
    H, T = keys.shape[1:3]
    scores = attention.logits(queries, keys, scale=scale, softcap=softcap)  # [B, H, G, W, T]
    votes = torch.full((T,), float(W), device=keys.device)
    if ago is not None and bool((ago > 0).any()):
        hidden = torch.arange(T, device=keys.device) >= T - ago[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
        votes = votes - hidden.sum(0)
    lse = scores.logsumexp(-1)
    if rest is not None:
        lse = torch.logaddexp(lse, rest.lse.reshape(B, H, HQ // H, W))
    weights = (scores - lse[..., None]).exp().nan_to_num_(nan=0.0)
    out = weights @ values[:, :, None].to(weights.dtype)
    if rest is not None:
        share = (rest.lse.reshape(B, H, HQ // H, W) - lse).exp().nan_to_num(nan=0.0)
        out = out + share[..., None] * rest.out.reshape(B, H, HQ // H, W, D).to(out.dtype)
    return Observed(weights, out, votes)


class Known(NamedTuple):
    """What was seen of the tokens that stay exact, before the others are compressed; the carry between runs.

    left: [B] of their budget that earlier runs did not spend. recent: newer tokens [B] that stay exact.
    out, lse: attention of the queries looked at over the exact tokens, [B, HQ, W, D] and [B, HQ, W]; empty without.
    """

    left: Tensor
    recent: Tensor
    out: Tensor
    lse: Tensor


def nothing_seen(left: Tensor, recent: Tensor | None = None) -> Known:
    """No queries yet; ``recent`` tokens stay exact, or it is not known how many."""
    nothing = left.new_zeros(len(left), 0)
    return Known(left, torch.zeros_like(left) if recent is None else recent, nothing, nothing)


def begin(
    queries: Tensor | None,
    keys: Tensor,
    values: Tensor,
    shape: LayerShape,
    *,
    sinks: int,
    carry: Known | None,
    ago: Tensor | None = None,
) -> Known:
    """What ``Method.begin`` says of the tokens that stay exact, to ``queries`` as :func:`around` has them."""
    left = torch.zeros(len(keys), device=keys.device) if carry is None else carry.left
    recent = torch.full_like(left, keys.shape[2] - sinks)
    if queries is None:
        return nothing_seen(left, recent)
    rest = around(queries, keys, values, shape, sinks=sinks, ago=ago)
    return Known(left, recent, rest.out, rest.lse)


def around(
    queries: Tensor, keys: Tensor, values: Tensor, shape: LayerShape, *, sinks: int, ago: Tensor | None = None
) -> Attended:
    """Attention of ``queries`` over what stays exact: ``sinks`` first tokens and the newest N ones, causally.

    ago: how many tokens came after each query, [W]; None: they are the last W.
    """
    W, N = queries.shape[2], keys.shape[2] - sinks
    ago = torch.arange(W - 1, -1, -1, device=keys.device) if ago is None else ago
    scores = attention.logits(queries, keys, scale=shape.scale, softcap=shape.softcap)  # [B, H, G, W, sinks + N]
    hidden = torch.arange(-sinks, N, device=keys.device) >= (N - ago[:, None]).clamp(min=0)
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num_(nan=0.0)
    return Attended((weights @ values[:, :, None].to(weights.dtype)).flatten(1, 2), lse.flatten(1, 2))


def expect(
    queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, rope: Rope | None, end: int, ahead: int = 512
) -> Observed:
    """What queries at the next ``ahead`` positions would see if they were Gaussian with the moments of ``queries``.

    E exp(s q.k) = exp(s mu.k + s^2 k^T Sigma k / 2), moments taken before rotary embedding and turned by its average
    over those positions, as kvpress 0.5.5 does. queries: the last ones before position ``end``. One vote per token.
    """
    B, HQ, S, D = queries.shape
    H = keys.shape[1]
    x = queries.float()
    turn = torch.eye(D, device=x.device)
    if rope is not None:
        x = rope.unrotate(x, torch.arange(end - S, end, device=x.device))
        turn = rope.rotate(turn[:, None].expand(D, ahead, D), torch.arange(end, end + ahead, device=x.device)).mean(1)
    mean = x.mean(2, keepdim=True)
    centred = x - mean
    mu = (mean @ turn).reshape(B, H, HQ // H, D)
    sigma = turn.mT @ (centred.mT @ centred / S).reshape(B, H, HQ // H, D, D) @ turn
    k = keys.float()[:, :, None]  # [B, H, 1, T, D]
    logits = scale * (k @ mu[..., None]).squeeze(-1) + scale**2 / 2 * ((k @ sigma) * k).sum(-1)
    weights = logits.softmax(-1)[..., None, :]  # [B, H, G, 1, T]
    return Observed(weights, weights @ values.float()[:, :, None], weights.new_ones(weights.shape[-1]))


def mass(seen: Observed) -> Tensor:
    """Mean attention weight over the queries that come after a token, [B, H, T]."""
    return seen.weights.sum(3).mean(2) / seen.votes.clamp(min=1)


def second_order(seen: Observed, values: Tensor, importance: Tensor, *, evicted: bool) -> Tensor:
    """Mean importance * p^2 ||v - o||^2, [B, H, T]; with p / (1 - p) if the token is ``evicted``.

    importance: [HQ], what a squared error of each query head's output is worth.
    """
    H, G = seen.weights.shape[1:3]
    p = seen.weights / (1 - seen.weights).clamp(min=1e-3) if evicted else seen.weights
    worth = importance.reshape(1, H, G, 1, 1)
    return (worth * p.pow(2) * apart(seen.out, values[:, :, None].to(p.dtype))).sum(3).mean(2) / seen.votes.clamp(min=1)


def apart(out: Tensor, values: Tensor) -> Tensor:
    """||v - o||^2 of outputs [..., W, D] and values [..., T, D], [..., W, T]."""
    return (values.pow(2).sum(-1)[..., None, :] - 2 * out @ values.mT + out.pow(2).sum(-1, keepdim=True)).clamp(min=0)


def smooth(scores: Tensor, kernel: int) -> Tensor:
    """Average over ``kernel`` neighbouring tokens: what surrounds an attended token is read with it."""
    T = scores.shape[-1]
    pad = min(kernel // 2, T - 1)
    if pad == 0:
        return scores
    flat = F.pad(scores.reshape(1, -1, T), (pad, pad), mode="reflect")
    return F.avg_pool1d(flat, 2 * pad + 1, 1).reshape(scores.shape)
