"""How far the next-token distributions of a compressed cache drift from the full cache's, token by token.

Symbols: P is the full cache's distribution, Q the compressed one's, x the token that really follows.
``kld`` = sum P ln(P/Q) in nats; ``ln ratio`` = ln P(x) - ln Q(x), so that PPL(Q)/PPL(P) = exp(mean ln ratio);
``dp`` = Q(x) - P(x). Errors are standard errors over segments: tokens of one segment share its cache and are not
independent. The layout of the figures is llama.cpp's ``perplexity --kl-divergence``.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 64  # tokens compared at a time
BUCKETS = 4


class TokenScores(NamedTuple):
    """One number per scored token, float64 [S] on the CPU.

    kld: KL(P || Q), nats. nll, nll_full: -ln Q(x), -ln P(x). dp: Q(x) - P(x). same_top: 1 where the argmax agrees.
    """

    kld: Tensor
    nll: Tensor
    nll_full: Tensor
    dp: Tensor
    same_top: Tensor


class Estimate(NamedTuple):
    """A mean and its standard error; the error is NaN when a single segment leaves it unknown."""

    mean: float
    error: float


class Drift(NamedTuple):
    """The figures of one contestant. Estimates carry errors over segments; percentiles are over tokens."""

    ppl: float
    ppl_full: float
    ppl_ratio: Estimate
    kld: Estimate
    kld_token_error: float  # standard error if tokens were independent; the larger of the two is the honest one
    kld_median: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    same_top: Estimate
    rms_dp: float
    positions: list[tuple[int, int, Estimate]]  # first and last+1 scored position, kld


def compare(full: Tensor, found: Tensor, targets: Tensor) -> TokenScores:
    """Scores of ``found`` logits [S, V] against ``full`` logits [S, V]; ``targets`` [S] are the tokens that follow."""
    parts = [
        _compare(full[i : i + ROWS], found[i : i + ROWS], targets[i : i + ROWS]) for i in range(0, len(targets), ROWS)
    ]
    return join(parts)


def join(parts: Sequence[TokenScores]) -> TokenScores:
    """Scores of successive chunks as one."""
    return TokenScores(*(torch.cat(field) for field in zip(*parts, strict=True)))


def drift(segments: Sequence[TokenScores], first_position: int) -> Drift:
    """The figures over ``segments`` of equal length; the first scored token stands at ``first_position``."""
    stacked = TokenScores(*(torch.stack(field) for field in zip(*segments, strict=True)))  # [segments, S]
    kld, everything = stacked.kld, stacked.kld.flatten()
    log_ratio = estimate(stacked.nll - stacked.nll_full)
    ratio = math.exp(log_ratio.mean)
    S = kld.shape[1]
    edges = sorted({round(i * S / BUCKETS) for i in range(BUCKETS + 1)})
    quantiles = [_quantile(everything, q) for q in (0.5, 0.99, 0.999)]
    return Drift(
        ppl=stacked.nll.mean().exp().item(),
        ppl_full=stacked.nll_full.mean().exp().item(),
        ppl_ratio=Estimate(ratio, ratio * log_ratio.error),
        kld=estimate(kld),
        kld_token_error=_standard_error(everything),
        kld_median=quantiles[0],
        kld_p99=quantiles[1],
        kld_p999=quantiles[2],
        kld_max=everything.max().item(),
        same_top=estimate(stacked.same_top),
        rms_dp=stacked.dp.square().mean().sqrt().item(),
        positions=[(first_position + a, first_position + b, estimate(kld[:, a:b])) for a, b in pairwise(edges)],
    )


def estimate(per_token: Tensor) -> Estimate:
    """The mean of ``per_token`` [segments, S] and its standard error, one observation a segment."""
    return Estimate(per_token.mean().item(), _standard_error(per_token.mean(1)))


def _standard_error(observations: Tensor) -> float:
    n = observations.numel()
    return (observations.std() / math.sqrt(n)).item() if n > 1 else math.nan


def _quantile(values: Tensor, q: float) -> float:
    # the smallest value that at least a share q of the tokens does not exceed; torch.quantile refuses above 2^24 values
    ordered = values.sort().values
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)].item()


def _compare(full: Tensor, found: Tensor, targets: Tensor) -> TokenScores:
    full, found = full.float(), found.float()
    at = targets[:, None].to(full.device)
    lse_p, lse_q = full.logsumexp(-1), found.logsumexp(-1)
    log_p, log_q = full.gather(-1, at)[:, 0] - lse_p, found.gather(-1, at)[:, 0] - lse_q
    scores = TokenScores(
        kld=_divergence(full, found, lse_p),
        nll=-log_q,
        nll_full=-log_p,
        dp=log_q.exp() - log_p.exp(),
        same_top=full.argmax(-1) == found.argmax(-1),
    )
    return TokenScores(*(field.double().cpu() for field in scores))


def _divergence(full: Tensor, found: Tensor, lse_p: Tensor) -> Tensor:
    """KL(P || Q) [S] = ln E_P[exp(-d)], d the difference of logits less its mean under P.

    The definition loses 1e-6 nats to float32, as much as 8-bit caches drift; centred, it loses 1e-7 of the difference.
    """
    p = (full - lse_p[:, None]).exp_()
    d = full - found
    d -= (p * d).sum(-1, keepdim=True, dtype=torch.float64).float()
    kld = (p * torch.expm1(-d)).sum(-1, dtype=torch.float64).log1p()
    # where Q is large and P vanishes, or a token is forbidden with -inf, only the definition in float64 holds
    wild = ~(d.abs().amax(-1) < 30)
    if wild.any():
        log_p, log_q = full[wild].double().log_softmax(-1), found[wild].double().log_softmax(-1)
        weights = log_p.exp()
        kld[wild] = (weights * (log_p - log_q)).masked_fill_(weights == 0, 0).sum(-1)
    return kld
