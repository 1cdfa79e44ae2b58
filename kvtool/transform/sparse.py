"""Fit ``transform`` below 1.25 bits: which levels a layer's tokens may have, at what rate, and what a token is worth.

A capture knows the future, so prompts that end in the midst of it are cut off there, and the queries that follow judge:

1. worth.py learns from them to tell what tokens will be worth W, with second-order weights w = p^2 |v - o|^2.
2. The distortion of a key or value at each total width is measured in the same units,
   eps_K = sum w (q . dk)^2 scale^2 / sum w  and  eps_V = sum p^2 |dv|^2 / sum w; they add.
3. For each of several rates, and each price of eviction in units of W, the three levels are those with which reverse
   water-filling over the pages of the prompts leaves least; the attention output that results is measured behind W_O,
   relative to the residual stream, and the best price stays.
4. One allocation over the layers gives each of them its rate.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvtool import centring, scores
from kvtool.allocation import allocate, lower_hull
from kvtool.errors import CaptureError
from kvtool.methods.base import LayerCalibration, Progress
from kvtool.packing import GROUP, PAGE
from kvtool.rdkv.fit import importance as importance_of
from kvtool.rdkv.fit import thin
from kvtool.rdkv.spending import in_order, page_sums
from kvtool.shapes import CacheShape
from kvtool.transform import code as chain
from kvtool.transform import fit as fitting
from kvtool.transform import ladder, waterfill, worth
from kvtool.transform.fit import Samples, Statistics

if TYPE_CHECKING:
    from kvtool.capture import Capture, LayerSample
    from kvtool.methods.transform import Transform

CUTS, AHEAD, ASKED = 4, 512, 64  # prompts per sample, tokens after each that ask, and how many of them do
RATES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 4.0, 6.0)  # times the average
PRICES = (16.0, 64.0)  # of eviction
_SAMPLES, _TOKENS = 2, 5120
_TOTALS = (1, 2, 3, 4, 5, 6, 8, 10, 12)  # widths of a side, summed
_EVEN = RATES.index(1.0)
_POINTS = 10  # of the hull that levels are chosen from


@dataclass(frozen=True)
class Choice:
    """One way to spend ``cost`` bits per token and head on a layer, ``rate`` times the average.

    price: of eviction. widths: of keys and values at each level. distortion: of each level, eviction first.
    """

    rate: float
    cost: float
    error: float
    price: float
    widths: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    distortion: tuple[float, ...]


class Scene(NamedTuple):
    """A prompt that was cut off: x [H, N, F] of its tokens after the sinks, what they were worth, and to whom."""

    sample: "LayerSample"
    cut: int
    x: Tensor
    worth: Tensor
    seen: worth.Future


class Point(NamedTuple):
    """A level that might be: widths of keys and values, bits a token, distortion."""

    widths: tuple[tuple[int, ...], tuple[int, ...]]
    cost: float
    distortion: float


@dataclass(frozen=True)
class Layer:
    """What is known of a layer before its rate: everything small."""

    statistics: Statistics
    importance: Tensor
    weights: Tensor
    kind: str
    choices: tuple[Choice, ...]


def fit(method: "Transform", capture: "Capture", progress: Progress | None = None) -> dict[str, Tensor]:
    """The tensors of the schema that ``transform`` has below 1.25 bits.

    Raises:
        CaptureError: not all queries were captured, or too little text.
        MethodOptionError: fewer bits than the levels of evicted tokens take.
    """
    layers, plain = {}, {}
    for done, i in enumerate(capture.layers):
        plain[i] = method.plain(capture.shape.layers[i], i)
        layers[i] = study(partial(capture.samples, i), plain[i], method.bits)
        if progress:
            progress(2 * done + 1, 2 * len(capture.layers))
    made: dict[str, Tensor] = {}
    chosen = share(method, capture.shape, {i: layer.choices for i, layer in layers.items()})
    for done, i in enumerate(capture.layers):
        fields = tensors(chosen[i], layers[i], plain[i], partial(capture.samples, i))
        made |= {f"layers.{i}.{field}": tensor for field, tensor in fields.items()}
        if progress:
            progress(len(capture.layers) + done + 1, 2 * len(capture.layers))
    return made


def share(method: "Transform", shape: CacheShape, options: Mapping[int, Sequence[Choice]]) -> dict[int, Choice]:
    """What each layer gets within the budget of its scope."""
    if method.scope == "layer":
        return {i: next(c for c in own if c.rate == 1.0) for i, own in options.items()}
    budget = sum(method.bits * 2 * shape.layers[i].head_dim for i in options)
    return dict(zip(options, waterfill.share(list(options.values()), budget), strict=True))


def study(samples: Samples, plain: dict[str, Tensor], bits: float) -> Layer:
    """Everything that is measured of a layer; see 1 to 3 above."""
    statistics = fitting.statistics(samples)
    some = list(islice(samples(), _SAMPLES))
    for sample in some:
        if sample.queries is None or sample.queries.shape[1] != sample.keys.shape[1]:
            raise CaptureError(
                "transform below 1.25 bits learns from queries what a token is worth, but this capture does not have "
                "all of them; capture with --queries all"
            )
    importance = importance_of(some, some[0].shape)
    scenes = [scene for sample in some for scene in _scenes(sample, importance)]
    if not scenes:
        raise CaptureError(
            f"transform below 1.25 bits needs samples of {CUTS * PAGE} tokens to learn what a token is worth, found "
            f"{some[0].keys.shape[1]}; capture a longer --context"
        )
    # of each sample one, of middling length, judges; by a regression that has not seen it
    each = len(scenes) // len(some)
    judged = scenes[each // 2 :: each]
    others = [scene for i, scene in enumerate(scenes) if i % each != each // 2] or scenes
    points, kind = _points(judged, statistics, plain)
    choices = _choices(judged, points, statistics, kind, plain, _regress(others), bits)
    return Layer(statistics, importance, _regress(scenes), kind, choices)


def _regress(scenes: Sequence[Scene]) -> Tensor:
    return worth.regress(torch.cat([s.x for s in scenes], 1), torch.cat([s.worth for s in scenes], 1))


def _scenes(sample: "LayerSample", importance: Tensor) -> list[Scene]:
    T = min(sample.keys.shape[1], _TOKENS)
    ahead = min(AHEAD, T // 3)
    layer = LayerCalibration(sample.layer, sample.shape, sample.rope, {})
    found = []
    for j in range(CUTS):
        cut = (T - ahead) * (j + 1) // CUTS
        if cut < centring.SINKS + PAGE:
            continue
        assert sample.queries is not None
        first = slice(centring.SINKS, cut)
        keys, values, queries = (
            x[None].float() for x in (sample.keys[:, :cut], sample.values[:, :cut], sample.queries[:, :cut])
        )
        sinks = slice(0, centring.SINKS)
        known = worth.begin(queries, keys[:, :, sinks], values[:, :, sinks], layer, sinks=centring.SINKS, carry=None)
        x = worth.features(
            queries, keys[:, :, first], values[:, :, first], layer, importance, known, positions=sample.positions[first]
        )[0]
        seen = worth.future(sample, cut, ahead, ASKED)
        own = seen._replace(weights=seen.weights[..., centring.SINKS :])
        found.append(Scene(sample, cut, x, worth.turned_out(own, values[0, :, first].contiguous(), importance), seen))
    return found


def _points(scenes: Sequence[Scene], statistics: Statistics, plain: dict[str, Tensor]) -> tuple[list[Point], str]:
    """Pairs of widths on the lower hull, eviction not among them; and the kind of basis of the values."""
    kinds = {"transform": fitting.basis(statistics.values, statistics.outputs)}
    kinds["rotation"] = fitting.plain_basis(plain["value"])
    keys = _curve(scenes, statistics, "key", fitting.basis(statistics.keys, statistics.queries))
    curves = {kind: _curve(scenes, statistics, "value", basis) for kind, basis in kinds.items()}
    kind = min(curves, key=lambda kind: sum(p.distortion for p in curves[kind][: len(_TOTALS) // 2]))
    pairs = [
        Point((k.widths[0], v.widths[0]), k.cost + v.cost, k.distortion + v.distortion)
        for k in keys
        for v in curves[kind]
    ]
    hull = lower_hull(torch.tensor([[p.cost for p in pairs]]), torch.tensor([[p.distortion for p in pairs]]))
    found = [pairs[i] for i in hull.vertices(0)]
    costs = [cost for (cost,), _ in thin([((p.cost,), p.distortion) for p in found], _POINTS)]
    return [p for p in found if p.cost in costs], kind


def _curve(scenes: Sequence[Scene], statistics: Statistics, side: str, basis: tuple[Tensor, Tensor]) -> list[Point]:
    """What each total width of one side costs and leaves."""
    codes = [waterfill.spend(basis[1], total, ladder.STAGES) for total in _TOTALS]
    noise, weight = [0.0] * len(codes), 0.0
    for scene in scenes:
        sample, seen, first = scene.sample, scene.seen, slice(centring.SINKS, scene.cut)
        x = fitting.vectors(side, sample, statistics)[:, first]
        p = seen.weights[..., first].square()
        worths = p * scores.apart(seen.out, sample.values[:, first].float())
        weight += float(worths.sum())
        for i, own in enumerate(codes):
            code = fitting.make_code(*basis, own, x[:, ::4])
            rest = x - chain.features(chain.encode(x, code), code) @ chain.decoder(code)
            if side == "key":
                noise[i] += float((seen.queries @ rest.mT * sample.shape.scale).square_().mul_(worths).sum())
            else:
                noise[i] += float((p.sum(1) * rest.square().sum(-1)).sum())
    return [
        Point((own, ()), float(GROUP * sum(own) + waterfill.GAIN_BITS * len(own)), lost / weight)
        for own, lost in zip(codes, noise, strict=True)
    ]


def _choices(
    scenes: Sequence[Scene],
    points: list[Point],
    statistics: Statistics,
    kind: str,
    plain: dict[str, Tensor],
    weights: Tensor,
    bits: float,
) -> tuple[Choice, ...]:
    costs = [rate * 2 * statistics.mean.shape[-1] * bits for rate in RATES]
    worths = [worth.predict(scene.x, weights) for scene in scenes]
    judges = [_Judge(scene, points, statistics, kind, plain) for scene in scenes]
    best: dict[float, Choice] = {}
    for price in PRICES:
        for cost, levels in zip(costs, _levels(worths, points, price, costs), strict=True):
            own = [points[i] for i in levels]
            error = sum(
                judge.error([-1, *levels], _plan(w, own, price, cost)) for judge, w in zip(judges, worths, strict=True)
            )
            if cost not in best or error < best[cost].error:
                widths = tuple(point.widths for point in own)
                best[cost] = Choice(
                    cost / costs[_EVEN], cost, error, price, widths, (price, *(point.distortion for point in own))
                )
    return tuple(best.values())


def _levels(
    worths: Sequence[Tensor], points: list[Point], price: float, costs: Sequence[float]
) -> list[tuple[int, ...]]:
    """The three of ``points`` that leave least at each of ``costs``, by the dual: max_l min (distortion + l cost)."""
    pages = [_pages(w, points, price) for w in worths]
    cost, distortion = pages[0][0][0], torch.cat([d for _, d in pages])  # [L], [pages, L]
    tokens = sum(w.numel() for w in worths)
    slopes = distortion.max() / cost.max() * torch.logspace(0.5, -9, 40)
    bound = distortion + slopes[:, None, None] * cost  # [slopes, pages, L]
    sets = list(combinations(range(len(points)), min(ladder.LEVELS - 1, len(points))))
    least = torch.stack([bound[..., [0, *(i + 1 for i in some)]].amin(-1).sum(-1) for some in sets])  # [sets, slopes]
    spent = torch.tensor([max(0.0, c - ladder.PLANES) * tokens for c in costs])
    dual = (least[..., None] - slopes[:, None] * spent).amax(1)  # [sets, costs]
    return [sets[i] for i in dual.argmin(0).tolist()]


def _pages(w: Tensor, points: list[Point], price: float) -> tuple[Tensor, Tensor]:
    """Cost and distortion [pages, levels], eviction first, of a prompt whose tokens are worth ``w`` [H, N]."""
    sums = page_sums(w.sort(-1, descending=True).values[None]).flatten()
    distortion = sums[:, None] * torch.tensor([price, *(p.distortion for p in points)])
    costs = torch.tensor([0.0, *(PAGE * p.cost + 8 for p in points)])
    return costs.expand(distortion.shape), distortion


def _plan(w: Tensor, points: list[Point], price: float, cost: float) -> Tensor:
    """The level of each token, [H, N]."""
    costs, distortion = _pages(w, points, price)
    chosen = allocate(costs, distortion, max(0.0, cost - ladder.PLANES) * w.numel())
    return in_order(chosen.reshape(1, len(w), -1), w[None])[0]


class _Judge:
    """The attention output of one scene's queries, given the level of every token."""

    def __init__(
        self, scene: Scene, points: list[Point], statistics: Statistics, kind: str, plain: dict[str, Tensor]
    ) -> None:
        sample, seen, first = scene.sample, scene.seen, slice(centring.SINKS, scene.cut)
        self.metric = waterfill.per_query_head(sample)
        self.exact, self.shape = seen.out, sample.shape
        self.logits = seen.weights.clamp_min(1e-38).log()
        self.values = sample.values[:, : seen.weights.shape[-1]].float()
        self.first = first
        power = waterfill.cost_of(seen.out, self.metric)
        self.size = power if statistics.stream is None else math.exp(statistics.stream)
        x = {side: fitting.vectors(side, sample, statistics)[:, first] for side in ladder.SIDES}
        self.read: list[tuple[Tensor, Tensor]] = []
        rest = {}
        for point in points:
            for side, own in zip(ladder.SIDES, point.widths, strict=True):
                if (side, own) not in rest:
                    code = fitting.make_code(*basis_of(side, statistics, kind, plain), own, x[side][:, ::4])
                    rest[side, own] = chain.features(chain.encode(x[side], code), code) @ chain.decoder(code) - x[side]
            noise = seen.queries @ rest["key", point.widths[0]].mT * sample.shape.scale
            self.read.append((noise, rest["value", point.widths[1]]))

    def error(self, points: Sequence[int], levels: Tensor) -> float:
        """Squared error behind W_O, in units of the residual stream; ``points[0]`` is eviction."""
        logits, values = self.logits.clone(), self.values.clone()
        for level, point in enumerate(points):
            mine = levels == level
            if point < 0:
                logits[..., self.first].masked_fill_(mine[:, None], -torch.inf)
                continue
            noise, rest = self.read[point]
            logits[..., self.first] += noise * mine[:, None]
            values[:, self.first] += rest * mine[..., None]
        return waterfill.cost_of(logits.softmax(-1) @ values - self.exact, self.metric) / self.size


