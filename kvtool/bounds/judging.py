"""From what the rotations of a head have shown to a verdict.

Pairs are not independent: rotations are, and keys nearly. The standard error of a rate is that of two-way clusters
(rotations, keys, less their cells), and the Clopper-Pearson limit is taken for as many independent pairs as give the
same standard error. Bias and variance are judged by Student's t over rotations, at a level shared among all heads.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from kvtool.bounds import theory
from kvtool.bounds.pairs import BINS, RANGE, Fixed, HeadPairs, Tally
from kvtool.bounds.statistics import clopper_pearson, effective_cases

QUANTILES = (0.5, 0.9, 0.99, 0.999)


@dataclass(frozen=True)
class Rate:
    """How often the bound failed for some keys of a head, beside what theory says for just these pairs."""

    keys: int
    pairs: int  # over all rotations
    violations: int
    rate: float
    predicted: float
    standard_error: float
    effective: float  # independent pairs worth as much
    limit: float  # upper, Clopper-Pearson
    lower: float  # at the level that all tests of a run share


@dataclass(frozen=True)
class HeadResult:
    """One KV head at one width.

    bias: slope of the estimate against the truth, less 1. offset: mean error, in cosines. variance: of the error over
    what the law says. Each with its standard error over rotations. tightness: quantiles of |error| / bound, the last
    the largest. epsilon: the smallest that holds for 1 - delta of the pairs. cosine: mean <obar, o>. logit_rms,
    logit_law: error of the logit in nats, measured and by the law.
    """

    layer: int
    head: int
    bits: int
    bulk: Rate
    sinks: Rate | None
    massive: Rate | None
    bias: float
    bias_error: float
    offset: float
    offset_error: float
    variance: float
    variance_error: float
    tightness: tuple[float, ...]
    epsilon: float
    cosine: float
    logit_rms: float
    logit_law: float
    failures: tuple[str, ...]
    attention: dict[str, float]

    @property
    def holds(self) -> bool:
        """No claim is refuted."""
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """The record of ``--json`` and of the certificate, floats to six digits."""
        return {**_rounded(asdict(self)), "holds": self.holds}


def judge(
    tallies: Sequence[Tally],
    parts: Sequence[tuple[HeadPairs, Fixed]],
    *,
    layer: int,
    head: int,
    bits: int,
    epsilon: float,
    delta: float,
    confidence: float,
    comparisons: int,
    attention: dict[str, float],
) -> HeadResult:
    """The result of one head over all texts. ``comparisons``: tests of a run, which share the level of refutation."""
    hits = torch.cat([torch.stack(tally.hits) for tally in tallies], 1)  # [R, T]
    special = torch.cat([pair.special for pair, _ in parts])
    queries = len(parts[0][0].queries)
    P = parts[0][1].keys.shape[1]
    predicted = torch.cat([_predicted(fixed, epsilon, P) for _, fixed in parts])
    shared = 1 - (1 - confidence) / comparisons
    rates = [
        _rate(hits[:, special == kind] / queries, predicted[special == kind], queries, confidence, shared)
        for kind in range(3)
    ]
    bulk = rates[0]
    assert bulk is not None
    weights = [len(pair.keys) for pair, _ in parts]
    per_rotation = {
        name: _average([getattr(tally, name) for tally in tallies], weights)
        for name in ("slope", "mean", "square", "logit", "logit_law", "cosine")
    }
    means = {name: float(values.mean()) for name, values in per_rotation.items()}
    errors = {name: float(values.std() / len(values) ** 0.5) for name, values in per_rotation.items()}
    rotations = len(hits)
    level = float(stats.t.ppf((1 + shared) / 2, rotations - 1))
    failures = []
    if bulk.limit > delta:
        # the limit of a true bound may lie above delta by chance; that is no certificate either
        undecided = "" if bulk.lower > delta else f", at a rate of {bulk.rate:.4f}: more --rotations would decide"
        failures.append(f"rate limit {bulk.limit:.4f} > {delta:.4f}{undecided}")
    for name, rate in (("sinks", rates[1]), ("massive", rates[2])):
        if rate is not None and rate.lower > delta:
            failures.append(f"{name} rate {rate.rate:.4f} > {delta:.4f}")
    for name, what, law in (("slope", "bias", 0.0), ("mean", "offset", 0.0), ("square", "variance", 1.0)):
        if abs(means[name] - law) > level * errors[name] + _FLOAT:
            failures.append(
                f"{what} {means[name]:+.4f} is {abs(means[name] - law) / errors[name]:.0f} standard errors off"
            )
    histogram = sum((tally.histogram for tally in tallies), torch.zeros(BINS, dtype=torch.float64))
    largest = max(tally.largest for tally in tallies)
    return HeadResult(
        layer=layer,
        head=head,
        bits=bits,
        bulk=bulk,
        sinks=rates[1],
        massive=rates[2],
        bias=means["slope"],
        bias_error=errors["slope"],
        offset=means["mean"],
        offset_error=errors["mean"],
        variance=means["square"],
        variance_error=errors["square"],
        tightness=(*(_quantile(histogram, q) / epsilon for q in QUANTILES), largest / epsilon),
        epsilon=_quantile(histogram, 1 - delta),
        cosine=means["cosine"],
        logit_rms=means["logit"] ** 0.5,
        logit_law=means["logit_law"] ** 0.5,
        failures=tuple(failures),
        attention=attention,
    )


# of float32 sums: a bias or variance this close to the law is the law
_FLOAT = 1e-5


def _predicted(fixed: Fixed, epsilon: float, dim: int) -> Tensor:
    """The exact probability of each key's pairs, averaged over its queries, [T] float64."""
    # the law is smooth in c^2: a table of 4096 steps is exact to 1e-6
    table = torch.from_numpy(theory.violation(epsilon, torch.linspace(0, 1, 4097).sqrt().numpy(), dim))
    found = torch.empty(len(fixed.keys), dtype=torch.float64)
    for i in range(0, len(fixed.keys), 1024):
        cosines = (fixed.queries @ fixed.keys[i : i + 1024].T).square().clamp_(0, 1)
        found[i : i + 1024] = table[(cosines * 4096).round().long()].mean(0)
    return found


