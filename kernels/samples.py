"""Random pages, and layers fitted to random tokens: what ``check.py`` runs the kernels on."""

from dataclasses import dataclass

import torch

from kvtool import packing
from kvtool.bench.synthetic import synthetic_calibration
from kvtool.codebooks import sphere_codebook
from kvtool.kernels.packed import Codec, Packed
from kvtool.methods.base import LayerCalibration, Method
from kvtool.shapes import LayerKind, LayerShape


@dataclass(frozen=True)
class Shape:
    """Of a case: D channels, ``group`` query heads on each of H KV heads, S query tokens, B sequences, N pages."""

    D: int
    group: int
    H: int = 2
    S: int = 1
    B: int = 2
    N: int = 5


def random_packed(
    shape: Shape, key_widths: tuple[int, ...], value_widths: tuple[int, ...], device: torch.device
) -> tuple[Packed, Codec]:
    """Random codes and scales, and maps that leave logits near 1.5 nats for queries of unit variance times 1.5."""
    g = torch.Generator().manual_seed(0)
    levels = {width: sphere_codebook(128, width).levels for width in (2, 3, 4)}
    pages, maps = [], []
    for pack, widths in ((packing.pack_keys, key_widths), (packing.pack_values, value_widths)):
        tokens = (shape.B, shape.H, 64 * shape.N)
        codes = torch.cat([torch.randint(0, 1 << w, (*tokens, 32), generator=g).to(torch.uint8) for w in widths], -1)
        pages += [pack(codes, widths), packing.pack_tokens(0.5 + torch.rand(tokens, generator=g)).half()]
        C = 32 * len(widths)
        turn = torch.linalg.qr(torch.randn(shape.H, C, C, generator=g)).Q[:, : shape.D]
        deviation = [{0: 1.0, 1: 1.0, 8: 74.0}.get(w) or float(levels[w].float().std()) for w in widths]
        maps.append(turn / torch.tensor(deviation).repeat_interleave(32))
    codec = Codec(key_widths, value_widths, maps[0].to(device), maps[1].mT.contiguous().to(device), levels, levels)
    return Packed(*(x.to(device) for x in pages)), codec


_TOKENS = 320  # fitted to: every case is to take moments
_fitted: dict[tuple[Method, Shape], LayerCalibration] = {}


def fitted_layer(method: Method, shape: Shape) -> LayerCalibration:
    """A layer of ``shape`` that ``method`` was fitted to random tokens for, once."""
    key = method, Shape(shape.D, shape.group, shape.H)
    if key not in _fitted:
        heads = {"num_heads": shape.H * shape.group, "num_kv_heads": shape.H, "head_dim": shape.D}
        layer = LayerShape(kind=LayerKind.FULL, scale=shape.D**-0.5, **heads)
        _fitted[key] = synthetic_calibration(method, layer, tokens=_TOKENS).layer(0)
    return _fitted[key]
