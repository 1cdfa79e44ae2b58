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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvtool import centring
from kvtool.errors import CaptureError
from kvtool.methods.base import Progress
from kvtool.packing import PAGE
from kvtool.rdkv.fit import importance as importance_of
from kvtool.shapes import CacheShape
from kvtool.transform import code as chain
from kvtool.transform import fit as fitting
from kvtool.transform import ladder, waterfill, worth
from kvtool.transform.fit import Samples, Statistics
from kvtool.transform.points import Point, basis_of, levels_at, plan, points_of
from kvtool.transform.scenes import CUTS, Judge, Scene, scenes_of

if TYPE_CHECKING:
    from kvtool.capture import Capture
    from kvtool.methods.transform import Transform

RATES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 4.0, 6.0)  # times the average
PRICES = (16.0, 64.0)  # of eviction
_SAMPLES = 2
_EVEN = RATES.index(1.0)


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
    """
    layers, plain = {}, {}
    for done, i in enumerate(capture.layers):
        plain[i] = method.plain(capture.shape.layers[i], i)
        layers[i] = study(partial(capture.samples, i), plain[i], method.bits, method.longest(capture.shape))
        if progress:
            progress(done + 1, 2 * len(capture.layers))
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


def study(samples: Samples, plain: dict[str, Tensor], bits: float, context: int | None = None) -> Layer:
    """Everything that is measured of a layer; see 1 to 3 above. context: the longest served."""
    statistics = fitting.statistics(samples, context)
    some = list(islice(samples(), _SAMPLES))
    for sample in some:
        if sample.queries is None or sample.queries.shape[1] != sample.keys.shape[1]:
            raise CaptureError(
                "transform below 1.25 bits learns from queries what a token is worth, but this capture does not have "
                "all of them; capture with --queries all"
            )
    importance = importance_of(some, some[0].shape)
    scenes = [scene for sample in some for scene in scenes_of(sample, importance)]
    if not scenes:
        raise CaptureError(
            f"transform below 1.25 bits needs samples of {CUTS * PAGE} tokens to learn what a token is worth, found "
            f"{some[0].keys.shape[1]}; capture a longer --context"
        )
    # of each sample one, of middling length, judges; by a regression that has not seen it
    each = len(scenes) // len(some)
    judged = scenes[each // 2 :: each]
    others = [scene for i, scene in enumerate(scenes) if i % each != each // 2] or scenes
    points, kind = points_of(judged, statistics, plain)
    choices = _choices(judged, points, statistics, kind, plain, _regress(others), bits)
    return Layer(statistics, importance, _regress(scenes), kind, choices)


def _regress(scenes: Sequence[Scene]) -> Tensor:
    return worth.regress(torch.cat([s.x for s in scenes], 1), torch.cat([s.worth for s in scenes], 1))


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
    judges = [Judge(scene, points, statistics, kind, plain) for scene in scenes]
    best: dict[float, Choice] = {}
    for price in PRICES:
        for cost, levels in zip(costs, levels_at(worths, points, price, costs), strict=True):
            own = [points[i] for i in levels]
            error = sum(
                judge.error([-1, *levels], plan(w, own, price, cost)) for judge, w in zip(judges, worths, strict=True)
            )
            if cost not in best or error < best[cost].error:
                widths = tuple(point.widths for point in own)
                best[cost] = Choice(
                    cost / costs[_EVEN], cost, error, price, widths, (price, *(point.distortion for point in own))
                )
    return tuple(best.values())


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
        x = fitting.examples(side, first, statistics)[:, keep][:, :: max(1, int(keep.sum()) // 4096)]
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
