"""8-bit floats (e4m3) with one scale per KV head: what serving systems ship, and so a row in every comparison.

x' = s * e4m3(x / s). The format has 3 mantissa bits (relative error at most 1/16) and reaches 448; s puts the largest
value there. ``page`` takes s from the page itself; ``head`` from the capture, as vLLM's calibrated scales do, and what
exceeds it saturates.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from kvtool import packing
from kvtool.errors import CaptureError
from kvtool.methods.base import Carry, Decompressed, LayerCalibration, Method
from kvtool.methods.finite import require_finite_tokens
from kvtool.shapes import LayerShape, Rope, TensorSpec

if TYPE_CHECKING:
    from kvtool.capture import LayerSample


class Fp8KV(NamedTuple):
    """Keys and values, float8_e4m3fn [B, H, T, D]; scales, float32 [B, H, T/64, 1], or no bytes if fitted."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor
    value_scales: Tensor


@dataclass(frozen=True)
class Fp8(Method):
    """e4m3 with a scale per KV head."""

    name: ClassVar[str] = "fp8"
    paper: ClassVar[str] = "https://arxiv.org/abs/2209.05433"
    summary: ClassVar[str] = "8-bit floats (e4m3) with a scale per KV head, as serving systems do"

    scale: Literal["page", "head"] = Field("page", description="from every page of 64 tokens, or fitted per head")

    def data_free(self) -> Self | None:
        return None if self.scale == "page" else replace(self, scale="page")

    def layer_schema(self, shape: LayerShape) -> dict[str, TensorSpec]:
        if self.scale == "page":
            return {}
        return {name: TensorSpec("float32", (shape.num_kv_heads,)) for name in ("key_scale", "value_scale")}

    def fit_layer(
        self, shape: LayerShape, rope: Rope | None, samples: "Iterable[LayerSample]", *, layer: int
    ) -> dict[str, Tensor]:
        if self.scale == "page":
            return {}
        largest = [(s.keys.float().abs().amax((1, 2)), s.values.float().abs().amax((1, 2))) for s in samples]
        if not largest:
            raise CaptureError(f"layer {layer}: no tokens to take a scale from; capture more or use scale=page")
        keys, values = (torch.stack(side).amax(0) / _LARGEST for side in zip(*largest, strict=True))
        return {"key_scale": keys.clamp_min(_TINY), "value_scale": values.clamp_min(_TINY)}

    def compress(
        self,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        queries: Tensor | None = None,
        carry: Carry = None,
    ) -> tuple[Fp8KV, Carry]:
        require_finite_tokens(keys, values, layer.index)
        key_codes, key_scales = self._encode(keys.float(), layer, "key")
        value_codes, value_scales = self._encode(values.float(), layer, "value")
        return Fp8KV(key_codes, value_codes, key_scales, value_scales), None

    def decompress(self, kv: Fp8KV, layer: LayerCalibration, *, positions: Tensor) -> Decompressed:
        return Decompressed(
            self._decode(kv.keys, kv.key_scales, layer, "key"),
            self._decode(kv.values, kv.value_scales, layer, "value"),
        )

    def _encode(self, x: Tensor, layer: LayerCalibration, side: str) -> tuple[Tensor, Tensor]:
        pages = x.unflatten(2, (-1, packing.PAGE))  # [B, H, N, 64, D]
        stored = pages.abs().amax((-1, -2), keepdim=True).squeeze(-1) / _LARGEST  # [B, H, N, 1]
        if self.scale == "head":
            stored = stored[..., :0]
        codes = x / self._scales(stored.clamp_min(_TINY), layer, side)
        # torch casts what is beyond 448 to NaN
        return codes.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), stored.clamp_min(_TINY)

    def _decode(self, codes: Tensor, scales: Tensor, layer: LayerCalibration, side: str) -> Tensor:
        return codes.float() * self._scales(scales, layer, side)

    def _scales(self, stored: Tensor, layer: LayerCalibration, side: str) -> Tensor:
        """[B, H, T, 1], or [H, 1, 1] from the artifact."""
        if self.scale == "head":
            return layer[f"{side}_scale"][:, None, None]
        return stored.repeat_interleave(packing.PAGE, dim=2)


_LARGEST = 448.0  # of e4m3fn
_TINY = 1e-30