def basis_of(side: str, statistics: Statistics, kind: str, plain: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """W and the variances of its coefficients, of a side whose basis is of ``kind``."""
    if side == "key":
        return fitting.basis(statistics.keys, statistics.queries)
    return (
        fitting.basis(statistics.values, statistics.outputs)
        if kind == "transform"
        else fitting.plain_basis(plain[side])
    )


def tensors(choice: Choice, layer: Layer, plain: dict[str, Tensor], samples: Samples) -> dict[str, Tensor]:
    """The tensors of one layer's schema."""
    statistics = layer.statistics
    first = next(iter(samples()))
    keep = first.positions >= centring.SINKS
    made: dict[str, Tensor] = {
        "key_mean": statistics.mean,
        "importance": layer.importance,
        "worth": layer.weights,
        "rate": torch.tensor(choice.cost),
        "distortion": _filled(choice.distortion),
    }
    for side in ladder.SIDES:
        turn, variance = basis_of(side, statistics, layer.kind, plain)
        x = fitting.vectors(side, first, statistics)[:, keep][:, :: max(1, int(keep.sum()) // 4096)]
        levels = [widths[ladder.SIDES.index(side)] for widths in choice.widths]
        levels += [levels[-1]] * (ladder.LEVELS - 1 - len(levels))
        codes = [fitting.make_code(turn, variance, own, x) for own in levels]
        decoders = [chain.decoder(code) for code in codes]
        if side == "value":
            decoders = fitting.value_decoders(codes, statistics, samples)
        fields = [
            fitting.tensors_of(code, decoder, plain[side], x, stages=ladder.STAGES)
            for code, decoder in zip(codes, decoders, strict=True)
        ]
        made |= {f"{side}_{name}": torch.stack([field[name] for field in fields]) for name in fields[0]}
        made |= {f"{side}_basis": turn.contiguous(), f"{side}_plain": plain[side]}
    return made


def _filled(distortion: tuple[float, ...]) -> Tensor:
    return torch.tensor([*distortion, *[distortion[-1]] * (ladder.LEVELS - len(distortion))])
