"""Min-max uniform quantisation of groups: per channel over tokens, or per token over channels.

    s = (max - min) / (2^b - 1)      code = round((x - min) / s)      x' = min + s * code

The minimum is a float, not an integer zero point: it need not lie on the grid. The defaults are the layout of KIVI
(Liu et al., https://arxiv.org/abs/2402.02750): keys per channel in groups of 32 tokens, values per token in groups of
32 channels; its residual of recent tokens is the runtime's exact window. Nothing is learnt from data.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from kvtool import packing
from kvtool.methods.base import Carry, Claim, Decompressed, LayerCalibration, Method
from kvtool.methods.finite import require_finite
from kvtool.shapes import CacheShape

if TYPE_CHECKING:
    from kvtool.bounds.measures import Evidence, Measure

Axis = Literal["channel", "token"]


class AffineKV(NamedTuple):
    """N pages of 64 tokens.

    key_pages, value_pages: uint8 [B, H, N, page bytes], packed codes.
    key_scales, key_minima, value_scales, value_minima: float16; per channel [B, H, N, 64/group, D], per token
        [B, H, N, D/group, 64] in the order of ``packing.pack_tokens``.
    """

    key_pages: Tensor
    key_scales: Tensor
    key_minima: Tensor
    value_pages: Tensor
    value_scales: Tensor
    value_minima: Tensor


def _storable(group: int) -> int:
    if group not in (0, 32, 64):
        raise ValueError("expected 32 or 64, or 0 for the whole page or head")
    return group


Group = Annotated[int, AfterValidator(_storable)]


@dataclass(frozen=True)
class Affine(Method):
    """Per-group min-max with a float minimum."""

    name: ClassVar[str] = "affine"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.02750"
    summary: ClassVar[str] = "min-max per channel or per token in groups; KIVI's layout by default"

    k_bits: int = Field(4, ge=2, le=8, description="bits per key channel; 5, 6 and 7 are stored in 8")
    v_bits: int = Field(4, ge=2, le=8, description="bits per value channel; 5, 6 and 7 are stored in 8")
    k_axis: Axis = Field("channel", description="keys: one range per channel over tokens, or per token over channels")
    v_axis: Axis = Field("token", description="values: likewise")
    k_group: Group = Field(32, description="tokens (axis channel) or channels (axis token) per range; 0: all of them")
    v_group: Group = Field(32, description="values: likewise")

    def compress(
        self,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        queries: Tensor | None = None,
        carry: Carry = None,
    ) -> tuple[AffineKV, Carry]:
        D = keys.shape[-1]
        key_codes, key_scales, key_minima = encode(keys, self.k_bits, self.k_axis, self.k_group)
        value_codes, value_scales, value_minima = encode(values, self.v_bits, self.v_axis, self.v_group)
        kv = AffineKV(
            packing.pack_keys(key_codes, _widths(self.k_bits, D)),
            key_scales,
            key_minima,
            packing.pack_values(value_codes, _widths(self.v_bits, D)),
            value_scales,
            value_minima,
        )
        require_finite(kv, layer.index)
        return kv, None

    def decompress(self, kv: AffineKV, layer: LayerCalibration, *, positions: Tensor) -> Decompressed:
        D = layer.shape.head_dim
        key_codes = packing.unpack_keys(kv.key_pages, _widths(self.k_bits, D), D)
        value_codes = packing.unpack_values(kv.value_pages, _widths(self.v_bits, D), D)
        return Decompressed(
            decode(key_codes, kv.key_scales, kv.key_minima, self.k_axis, self.k_group),
            decode(value_codes, kv.value_scales, kv.value_minima, self.v_axis, self.v_group),
        )

    def claims(self, shape: CacheShape, tensors: Mapping[str, Tensor]) -> Sequence[Claim]:
        """Rounding to a grid that reaches from minimum to maximum moves no number by more than half a step."""
        return [Claim(f"{side}_half_step", 1.0, "always", "rounding to a uniform grid") for side in ("key", "value")]

    def measures(self) -> "Mapping[str, Measure]":
        def key_half_step(evidence: "Evidence") -> Tensor:
            kv, exact, found = evidence.kv, evidence.keys, evidence.decoded.keys[0]
            most = tolerance(kv.key_scales, kv.key_minima, self.k_bits, self.k_axis, self.k_group, exact.shape[-1])
            return ((found - exact).abs() / most[0]).amax(-1)

        def value_half_step(evidence: "Evidence") -> Tensor:
            kv, exact, found = evidence.kv, evidence.values, evidence.decoded.values[0]
            most = tolerance(kv.value_scales, kv.value_minima, self.v_bits, self.v_axis, self.v_group, exact.shape[-1])
            return ((found - exact).abs() / most[0]).amax(-1)

        return {"key_half_step": key_half_step, "value_half_step": value_half_step}


def _widths(bits: int, head_dim: int) -> list[int]:
    return [bits if bits <= 4 else 8] * packing.groups(head_dim)


def encode(x: Tensor, bits: int, axis: Axis, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [B, H, T, D], scales and minima float16, from ``x`` [B, H, T, D]."""
    grouped = _group(x.float(), axis, group)
    low, high = grouped.aminmax(dim=-1)
    scale, low = ((high - low) / (2**bits - 1)).half(), low.half()
    # codes are for the rounded scale and minimum, the ones that will be read
    codes = (grouped - low.float()[..., None]) / scale.float().clamp_min(_TINY)[..., None]
    codes = codes.round().nan_to_num(nan=0).clamp(0, 2**bits - 1).to(torch.uint8)
    return _ungroup(codes, axis, group, x.shape[-1]), _pack(scale, axis), _pack(low, axis)


