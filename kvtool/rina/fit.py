"""What RINA fits against exact attention: the feedback of each head, the noise correction of each query head."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvtool import attention, centring, packing
from kvtool.methods.base import LayerCalibration
from kvtool.rina.tiles import TilesKV

if TYPE_CHECKING:
    from kvtool.capture import LayerSample
    from kvtool.methods.rina import RINA

_QUERIES = 64  # of each sample: the last, which see the most keys
_BETAS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
_KAPPAS = [-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0]


def fit_beta(method: "RINA", layer: LayerCalibration, samples: "Sequence[LayerSample]") -> Tensor:
    """Per head, the feedback of least error of the exact attention's output, [H]."""
    H = layer.shape.num_kv_heads
    total = torch.zeros(len(_BETAS), H)
    for sample in samples:
        weights, keys, values, positions = _attention(sample)
        for i, beta in enumerate(_BETAS):
            trial = _with(layer, beta=torch.full((H,), beta))
            kv, _ = method.compress(keys, values, trial, positions=positions)
            restored = method.decompress(kv, trial, positions=positions).values
            error = weights @ (restored - values.float())[:, :, None]  # [1, H, G, S, D]
            total[i] += error.square().sum((0, 2, 3, 4))
    return torch.tensor(_BETAS)[total.argmin(0)]


def fit_kappa(method: "RINA", layer: LayerCalibration, samples: "Sequence[LayerSample]") -> Tensor:
    """Per query head, the correction of least KL divergence from exact attention, [HQ]."""
    shape = layer.shape
    total = torch.zeros(len(_KAPPAS), shape.num_heads)
    one = _with(layer, kappa=torch.ones(shape.num_heads))
    for sample in samples:
        weights, keys, values, positions = _attention(sample)
        assert sample.queries is not None
        queries = sample.queries[None, :, -_QUERIES:]
        kv, _ = method.compress(keys, values, layer, positions=positions)
        assert not isinstance(kv, TilesKV)
        plain = attention.logits(queries, method.decompress(kv, layer, positions=positions).keys, scale=shape.scale)
        step = method.correction_of(queries, kv, one, scale=shape.scale)
        log_exact = weights.clamp_min(1e-30).log()
        for i, kappa in enumerate(_KAPPAS):
            found = (plain + kappa * step).log_softmax(-1)
            total[i] += (weights * (log_exact - found)).sum((-1, -2))[0].flatten()
    return torch.tensor(_KAPPAS)[total.argmin(0)]


def _with(layer: LayerCalibration, **tensors: Tensor) -> LayerCalibration:
    """``layer`` with some of its tensors exchanged."""
    return replace(layer, tensors={**layer.tensors, **tensors})


def _attention(sample: "LayerSample") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact weights [1, H, G, S, T] of the last queries over whole pages beyond the sinks; keys, values, positions."""
    assert sample.queries is not None
    T = (sample.keys.shape[1] - centring.SINKS) // packing.PAGE * packing.PAGE
    chosen = slice(centring.SINKS, centring.SINKS + T)
    keys, values = sample.keys[None, :, chosen], sample.values[None, :, chosen]
    scores = attention.logits(sample.queries[None, :, -_QUERIES:], keys, scale=sample.shape.scale)
    return scores.softmax(-1), keys, values, sample.positions[chosen]
