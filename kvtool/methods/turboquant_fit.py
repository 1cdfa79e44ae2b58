"""What TurboQuant learns from a capture: the mean of the keys, loud channels, codebooks, and the distortion it claims.

Every step sees the tensors fitted before it, through the same code that will compress.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool import centring, codebooks, packing, rotation
from kvtool.errors import CaptureError
from kvtool.methods import qjl as sketches
from kvtool.methods.base import LayerCalibration
from kvtool.methods.outliers import loudest
from kvtool.shapes import LayerShape, Rope

if TYPE_CHECKING:
    from kvtool.capture import LayerSample
    from kvtool.methods.turboquant import TurboQuant

SIDES = ("key", "value")


def fit(
    method: "TurboQuant", shape: LayerShape, rope: Rope | None, samples: "Iterable[LayerSample]", *, layer: int
) -> dict[str, Tensor]:
    """The tensors of one layer; ``samples`` may be empty if nothing is learnt from data."""
    H, D = shape.num_kv_heads, shape.head_dim
    generator = torch.Generator().manual_seed(method.seed * 10_007 + layer)
    tensors: dict[str, Tensor] = {}
    so_far = LayerCalibration(layer, shape, rope, tensors)
    if method.mean != "none":
        tensors["key_mean"] = centring.fit_mean(samples, method.mean)
    for side in SIDES:
        parts = method.parts(side, D)
        if len(parts) > 1:
            tensors[f"{side}_order"] = loudest(_energy(method, samples, so_far, side), parts[0].dim)
        for part in parts:
            tensors[f"{part.name}_rotation"] = rotation.draw(method.rotation, H, part.dim, generator)
        for part, book in zip(parts, _codebooks(method, samples, so_far, side), strict=True):
            tensors[f"{part.name}_levels"] = book.levels.clone()  # layers share a table, files may not
            tensors[f"{part.name}_step"] = torch.tensor([book.step], dtype=torch.float32)
    if method.qjl != "none":
        tensors["sketch"] = sketches.draw(method.qjl, H, D, generator)
    for side, distortion in _distortions(method, samples, so_far).items():
        tensors[f"{side}_distortion"] = distortion
    return tensors


def _energy(method: "TurboQuant", samples: "Iterable[LayerSample]", layer: LayerCalibration, side: str) -> Tensor:
    """Sum of squares of every channel, float64 [H, D]."""
    energy = torch.zeros(layer.shape.num_kv_heads, layer.shape.head_dim, dtype=torch.float64)
    if method.outliers == "captured":
        for sample in samples:
            energy += _centred(method, sample, layer, side).double().square().sum(1)
    return energy


def _codebooks(
    method: "TurboQuant", samples: "Iterable[LayerSample]", layer: LayerCalibration, side: str
) -> list[codebooks.Codebook]:
    parts = method.parts(side, layer.shape.head_dim)
    if method.codebook == "sphere":
        return [codebooks.sphere_codebook(part.dim, part.bits) for part in parts]
    counts = [np.zeros(math.ceil(math.sqrt(part.dim) / _BIN)) for part in parts]
    for sample in samples:
        pieces = method.split(_centred(method, sample, layer, side), layer, side)
        for (part, y), count in zip(pieces, counts, strict=True):
            unit = F.normalize(rotation.rotate(y, layer[f"{part.name}_rotation"]), dim=-1)
            bins = (unit.abs() * (math.sqrt(part.dim) / _BIN)).long().clamp_(max=len(count) - 1)
            count += torch.bincount(bins.flatten(), minlength=len(count)).numpy()
    if not all(count.any() for count in counts):
        raise CaptureError(f"layer {layer.index}: no {side}s to fit a codebook to; capture more or use codebook=sphere")
    return [codebooks.codebook(codebooks.histogram(c, _BIN), p.bits) for c, p in zip(counts, parts, strict=True)]


def _distortions(method: "TurboQuant", samples: "Iterable[LayerSample]", layer: LayerCalibration) -> dict[str, Tensor]:
    """Mean squared error over squared norm, on the tokens fitted to, of the sides that no theorem covers."""
    sides = [side for side in SIDES if not method.by_theorem(side)]
    errors: dict[str, list[Tensor]] = {side: [] for side in sides}
    for sample in samples if sides else ():
        pages = sample.keys.shape[1] // packing.PAGE
        some = torch.arange(pages)[:: -(-pages // _MEASURED) or 1]  # spread over the text
        tokens = (some[:, None] * packing.PAGE + torch.arange(packing.PAGE)).flatten()
        x = {"key": sample.keys[None, :, tokens].float(), "value": sample.values[None, :, tokens].float()}
        positions = sample.positions[tokens]
        kv, _ = method.compress(x["key"], x["value"], layer, positions=positions)
        found = method.decompress(kv, layer, positions=positions)
        for side, read in zip(SIDES, found[:2], strict=True):
            if side in sides:
                error = (read - x[side]).square().sum(-1) / x[side].square().sum(-1).clamp_min(_TINY)
                errors[side].append(error[0][:, positions >= centring.SINKS].flatten())
    if any(sum(map(len, parts)) == 0 for parts in errors.values()):
        raise CaptureError(f"layer {layer.index}: expected at least {packing.PAGE} tokens to measure; capture more")
    return {side: torch.cat(parts).mean().reshape(1) for side, parts in errors.items()}


def _centred(method: "TurboQuant", sample: "LayerSample", layer: LayerCalibration, side: str) -> Tensor:
    """What is quantised, float32 [H, T, D], sinks left out."""
    x = sample.values.float() if side == "value" else sample.keys.float() - method.removed(layer, sample.positions)
    return x[:, sample.positions >= centring.SINKS]


_TINY = torch.finfo(torch.float32).tiny
_BIN = 1 / 256  # of a histogram, in standard deviations of a coordinate
_MEASURED = 16  # pages of each sample whose distortion is claimed