def decode(codes: Tensor, scales: Tensor, minima: Tensor, axis: Axis, group: int) -> Tensor:
    """The inverse of :func:`encode`: float32 [B, H, T, D]."""
    scale, low = (_unpack(ranges, axis).float()[..., None] for ranges in (scales, minima))
    return _ungroup(low + scale * _group(codes, axis, group), axis, group, codes.shape[-1])


def tolerance(scales: Tensor, minima: Tensor, bits: int, axis: Axis, group: int, head_dim: int) -> Tensor:
    """The most a number may be off, [B, H, T, D]: half a step, and what float16 made of the range.

    The minimum and each step are rounded by up to 2^-11 of themselves, so the end of the grid by 2^b - 1 of the latter.
    """
    scale, low = (_unpack(ranges, axis).float()[..., None] for ranges in (scales, minima))
    most = 0.5 * scale + 2.0**-11 * (low.abs() + (2**bits - 1) * scale) + _TINY
    size = group or (packing.PAGE if axis == "channel" else head_dim)
    size = min(size, head_dim) if axis == "token" else size
    return _ungroup(most.expand(*most.shape[:-1], size), axis, group, head_dim)


def _group(x: Tensor, axis: Axis, group: int) -> Tensor:
    """[B, H, T, D] to [B, H, N, 64/group, D, group] per channel, to [B, H, T, D/group, group] per token."""
    D = x.shape[-1]
    if axis == "channel":
        return x.unflatten(-2, (-1, packing.PAGE // (group or packing.PAGE), group or packing.PAGE)).mT
    group = min(group or D, D)
    # a last, shorter group is filled with its own last channel, which leaves its range alone
    index = torch.arange(-(-D // group) * group, device=x.device).clamp_max(D - 1)
    return x[..., index].unflatten(-1, (-1, group))


def _ungroup(grouped: Tensor, axis: Axis, group: int, head_dim: int) -> Tensor:
    """The inverse of :func:`_group`."""
    return grouped.mT.flatten(2, 4) if axis == "channel" else grouped.flatten(-2)[..., :head_dim]


def _pack(ranges: Tensor, axis: Axis) -> Tensor:
    """[B, H, T, groups] per token to [B, H, N, groups, 64]; per channel it is in place already."""
    return ranges if axis == "channel" else packing.pack_tokens(ranges.mT).transpose(-2, -3)


def _unpack(ranges: Tensor, axis: Axis) -> Tensor:
    return ranges if axis == "channel" else packing.unpack_tokens(ranges.transpose(-2, -3)).mT


_TINY = 2.0**-24  # the least positive float16
