"""What a layer's keys, values and attention look like: the properties that decide which method fits.

One pass over the tokens for moments, a second for attention; memory is one slice of tokens, whatever the context.
The first tokens (attention sinks) are left out of the moments: their keys are outliers of another kind.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kvtool.attention import logits
from kvtool.capture import Capture, LayerSample

SINKS = 4
SLICE = 2048  # tokens read at a time
QUERIES = 64  # per sample, evenly over the second half of the context, where attention has something to choose from
OUTLIER = 3.0  # a channel is an outlier if its RMS is this many times the median channel's


@dataclass(frozen=True)
class LayerStatistics:
    """One captured layer; a list has one entry per KV head, or per query head for entropy and sink mass.

    key_norm, value_norm: root mean square of the norm over tokens.
    key_kurtosis, value_kurtosis: E x^4 / (E x^2)^2 over tokens and channels; 3 for a Gaussian.
    mean_share_pre, mean_share_post: share of key energy in the mean over tokens, before and after RoPE.
    outlier_ratio: RMS of the largest key channel over the median channel's, before RoPE; outliers: those past 3.
    entropy: of attention, in nats, mean over the queries looked at; sink_mass: attention on the first 4 tokens.
    Both are None if the capture holds no queries.
    """

    layer: int
    kind: str
    tokens: int
    queries: int
    key_norm: list[float]
    value_norm: list[float]
    key_kurtosis: list[float]
    value_kurtosis: list[float]
    mean_share_pre: list[float]
    mean_share_post: list[float]
    outlier_ratio: list[float]
    outliers: list[list[int]]
    entropy: list[float] | None
    sink_mass: list[float] | None

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of ``kvtool inspect --json``."""
        return asdict(self)


def layer_statistics(capture: Capture, layer: int) -> LayerStatistics:
    """The statistics of one captured layer, over all samples."""
    keys, pre, values = _Moments(), _Moments(), _Moments()
    for sample in _slices(capture, layer):
        beyond = sample.positions >= SINKS
        keys.add(sample.keys[:, beyond])
        pre.add(sample.pre_rope_keys()[:, beyond])
        values.add(sample.values[:, beyond])
    attention = _attention(capture, layer)
    rms = pre.channel_rms()  # [H, D]
    ratio = rms / rms.median(-1, keepdim=True).values
    return LayerStatistics(
        layer=layer,
        kind=str(capture.shape.layers[layer].kind),
        tokens=keys.count,
        queries=attention.count if attention else 0,
        key_norm=keys.norm(),
        value_norm=values.norm(),
        key_kurtosis=keys.kurtosis(),
        value_kurtosis=values.kurtosis(),
        mean_share_pre=pre.mean_share(),
        mean_share_post=keys.mean_share(),
        outlier_ratio=ratio.amax(-1).tolist(),
        outliers=[(head > OUTLIER).nonzero()[:, 0].tolist() for head in ratio],
        entropy=attention.entropy if attention else None,
        sink_mass=attention.sink_mass if attention else None,
    )


