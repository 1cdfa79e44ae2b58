"""TurboQuant: rotate, normalise, quantise each coordinate with the codebook of its known density.

Source: Zandieh, Daliri, Hadian, Mirrokni, TurboQuant, https://arxiv.org/abs/2504.19874, algorithms 1 and 2.

    paper      here
    Pi         key_rotation, value_rotation: one per KV head
    c_1..c_2^b key_levels, value_levels: int8, times a step
    idx        pages of codes
    ||x||      key_scales, value_scales: fp16 per token, already divided by what one unit of a level stands for
    S, gamma   key_sketch, its scale: QJL of what is left of the key

A stored vector is ``scale * Pi^T levels[codes]``, whatever the option ``scale``: the artifact and the token say it all.
At 2.5 and 3.5 bits the channels of largest norm come first, and are a vector of their own with one bit more.
Beyond the paper: keys are centred on a calibrated mean that turns with the position, codebooks may be fitted to the
capture, and the scale corrects the norm. docs/methods/turboquant.md says what each is worth.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from kvtool import codebooks, packing, rotation
from kvtool.errors import CaptureError, MethodOptionError, ModelError
from kvtool.methods.base import Carry, Decompressed, LayerCalibration, Method
from kvtool.rotation import RotationKind
from kvtool.shapes import LayerShape, Rope, TensorSpec

if TYPE_CHECKING:
    from kvtool.capture import LayerSample


def _storable(bits: float) -> float:
    if bits not in _BITS:
        raise ValueError(f"expected one of {', '.join(map(str, _BITS))}: a packed code is 1, 2, 3, 4 or 8 bits wide")
    return int(bits) if bits == int(bits) else bits


_BITS = (1, 2, 2.5, 3, 3.5, 4, 8)
Bits = Annotated[float, AfterValidator(_storable)]


class TurboQuantKV(NamedTuple):
    """N pages of 64 tokens.

    key_pages, value_pages: uint8 [B, H, N, page bytes], packed codes.
    key_scales, value_scales: float16 [B, H, N, 64], in the order of ``packing.pack_tokens``; with split channels
        [B, H, N, 128], the outlier channels' scales first.
    sketch_pages: uint8 [B, H, N, page bytes], the sign bits of QJL; no bytes without it.
    sketch_scales: float16 [B, H, N, 64]; no bytes without QJL.
    """

    key_pages: Tensor
    key_scales: Tensor
    value_pages: Tensor
    value_scales: Tensor
    sketch_pages: Tensor
    sketch_scales: Tensor


class Part(NamedTuple):
    """Channels quantised as one vector; its tensors are ``<name>_rotation``, ``<name>_levels`` and ``<name>_step``."""

    name: str
    dim: int
    bits: int


@dataclass(frozen=True)
class TurboQuant(Method):
    """Random rotation, then Lloyd-Max on every coordinate."""

    name: ClassVar[str] = "turboquant"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.19874"
    summary: ClassVar[str] = "random rotation, then the optimal scalar codebook; keys centred on a calibrated mean"

    k_bits: Bits = Field(3, description="bits per key channel; 2.5 and 3.5 give outlier channels one bit more")
    v_bits: Bits = Field(3, description="bits per value channel")
    rotation: RotationKind = Field("hadamard", description="random-sign Hadamard rounds, or uniform (Haar)")
    codebook: Literal["sphere", "fitted"] = Field("fitted", description="exact density of the sphere, or the capture's")
    scale: Literal["mse", "norm", "unbiased"] = Field("norm", description="what a token's scale makes right")
    mean: Literal["none", "channel", "rotated"] = Field(
        "rotated", description="subtract from keys the mean channel, or the pre-RoPE mean turned to the position"
    )
    outliers: Literal["captured", "first"] = Field("captured", description="which channels get the extra half bits")
    qjl: Literal["none", "gaussian", "orthogonal"] = Field(
        "none", description="spend one key bit on a 1-bit sketch of the residual, with this matrix S"
    )
    seed: int = Field(0, ge=0, description="of the random rotations")

    def data_free(self) -> Self | None:
        free = replace(self, codebook="sphere", mean="none", outliers="first")
        return None if free == self else free

    def compress(
        self,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        queries: Tensor | None = None,
        carry: Carry = None,
    ) -> tuple[TurboQuantKV, Carry]:
        centred = keys.float() - self._mean(layer, positions)
        key_codes, key_scales, stored = self._encode(centred, layer, "key")
        value_codes, value_scales, _ = self._encode(values.float(), layer, "value")
        key_widths, value_widths = self.widths(layer.shape.head_dim)
        kv = TurboQuantKV(
            packing.pack_keys(key_codes, key_widths),
            key_scales,
            packing.pack_values(value_codes, value_widths),
            value_scales,
            *self._sketch(centred - stored, layer),
        )
        for name in ("key_scales", "value_scales", "sketch_scales"):
            if not getattr(kv, name).isfinite().all():
                raise ModelError(
                    f"layer {layer.index}: {name}: expected finite numbers below 65504, found NaN or more; "
                    "the model's cache has overflowed: load the model in bfloat16 or float32"
                )
        return kv, None

    def decompress(self, kv: TurboQuantKV, layer: LayerCalibration, *, positions: Tensor) -> Decompressed:
        D = layer.shape.head_dim
        key_widths, value_widths = self.widths(D)
        keys = self._decode(packing.unpack_keys(kv.key_pages, key_widths, D), kv.key_scales, layer, "key")
        values = self._decode(packing.unpack_values(kv.value_pages, value_widths, D), kv.value_scales, layer, "value")
        return Decompressed(keys + self._unsketch(kv, layer) + self._mean(layer, positions), values)

    # algorithm 1, for every part of the channels

    def _encode(self, x: Tensor, layer: LayerCalibration, side: str) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 [B, H, T, D] in stored channel order, packed scales, and ``x`` as it will be read back."""
        codes, scales = [], []
        for part, y in zip(self._parts(side, x.shape[-1]), self._split(x, layer, side), strict=True):
            y = rotation.rotate(y, layer[f"{part.name}_rotation"])
            levels, step = layer[f"{part.name}_levels"], layer[f"{part.name}_step"]
            norm = y.norm(dim=-1, keepdim=True)
            unit = y / norm.clamp_min(_TINY)
            chosen = codebooks.nearest(unit * math.sqrt(part.dim), levels, step)
            decoded = levels.float()[chosen.int()]
            if self.scale == "mse":
                scale = norm * step / math.sqrt(part.dim)
            elif self.scale == "norm":
                scale = norm / decoded.norm(dim=-1, keepdim=True)
            else:
                scale = norm / (unit * decoded).sum(-1, keepdim=True).clamp_min(_TINY)
            codes.append(chosen)
            scales.append(packing.pack_tokens(scale.squeeze(-1)).half())
        packed = torch.cat(scales, -1)
        return torch.cat(codes, -1), packed, self._decode(torch.cat(codes, -1), packed, layer, side)

    def _decode(self, codes: Tensor, scales: Tensor, layer: LayerCalibration, side: str) -> Tensor:
        """The vectors [B, H, T, D] float32, in the model's channel order."""
        parts = self._parts(side, codes.shape[-1])
        decoded = []
        for part, c, s in zip(
            parts, codes.split([p.dim for p in parts], -1), scales.split(packing.PAGE, -1), strict=True
        ):
            y = packing.unpack_tokens(s).float()[..., None] * layer[f"{part.name}_levels"].float()[c.int()]
            decoded.append(rotation.unrotate(y, layer[f"{part.name}_rotation"]))
        x = torch.cat(decoded, -1)
        if len(parts) == 1:
            return x
        order = layer[f"{side}_order"].long()[:, None].expand(x.shape)  # [B, H, T, D]
        return torch.empty_like(x).scatter_(-1, order, x)

    def _split(self, x: Tensor, layer: LayerCalibration, side: str) -> Sequence[Tensor]:
        parts = self._parts(side, x.shape[-1])
        if len(parts) == 1:
            return [x]
        order = layer[f"{side}_order"].long()[:, None].expand(x.shape)
        return x.gather(-1, order).split([part.dim for part in parts], -1)

    # algorithm 2: a 1-bit sketch of the residual

    def _sketch(self, residual: Tensor, layer: LayerCalibration) -> tuple[Tensor, Tensor]:
        B, H, T, D = residual.shape
        N = T // packing.PAGE
        if self.qjl == "none":
            empty = residual.new_empty(B, H, N, 0)
            return empty.to(torch.uint8), empty.half()
        projected = residual @ layer["sketch"].mT
        pages = packing.pack_keys((projected > 0).to(torch.uint8), [1] * packing.groups(D))
        return pages, packing.pack_tokens(residual.norm(dim=-1)).half()

    def _unsketch(self, kv: TurboQuantKV, layer: LayerCalibration) -> Tensor | float:
        """gamma * sqrt(pi/2)/d * S^T sign: its inner product with a query is the estimate of <q, residual>."""
        if self.qjl == "none":
            return 0.0
        D = layer.shape.head_dim
        signs = 2.0 * packing.unpack_keys(kv.sketch_pages, [1] * packing.groups(D), D) - 1
        gamma = packing.unpack_tokens(kv.sketch_scales).float()[..., None]
        # an orthogonal S has rows of norm 1, a Gaussian one of norm sqrt(d)
        constant = math.sqrt(math.pi / 2) / (D if self.qjl == "gaussian" else math.sqrt(D))
        return gamma * constant * (signs @ layer["sketch"])

    # the mean of the keys

    def _mean(self, layer: LayerCalibration, positions: Tensor) -> Tensor | float:
        """What is subtracted from the keys at ``positions``, [H, T, D]."""
        if self.mean == "none":
            return 0.0
        mean = layer["key_mean"][:, None].expand(-1, len(positions), -1)
        return mean if self.mean == "channel" or layer.rope is None else layer.rope.rotate(mean, positions)

    # what the artifact holds

    def widths(self, head_dim: int) -> tuple[list[int], list[int]]:
        """Bits of each 32-channel group of a key page and of a value page."""
        return tuple(  # type: ignore[return-value]
            [part.bits for part in self._parts(side, head_dim) for _ in range(packing.groups(part.dim))]
            for side in ("key", "value")
        )

    def _parts(self, side: str, head_dim: int) -> list[Part]:
        bits = self.k_bits if side == "key" else self.v_bits
        if side == "key" and self.qjl != "none":
            bits -= 1
        if bits == int(bits):
            return [Part(side, head_dim, int(bits))]
        # 32 of 128 channels, as in section 4.3; a multiple of 32 so that a packed group has one width
        outliers = max(packing.GROUP, head_dim // 4 // packing.GROUP * packing.GROUP)
        if head_dim <= outliers:
            raise MethodOptionError(f"{side[0]}_bits={bits}: head_dim {head_dim} is too small to split; use whole bits")
        return [
            Part(f"{side}_outlier", outliers, int(bits + 0.5)),
            Part(side, head_dim - outliers, int(bits)),
        ]

    def layer_schema(self, shape: LayerShape) -> dict[str, TensorSpec]:
        H, D = shape.num_kv_heads, shape.head_dim
        schema = {}
        for side in ("key", "value"):
            parts = self._parts(side, D)
            for part in parts:
                schema[f"{part.name}_rotation"] = rotation.spec(self.rotation, H, part.dim)
                schema[f"{part.name}_levels"] = TensorSpec("int8", (2**part.bits,))
                schema[f"{part.name}_step"] = TensorSpec("float32", (1,))
            if len(parts) > 1:
                schema[f"{side}_order"] = TensorSpec("int16", (H, D))
        if self.mean != "none":
            schema["key_mean"] = TensorSpec("float32", (H, D))
        if self.qjl != "none":
            schema["sketch"] = TensorSpec("float32", (H, D, D))
        return schema

    def fit_layer(
        self, shape: LayerShape, rope: Rope | None, samples: "Iterable[LayerSample]", *, layer: int
    ) -> dict[str, Tensor]:
        H, D = shape.num_kv_heads, shape.head_dim
        generator = torch.Generator().manual_seed(self.seed * 10_007 + layer)
        tensors: dict[str, Tensor] = {}
        if self.mean != "none":
            tensors["key_mean"] = self._fit_mean(samples, layer)
        fitted = LayerCalibration(layer, shape, rope, tensors)  # sees the tensors as they come
        for side in ("key", "value"):
            parts = self._parts(side, D)
            if len(parts) > 1:
                tensors[f"{side}_order"] = self._fit_order(samples, fitted, side)
            for part in parts:
                tensors[f"{part.name}_rotation"] = rotation.draw(self.rotation, H, part.dim, generator)
            for part, density in zip(parts, self._densities(samples, fitted, side), strict=True):
                book = (
                    codebooks.codebook(density, part.bits)
                    if density
                    else codebooks.sphere_codebook(part.dim, part.bits)
                )
                tensors[f"{part.name}_levels"] = book.levels
                tensors[f"{part.name}_step"] = torch.tensor([book.step], dtype=torch.float32)
        if self.qjl == "orthogonal":
            tensors["sketch"] = rotation.draw("haar", H, D, generator)
        elif self.qjl == "gaussian":
            tensors["sketch"] = torch.randn(H, D, D, generator=generator)
        return tensors

    def _fit_mean(self, samples: "Iterable[LayerSample]", layer: int) -> Tensor:
        total, count = torch.tensor(0.0, dtype=torch.float64), 0
        for sample in samples:
            keys = sample.pre_rope_keys() if self.mean == "rotated" else sample.keys.float()
            # sinks lie far from every other key, and stay exact outside the method
            keep = sample.positions >= _SINKS
            total = total + keys[:, keep].double().sum(1)
            count += int(keep.sum())
        if not count:
            raise CaptureError(f"layer {layer}: no tokens beyond the first {_SINKS} to take the mean of; capture more")
        return (total / count).float()

    def _fit_order(self, samples: "Iterable[LayerSample]", layer: LayerCalibration, side: str) -> Tensor:
        """Channels of every head, int16 [H, D], the outlier channels first, each part in the model's order."""
        H, D = layer.shape.num_kv_heads, layer.shape.head_dim
        energy = torch.zeros(H, D, dtype=torch.float64)
        if self.outliers == "captured":
            for sample in samples:
                energy += self._centred(sample, layer, side).double().square().sum(1)
        count = self._parts(side, D)[0].dim
        loud = energy.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values
        quiet = torch.ones(H, D, dtype=torch.bool).scatter_(-1, loud, False)
        rest = quiet.nonzero()[:, 1].reshape(H, D - count)
        return torch.cat([loud, rest], -1).to(torch.int16)

    def _densities(
        self, samples: "Iterable[LayerSample]", layer: LayerCalibration, side: str
    ) -> Sequence[codebooks.Density | None]:
        """Of the rotated, normalised coordinates of every part, times sqrt(dim); None where the sphere's is meant."""
        parts = self._parts(side, layer.shape.head_dim)
        if self.codebook == "sphere":
            return [None] * len(parts)
        counts = [np.zeros(math.ceil(part.dim**0.5 / _BIN)) for part in parts]
        for sample in samples:
            x = self._centred(sample, layer, side)
            for part, y, count in zip(parts, self._split(x, layer, side), counts, strict=True):
                unit = F.normalize(rotation.rotate(y, layer[f"{part.name}_rotation"]), dim=-1)
                bins = (unit.abs() * (math.sqrt(part.dim) / _BIN)).long().clamp_(max=len(count) - 1)
                count += torch.bincount(bins.flatten(), minlength=len(count)).numpy()
        if any(count.sum() == 0 for count in counts):
            raise CaptureError(
                f"layer {layer.index}: no tokens to fit a codebook to; capture more or use codebook=sphere"
            )
        return [codebooks.histogram(count, _BIN) for count in counts]

    def _centred(self, sample: "LayerSample", layer: LayerCalibration, side: str) -> Tensor:
        """What is quantised, [H, T, D] float32, sinks left out."""
        x = sample.values.float() if side == "value" else sample.keys.float() - self._mean(layer, sample.positions)
        return x[:, sample.positions >= _SINKS]


_TINY = torch.finfo(torch.float32).tiny
_SINKS = 4
_BIN = 1 / 256  # of a histogram, in standard deviations of a coordinate
