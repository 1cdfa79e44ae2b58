"""Which widths each layer's keys and values get: measured candidates, then one allocation over the whole model.

A *candidate* of a side is a total width: the best way to spend that many bits on 32-channel stages, by expected
distortion. Its cost is counted in stored bits, gains included; its error is measured on captured text, in attention
output behind the output projection, relative to the residual stream it is added to. Errors of different layers and
sides are independent, so they add, and allocation.allocate spends the budget where the sum falls fastest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from kvtool import centring
from kvtool.allocation import allocate
from kvtool.packing import GROUP, groups
from kvtool.transform import code as chain
from kvtool.transform import fit as fitting
from kvtool.transform import reach
from kvtool.transform.code import Code
from kvtool.transform.fit import Samples, Statistics

if TYPE_CHECKING:
    from kvtool.capture import LayerSample

GAIN_BITS = 4
_TOKENS, _SAMPLES, _QUERIES = 1536, 2, 96  # what candidates are measured on
_WIDTHS = (8, 4, 3, 2, 1)


@dataclass(frozen=True)
class Candidate:
    """One way to code the keys or the values of a layer.

    kind: ``transform`` or ``rotation``. cost: bits per token and head. error: measured.
    """

    kind: str
    widths: tuple[int, ...]
    cost: int
    error: float


def max_stages(head_dim: int) -> int:
    """Stages a side may have: each coefficient can be refined once."""
    return 2 * max(1, groups(head_dim))


def candidates(
    side: str, statistics: Statistics, samples: Samples, plain: Tensor, bits: float, widest: int = _WIDTHS[0]
) -> list[Candidate]:
    """One candidate per total width, each the better of its kinds, measured on the first samples.

    widest: bits of a stage at most.
    """
    D = plain.shape[-1]
    totals = _totals(bits, D, min(8 * groups(D) + 4, widest * max_stages(D)))
    kinds = {"transform": _basis(side, statistics)}
    if side == "value":
        kinds["rotation"] = fitting.plain_basis(plain)
    chosen: dict[tuple[str, int], tuple[int, ...]] = {}
    for kind, (_, variance) in kinds.items():
        for total in totals:
            chosen[kind, total] = spend(variance, total, max_stages(D), widest)
    errors = _measure(side, statistics, samples, {k: (kinds[k[0]], w) for k, w in chosen.items()})
    best = []
    for total in totals:
        kind = min(kinds, key=lambda kind: errors[kind, total])
        widths = chosen[kind, total]
        best.append(Candidate(kind, widths, GROUP * total + GAIN_BITS * len(widths), errors[kind, total]))
    return best


def _basis(side: str, statistics: Statistics) -> tuple[Tensor, Tensor]:
    if side == "key":
        return fitting.basis(statistics.keys, statistics.queries)
    return fitting.basis(statistics.values, statistics.outputs)


def build(side: str, candidate: Candidate, statistics: Statistics, plain: Tensor, examples: Tensor) -> Code:
    """The code of a candidate."""
    turn, variance = _basis(side, statistics) if candidate.kind == "transform" else fitting.plain_basis(plain)
    return fitting.make_code(turn, variance, candidate.widths, examples)


class Priced(Protocol):
    """Anything with a cost and an error."""

    @property
    def cost(self) -> float:
        """Bits per token and head."""

    @property
    def error(self) -> float:
        """Measured."""


P = TypeVar("P", bound=Priced)


def share(options: Sequence[Sequence[P]], budget: float) -> list[P]:
    """One candidate per item, the least sum of errors within ``budget`` bits.

    Raises:
        ValueError: the cheapest candidates cost more.
    """
    longest = max(map(len, options))
    padded = [[*item, *[item[0]] * (longest - len(item))] for item in options]
    cost = torch.tensor([[float(c.cost) for c in item] for item in padded])
    error = torch.tensor([[c.error for c in item] for item in padded])
    return [item[i] for item, i in zip(padded, allocate(cost, error, budget).tolist(), strict=True)]


def _totals(bits: float, head_dim: int, most: int) -> list[int]:
    """Total widths worth measuring around an average of ``bits`` per value, up to about ``most``."""
    fair = bits * groups(head_dim)
    low, top = math.floor(fair / 3), min(math.ceil(2 * fair) + 1, most)
    step = max(1, round((top - low) / 9))
    return list(range(low, top + step, step))


def spend(variance: Tensor, total: int, stages: int, widest: int = _WIDTHS[0]) -> tuple[int, ...]:
    """The widths summing to ``total`` that leave least, a stage's gain counted at the rate bits are worth."""
    C = variance.shape[-1]

    def price(widths: tuple[int, ...]) -> float:
        left = float(chain.pick(variance, widths)[2].mean())
        return math.log(max(left, 1e-300)) + 2 * math.log(2) * GAIN_BITS * len(widths) / C

    return min(_partitions(total, stages, widest), key=price)


