"""TurboQuant: rotate, normalise, quantise each coordinate with the codebook of its known density.

Source: Zandieh, Daliri, Hadian, Mirrokni, TurboQuant, https://arxiv.org/abs/2504.19874, algorithms 1 and 2.

    paper      here
    Pi         key_rotation, value_rotation: one per KV head
    c_1..c_2^b key_levels, value_levels, times key_step, value_step: for coordinates of variance 1
    idx        codes, packed into pages
    ||x||      key_scales, value_scales: float16 per token
    S, gamma   sketch, sketch_scales: QJL of what is left of the key

What is read back is ``scale * Pi^T levels[codes]``, whatever the option ``scale`` says: the token's scale has taken up
the norm, the step and 1/sqrt(d). Beyond the paper: keys lose a calibrated mean that turns with their position, the
scale may correct the norm or the bias, and codebooks may be fitted. docs/methods/turboquant.md says what each is worth.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from kvtool import centring, codebooks, packing, rotation
from kvtool.centring import Centre
from kvtool.methods import qjl as sketches
from kvtool.methods.base import FITTED_MARGIN, Carry, Claim, Decompressed, LayerCalibration, Method
from kvtool.methods.finite import require_finite
from kvtool.methods.outliers import Part, join, parts_of, split
from kvtool.methods.turboquant_fit import SIDES, fit
from kvtool.rotation import RotationKind
from kvtool.shapes import CacheShape, LayerShape, Rope, TensorSpec

if TYPE_CHECKING:
    from kvtool.capture import LayerSample


class TurboQuantKV(NamedTuple):
    """N pages of 64 tokens.

    key_pages, value_pages: uint8 [B, H, N, page bytes], packed codes.
    key_scales, value_scales: float16 [B, H, N, 64], in the order of ``packing.pack_tokens``; at half bits
        [B, H, N, 128], the outlier channels' scales first.
    sketch_pages: uint8 [B, H, N, page bytes], QJL's signs; no bytes without QJL.
    sketch_scales: float16 [B, H, N, 64], QJL's gamma; no bytes without QJL.
    """

    key_pages: Tensor
    key_scales: Tensor
    value_pages: Tensor
    value_scales: Tensor
    sketch_pages: Tensor
    sketch_scales: Tensor


def _storable(bits: float) -> float:
    if bits not in _BITS:
        raise ValueError(f"expected one of {', '.join(map(str, _BITS))}, the widths that pack without waste")
    return int(bits) if bits == int(bits) else bits


_BITS = (1, 2, 2.5, 3, 3.5, 4, 8)
Bits = Annotated[float, AfterValidator(_storable)]


@dataclass(frozen=True)
class TurboQuant(Method):
    """Random rotation, then the optimal scalar codebook on every coordinate."""

    name: ClassVar[str] = "turboquant"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.19874"
    summary: ClassVar[str] = "random rotation, then the optimal scalar codebook; keys centred on a calibrated mean"

    k_bits: Bits = Field(3, description="bits per key channel: 1, 2, 2.5, 3, 3.5, 4 or 8; half bits are for outliers")
    v_bits: Bits = Field(3, description="bits per value channel: likewise")
    rotation: RotationKind = Field("hadamard", description="random-sign Hadamard rounds, or uniform (haar)")
    codebook: Literal["sphere", "fitted"] = Field("sphere", description="for the sphere's exact density, or captured")
    scale: Literal["mse", "norm", "unbiased"] = Field("norm", description="what a token's scale makes right")
    mean: Centre = Field(
        "rotated", description="taken from keys: the pre-RoPE mean turned to the position, or a fixed one"
    )
    outliers: Literal["captured", "first"] = Field("captured", description="the channels with more bits at half bits")
    qjl: Literal["none", "gaussian", "orthogonal"] = Field(
        "none", description="make one key bit a sketch, of this kind"
    )
    seed: int = Field(0, ge=0, description="of the random matrices")

    @field_validator("qjl")
    @classmethod
    def _has_a_bit(cls, qjl: str, info: ValidationInfo) -> str:
        bits = info.data.get("k_bits", 3)
        if qjl != "none" and bits - 1 not in (1, 1.5, 2, 2.5, 3):
            raise ValueError(f"takes one of k_bits 2, 2.5, 3, 3.5 or 4, not of {bits}")
        return qjl

    def data_free(self) -> Self | None:
        half = self.k_bits % 1 or self.v_bits % 1
        free = replace(self, codebook="sphere", mean="none", outliers="first" if half else self.outliers)
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
        B, H, T, D = keys.shape
        key_widths, value_widths = self.widths(D)
        centred = keys.float() - self.removed(layer, positions)
        key_codes, key_scales = self._encode(centred, layer, "key")
        value_codes, value_scales = self._encode(values.float(), layer, "value")
        sketch = keys.new_empty(B, H, T // packing.PAGE, 0, dtype=torch.uint8), key_scales[..., :0]
        if self.qjl != "none":
            sketch = sketches.sketch(centred - self._decode(key_codes, key_scales, layer, "key"), layer["sketch"])
        kv = TurboQuantKV(
            packing.pack_keys(key_codes, key_widths),
            key_scales,
            packing.pack_values(value_codes, value_widths),
            value_scales,
            *sketch,
        )
        require_finite(kv, layer.index)
        return kv, None

    def decompress(self, kv: TurboQuantKV, layer: LayerCalibration, *, positions: Tensor) -> Decompressed:
        D = layer.shape.head_dim
        key_widths, value_widths = self.widths(D)
        keys = self._decode(packing.unpack_keys(kv.key_pages, key_widths, D), kv.key_scales, layer, "key")
        values = self._decode(packing.unpack_values(kv.value_pages, value_widths, D), kv.value_scales, layer, "value")
        if self.qjl != "none":
            keys = keys + sketches.unsketch(kv.sketch_pages, kv.sketch_scales, layer["sketch"], self.qjl)
        return Decompressed(keys + self.removed(layer, positions), values)

    def _encode(self, x: Tensor, layer: LayerCalibration, side: str) -> tuple[Tensor, Tensor]:
        """Algorithm 1 on ``x`` [B, H, T, D]: codes uint8 [B, H, T, D] in stored channel order, and packed scales."""
        codes, scales = [], []
        for part, y in self.split(x, layer, side):
            levels, step = layer[f"{part.name}_levels"].float(), layer[f"{part.name}_step"]
            y = rotation.rotate(y, layer[f"{part.name}_rotation"])
            norm = y.norm(dim=-1, keepdim=True)
            unit = y / norm.clamp_min(_TINY)
            code = codebooks.nearest(unit * math.sqrt(part.dim), levels, step)
            decoded = codebooks.look_up(levels, code)
            if self.scale == "mse":
                scale = norm * step / math.sqrt(part.dim)
            elif self.scale == "norm":
                scale = norm / decoded.norm(dim=-1, keepdim=True)
            else:
                scale = norm / (unit * decoded).sum(-1, keepdim=True).clamp_min(_TINY)
            codes.append(code)
            scales.append(packing.pack_tokens(scale.squeeze(-1)).half())
        return torch.cat(codes, -1), torch.cat(scales, -1)

    def _decode(self, codes: Tensor, scales: Tensor, layer: LayerCalibration, side: str) -> Tensor:
        """What :meth:`_encode` stored, in the model's channel order; float32 [B, H, T, D]."""
        parts = self.parts(side, codes.shape[-1])
        dims = [part.dim for part in parts]
        pieces = []
        for part, code, scale in zip(parts, codes.split(dims, -1), scales.split(packing.PAGE, -1), strict=True):
            y = codebooks.look_up(layer[f"{part.name}_levels"], code)
            y *= packing.unpack_tokens(scale).float()[..., None]
            pieces.append(rotation.unrotate(y, layer[f"{part.name}_rotation"]))
        return join(pieces, layer.tensors.get(f"{side}_order"))

    def split(self, x: Tensor, layer: LayerCalibration, side: str) -> Sequence[tuple[Part, Tensor]]:
        """The parts of ``x`` [..., H, T, D], each with its channels."""
        parts = self.parts(side, x.shape[-1])
        return list(zip(parts, split(x, parts, layer.tensors.get(f"{side}_order")), strict=True))

    def removed(self, layer: LayerCalibration, positions: Tensor) -> Tensor | float:
        """What is taken from the keys at ``positions``, [H, T, D]."""
        return 0.0 if self.mean == "none" else centring.at(layer["key_mean"], self.mean, layer.rope, positions)

    def parts(self, side: str, head_dim: int) -> list[Part]:
        """The vectors a key or a value is cut into: one, or two at half bits."""
        bits = self.v_bits if side == "value" else self.k_bits - (self.qjl != "none")
        return parts_of(side, bits, head_dim)

    def widths(self, head_dim: int) -> tuple[list[int], list[int]]:
        """Bits of each 32-channel group of a key page and of a value page."""
        key, value = (
            [part.bits for part in self.parts(side, head_dim) for _ in range(packing.groups(part.dim))]
            for side in SIDES
        )
        return key, value

    def layer_schema(self, shape: LayerShape) -> dict[str, TensorSpec]:
        H, D = shape.num_kv_heads, shape.head_dim
        schema = {}
        for side in SIDES:
            parts = self.parts(side, D)
            for part in parts:
                schema[f"{part.name}_rotation"] = rotation.spec(self.rotation, H, part.dim)
                schema[f"{part.name}_levels"] = codebooks.spec(part.bits)
                schema[f"{part.name}_step"] = TensorSpec("float32", (1,))
            if len(parts) > 1:
                schema[f"{side}_order"] = TensorSpec("int16", (H, D))
            if not self.by_theorem(side):
                schema[f"{side}_distortion"] = TensorSpec("float32", (1,))
        if self.mean != "none":
            schema["key_mean"] = centring.spec(shape)
        if self.qjl != "none":
            schema["sketch"] = TensorSpec("float32", (H, D, D))
        return schema

    def fit_layer(
        self, shape: LayerShape, rope: Rope | None, samples: "Iterable[LayerSample]", *, layer: int
    ) -> dict[str, Tensor]:
        return fit(self, shape, rope, samples, layer=layer)

    def by_theorem(self, side: str) -> bool:
        """Whether the paper bounds the error relative to ||x||: its codebook, and nothing taken away before."""
        return self.codebook == "sphere" and (side == "value" or self.mean == "none")

    def claims(self, shape: CacheShape, tensors: Mapping[str, Tensor]) -> Sequence[Claim]:
        claims = []
        for i in shape.compressible:
            D = shape.layers[i].head_dim
            for side in SIDES:
                bits = min(part.bits for part in self.parts(side, D))
                if not self.by_theorem(side):
                    limit = FITTED_MARGIN * float(tensors[f"layers.{i}.{side}_distortion"])
                    claims.append(Claim(f"{side}_nmse", limit, "expected", "calibration", i))
                elif side == "key" and self.qjl != "none":
                    limit = math.pi / (2 * D) * self._limit(bits)
                    claims.append(Claim("inner_product_nmse", limit, "expected", f"{_SOURCE}, theorem 2", i))
                else:
                    claims.append(Claim(f"{side}_nmse", self._limit(bits), "expected", f"{_SOURCE}, theorem 1", i))
        return claims

    def _limit(self, bits: int) -> float:
        """Theorem 1 for the scale in use: D of the paper's own, 2 - 2 sqrt(1-D) of norm, D / (1-D) of unbiased."""
        # a byte's levels are uniform, so that they fit int8 arithmetic: step^2 / 12 and the overload, not the theorem
        d = math.sqrt(3) * math.pi / 2 * 4.0**-bits if bits < 8 else 1e-4
        return {"mse": d, "norm": 2 - 2 * math.sqrt(1 - d), "unbiased": d / (1 - d)}[self.scale]


_SOURCE = "arXiv 2504.19874"
_TINY = torch.finfo(torch.float32).tiny