def _rate(rates: Tensor, predicted: Tensor, queries: int, confidence: float, shared: float) -> Rate | None:
    """``rates`` [R, T]: of each key in each rotation."""
    R, T = rates.shape
    if not T:
        return None
    rate = float(rates.mean())
    error = two_way_error(rates)
    pairs = R * T * queries
    # with no violation at all, each rotation of each key is one case
    effective = effective_cases(rate, error, pairs if rate else R * T)
    return Rate(
        keys=T,
        pairs=pairs,
        violations=round(float(rates.sum()) * queries),
        rate=rate,
        predicted=float(predicted.mean()),
        standard_error=error,
        effective=effective,
        limit=clopper_pearson(rate, effective, confidence),
        lower=clopper_pearson(rate, effective, shared, upper=False),
    )


def two_way_error(rates: Tensor) -> float:
    """Standard error of the mean of ``rates`` [R, T], rotations and keys both being drawn (two-way clusters)."""
    R, T = rates.shape
    by_rotation = float(rates.mean(1).var()) / R if R > 1 else 0.0
    by_key = float(rates.mean(0).var()) / T if T > 1 else 0.0
    cells = float(rates.var()) / (R * T) if R * T > 1 else 0.0
    return float(max(by_rotation + by_key - cells, by_rotation, by_key) ** 0.5)


def _average(series: Sequence[Sequence[float]], weights: Sequence[int]) -> Tensor:
    """Texts averaged, [R] float64."""
    stacked = torch.tensor(series, dtype=torch.float64)
    share = torch.tensor(weights, dtype=torch.float64)
    return (stacked * (share / share.sum())[:, None]).sum(0)


def _quantile(histogram: Tensor, q: float) -> float:
    """Of |e|, to the upper edge of its bin."""
    reached = histogram.cumsum(0) >= q * histogram.sum()
    return float((int(reached.float().argmax()) + 1) * RANGE / BINS)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