@lru_cache
def _partitions(total: int, parts: int, largest: int = 8) -> tuple[tuple[int, ...], ...]:
    """Non-increasing widths with the given sum, at most ``parts`` of them."""
    if total == 0:
        return ((),)
    if parts == 0:
        return ()
    return tuple(
        (width, *rest)
        for width in _WIDTHS
        if width <= min(total, largest)
        for rest in _partitions(total - width, parts - 1, width)
    )


_Key = tuple[str, int]


def _measure(
    side: str,
    statistics: Statistics,
    samples: Samples,
    wanted: dict[_Key, tuple[tuple[Tensor, Tensor], tuple[int, ...]]],
) -> dict[_Key, float]:
    """Squared error of the attention output, in units of the residual stream; of the output itself if unknown."""
    errors = dict.fromkeys(wanted, 0.0)
    power = 0.0
    codes: dict[_Key, Code] = {}
    for whole in islice(samples(), _SAMPLES):
        sample = beginning(whole, _TOKENS)
        seen = fitting.attention_of(sample, _QUERIES)
        keep = sample.positions >= centring.SINKS
        x = fitting.examples(side, sample, statistics)
        for key, ((turn, variance), widths) in wanted.items():
            if key not in codes:
                codes[key] = fitting.make_code(turn, variance, widths, x[:, keep][:, ::2])
        if seen is None:
            for key, code in codes.items():
                rest = x - chain.features(chain.encode(x, code), code) @ chain.decoder(code)
                errors[key] += float(rest[:, keep].square().mean())
            power += float(x[:, keep].square().mean())
            continue
        metric = per_query_head(sample)
        values = sample.values.float()
        if side == "key":
            exact = seen.logits.softmax(-1) @ values
            for key, code in codes.items():
                rest = chain.features(chain.encode(x, code), code) @ chain.decoder(code) - x
                rest = reach.moved(rest, sample.rope, sample.positions, statistics.far, back=True)
                # what is added to the exact logits is the error of the coded tokens alone
                found = fitting.logits(seen.queries, sample.keys.float() + rest, sample.shape)
                found = torch.where(seen.coded, found, seen.logits).softmax(-1) @ values
                errors[key] += cost_of(found - exact, metric)
            power += cost_of(exact, metric)
        else:
            exact = seen.weights @ values
            # fitted on every other query, judged on the rest
            fit, judge = slice(0, None, 2), slice(1, None, 2)
            for key, code in codes.items():
                moments = fitting.Moments(code, statistics.outputs)
                features = moments.features(values, seen.weights)
                moments.add(features[:, fit], exact[:, fit])
                found = (features / moments.units)[:, judge] @ moments.solve()
                errors[key] += 2 * cost_of(found - exact[:, judge], metric)
            power += cost_of(exact, metric)
    size = math.exp(statistics.stream) if statistics.stream is not None else power
    return {key: error / max(size, 1e-30) for key, error in errors.items()}


def beginning(sample: "LayerSample", tokens: int) -> "LayerSample":
    """The first ``tokens`` of a sample."""
    short = replace(
        sample, keys=sample.keys[:, :tokens], values=sample.values[:, :tokens], positions=sample.positions[:tokens]
    )
    if sample.queries is None or sample.query_positions is None:
        return short
    asked = sample.query_positions <= short.positions[-1]
    return replace(short, queries=sample.queries[:, asked], query_positions=sample.query_positions[asked])


def per_query_head(sample: "LayerSample") -> Tensor:
    """W_O,h^T W_O,h [HQ, D, D]; the identity if it is unknown."""
    HQ, D = sample.shape.num_heads, sample.values.shape[-1]
    return torch.eye(D).expand(HQ, D, D) if sample.output_gram is None else sample.output_gram.float()


def cost_of(error: Tensor, metric: Tensor) -> float:
    """Mean over queries of the squared error behind the output projection; ``error`` [H, G*Q, D]."""
    apart = error.unflatten(1, (len(metric) // len(error), -1)).flatten(0, 1)  # [HQ, Q, D]
    return float(torch.einsum("hqd,hde,hqe->", apart, metric, apart)) / apart.shape[1]