class _Moments:
    """Sums over tokens of the powers that the statistics need, per head and channel, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.first = self.second = self.fourth = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """``x`` [H, T, D]."""
        x = x.double()
        self.count += x.shape[1]
        self.first = self.first + x.sum(1)  # [H, D]
        self.second = self.second + x.square().sum(1)
        self.fourth = self.fourth + x.pow(4).sum(1)

    def norm(self) -> list[float]:
        return _floats((self.second.sum(-1) / max(self.count, 1)).sqrt())

    def kurtosis(self) -> list[float]:
        D = self.second.shape[-1]
        return _floats(self.fourth.sum(-1) * self.count * D / self.second.sum(-1).square())

    def mean_share(self) -> list[float]:
        return _floats((self.first / max(self.count, 1)).square().sum(-1) * self.count / self.second.sum(-1))

    def channel_rms(self) -> Tensor:
        return (self.second / max(self.count, 1)).sqrt()


def _floats(x: Tensor) -> list[float]:
    return [float(value) for value in x.nan_to_num(nan=0.0)]


def _slices(capture: Capture, layer: int) -> Iterator[LayerSample]:
    for start in range(0, capture.manifest.context, SLICE):
        yield from capture.samples(layer, tokens=slice(start, min(start + SLICE, capture.manifest.context)))


@dataclass(frozen=True)
class _Attention:
    count: int
    entropy: list[float]
    sink_mass: list[float]


def _attention(capture: Capture, layer: int) -> _Attention | None:
    """Entropy and sink mass of the chosen queries; None if none were captured."""
    chosen = _chosen_queries(capture, layer)
    if not chosen:
        return None
    states = {sample: _Softmax(queries, positions) for sample, (queries, positions) in chosen.items()}
    for part in _slices(capture, layer):
        states[part.sample].add(part)
    entropy = torch.cat([state.entropy() for state in states.values()], -1)  # [HQ, S]
    sink_mass = torch.cat([state.sink_mass() for state in states.values()], -1)
    return _Attention(entropy.shape[-1], _floats(entropy.mean(-1)), _floats(sink_mass.mean(-1)))


def _chosen_queries(capture: Capture, layer: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Up to QUERIES captured queries [HQ, S, D] of each sample, and a few for rounding, with their positions [S]."""
    half, end = capture.manifest.context // 2, capture.manifest.context
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for start in range(half, end, SLICE):
        stop = min(start + SLICE, end)
        share = -(-QUERIES * (stop - start) // (end - half))
        for part in capture.samples(layer, tokens=slice(start, stop)):
            if part.queries is None or part.query_positions is None or not part.query_positions.numel():
                continue
            captured = part.query_positions.numel()
            pick = torch.linspace(0, captured - 1, min(share, captured)).round().long()
            found.setdefault(part.sample, []).append((part.queries[:, pick].float(), part.query_positions[pick]))
    return {
        sample: (torch.cat([queries for queries, _ in parts], 1), torch.cat([at for _, at in parts]))
        for sample, parts in found.items()
    }


class _Softmax:
    """Softmax over keys that come slice by slice: running maximum, sum, and sum of weight times logit."""

    def __init__(self, queries: Tensor, positions: Tensor) -> None:
        self.queries, self.positions = queries, positions
        HQ, S, _ = queries.shape
        self.top = torch.full((HQ, S), -torch.inf)
        self.total = torch.zeros(HQ, S)
        self.weighted = torch.zeros(HQ, S)
        self.sinks = torch.zeros(HQ, S)

    def add(self, part: LayerSample) -> None:
        """The keys of one slice of tokens."""
        shape = part.shape
        scores = logits(self.queries[None], part.keys[None].float(), scale=shape.scale, softcap=shape.softcap)
        scores = scores.flatten(1, 2)[0]  # [HQ, S, T]
        age = self.positions[:, None] - part.positions  # [S, T]
        hidden = (age < 0) | (age >= shape.window) if shape.window else age < 0
        scores = scores.masked_fill(hidden, -torch.inf)
        top = torch.maximum(self.top, scores.amax(-1))
        safe = top.nan_to_num(neginf=0.0)  # nothing visible yet
        shrink = (self.top - safe).exp()
        weights = (scores - safe[..., None]).exp()
        self.total = self.total * shrink + weights.sum(-1)
        self.weighted = self.weighted * shrink + (weights * scores.masked_fill(hidden, 0.0)).sum(-1)
        self.sinks = self.sinks * shrink + weights[..., part.positions < SINKS].sum(-1)
        self.top = top

    def entropy(self) -> Tensor:
        """In nats, [HQ, S]: log-sum-exp minus the mean logit."""
        return self.top + self.total.log() - self.weighted / self.total

    def sink_mass(self) -> Tensor:
        """Attention on the first tokens, [HQ, S]."""
        return self.sinks / self.total
