"""One budget for all layers (``-o scope model``): each layer's share, from what a captured prompt would do with bytes.

At run time layers are compressed one by one while the prompt is prefilled, so how much each may spend has to be known
before: it is settled here, and heads and tokens of a layer share it at run time.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvtool import scores
from kvtool.allocation import allocate
from kvtool.methods.base import LayerCalibration
from kvtool.shapes import Rope

if TYPE_CHECKING:
    from kvtool.capture import LayerSample
    from kvtool.methods.rdkv import RDKV

SINKS = 4  # the first tokens are outliers and never compressed: they must not shape the statistics
_FLOOR = 0.25  # of the mean: what one prompt hardly reads another may


class Demand(NamedTuple):
    """What one layer of a captured prompt would do with bytes: cost and distortion [N, LEVELS] of its pages, and the
    bytes of the layer in 16 bits."""

    cost: Tensor
    distortion: Tensor
    full: float


def demand(method: "RDKV", samples: "Sequence[LayerSample]", tensors: dict[str, Tensor], rope: Rope | None) -> Demand:
    """The pages of the first sample as rdkv weighs them, relative to the energy of the layer's attention output."""
    sample = samples[0]
    assert sample.queries is not None
    layer = LayerCalibration(sample.layer, sample.shape, rope, tensors)
    keys, values, queries = (x[None].float() for x in (sample.keys, sample.values, sample.queries))
    window = method.window
    inner = slice(SINKS, -window)
    outer_keys, outer_values = (torch.cat([x[:, :, :SINKS], x[:, :, -window:]], 2) for x in (keys, values))
    carry = method.begin(queries, outer_keys, outer_values, layer, sinks=SINKS)
    inside = keys[:, :, inner], values[:, :, inner]
    weights = method.token_weights(*inside, layer, sample.positions[inner], queries, carry)
    cost, distortion = method.pages(*weights, layer)
    rest = scores.around(queries[:, :, -window:], outer_keys, outer_values, sample.shape, sinks=SINKS)
    seen = scores.observe(
        queries[:, :, -window:], *inside, rest, scale=sample.shape.scale, softcap=sample.shape.softcap
    )
    energy = (seen.out.pow(2).sum(-1).mean((0, 3)).flatten() * tensors["importance"]).sum()
    full = 4.0 * inside[0].numel() / len(inside[0])
    return Demand(cost.flatten(0, 1), (distortion[0] / energy).flatten(0, 1), full)


def spread_over_layers(demands: dict[int, Demand], share: float) -> dict[int, float]:
    """The fraction of each layer when one budget serves all of them; their mean, weighted by size, is ``share``."""
    cost = torch.cat([one.cost for one in demands.values()])
    distortion = torch.cat([one.distortion for one in demands.values()])
    total = sum(one.full for one in demands.values())
    chosen = allocate(cost, distortion, share * total)
    spent = cost.gather(1, chosen[:, None]).squeeze(1).split([len(one.cost) for one in demands.values()])
    fractions = [max(_FLOOR * share, float(s.sum()) / one.full) for s, one in zip(spent, demands.values(), strict=True)]
    excess = sum(f * one.full for f, one in zip(fractions, demands.values(), strict=True)) / (share * total)
    return {i: min(1.0, f / excess) for i, f in zip(demands, fractions, strict=True)}
