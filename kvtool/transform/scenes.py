"""Prompts cut off in the midst of a capture, and what the queries that follow make of tokens at some levels."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvtool import centring
from kvtool.methods.base import LayerCalibration
from kvtool.packing import PAGE
from kvtool.transform import code as chain
from kvtool.transform import fit as fitting
from kvtool.transform import ladder, waterfill, worth
from kvtool.transform.fit import Statistics
from kvtool.transform.points import Point, basis_of

if TYPE_CHECKING:
    from kvtool.capture import LayerSample

CUTS, AHEAD, ASKED = 4, 512, 64  # prompts per sample, tokens after each that ask, and how many of them do
_TOKENS = 5120  # of a sample


class Scene(NamedTuple):
    """A prompt that was cut off: x [H, N, F] of its tokens after the sinks, what they were worth, and to whom."""

    sample: "LayerSample"
    cut: int
    x: Tensor
    worth: Tensor
    seen: worth.Future


def scenes_of(sample: "LayerSample", importance: Tensor) -> list[Scene]:
    """The prompts of a sample, each longer by as much."""
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


class Judge:
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
