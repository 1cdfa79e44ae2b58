"""The mean of the keys, removed before coding: the cheapest large gain there is.

Keys share a large constant. Before RoPE it is one vector mu per head; after, it turns with the position, so what is
stored is k_n - R(n) mu, and what a query sees of the removed part is q^T R(n) mu, known without reading the cache.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kvtool.errors import CaptureError
from kvtool.shapes import LayerShape, Rope, TensorSpec

if TYPE_CHECKING:
    from kvtool.capture import LayerSample

Centre = Literal["none", "channel", "rotated"]
SINKS = 4  # first tokens, which lie far from every other key and stay exact outside the methods


def spec(shape: LayerShape) -> TensorSpec:
    """What the artifact stores for one layer."""
    return TensorSpec("float32", (shape.num_kv_heads, shape.head_dim))


def fit_mean(samples: "Iterable[LayerSample]", centre: Centre) -> Tensor:
    """The mean key of each head, float32 [H, D]: before RoPE if ``centre`` is rotated, as stored otherwise.

    Raises:
        CaptureError: no token beyond the sinks.
    """
    total, count, layer = torch.zeros((), dtype=torch.float64), 0, 0
    for sample in samples:
        keys = sample.pre_rope_keys() if centre == "rotated" else sample.keys.float()
        keep = sample.positions >= SINKS
        total, count, layer = total + keys[:, keep].double().sum(1), count + int(keep.sum()), sample.layer
    if not count:
        raise CaptureError(f"layer {layer}: no tokens beyond the first {SINKS} to take the mean of; capture more")
    return (total / count).float()


def at(mean: Tensor, centre: Centre, rope: Rope | None, positions: Tensor) -> Tensor:
    """What is subtracted from the keys at ``positions`` [T]: float32 [H, T, D]."""
    still = mean[:, None].expand(-1, len(positions), -1)
    return still if centre == "channel" or rope is None else rope.rotate(still, positions)
