"""RINA: recursive one-bit stages over sub-spaces, with noise feedback on values.

Source: the RINA-1bit-KV repository (sigma-delta residual binary pursuit; no paper) and its forum description, of which
docs/methods/rina.md says what was claimed and what was measured. What is kept here is what survives measurement:

    rotate, split D into sub-spaces of s channels; for stage j = 1..J, with r the residual of one sub-space
    theta_j = half_j * t_j                      threshold, t_j fitted per head and sub-space
    b_j     = r > theta_j
    r      <- r - (b_j ? hi_j : lo_j)           hi, lo = mid_j * n +- half_j; half_j coded per token, mid_j fitted

    values:  u_t = v_t + beta e_{t-1},  e_t = clip(u_t - u'_t)      feedback within a page of 64 tokens
    output:  sum_t p_t u'_t A                   A instead of the inverse rotation, fitted to exact outputs (rina/fit.py)
    logits:  l_t + kappa/2 * scale^2 * sum_s ||q_s||^2 noise_{s,t}   the bias of exp under the noise of token t

``n`` is the token's norm over sqrt(D), a float of 8 bits. Of every page, the ``extra`` keys whose noise does most harm
have one more stage. With ``target_bits``, stages go where their noise does most damage instead (rina/placed.py).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from kvtool import attention, centring, packing, rotation
from kvtool.attention import Attended
from kvtool.centring import Centre
from kvtool.errors import CaptureError
from kvtool.methods.base import FITTED_MARGIN, Carry, Claim, Decompressed, LayerCalibration, Method, Progress
from kvtool.methods.finite import require_finite_tokens
from kvtool.methods.transform import TransformKV
from kvtool.rina import code, tiles
from kvtool.rina.fit import fit_beta, fit_kappa, fit_output
from kvtool.rina.placed import Placed
from kvtool.rina.tiles import TilesKV
from kvtool.shapes import CacheShape, LayerShape, Rope, TensorSpec

if TYPE_CHECKING:
    from kvtool.capture import Capture, LayerSample


class RINAKV(NamedTuple):
    """N pages of 64 tokens.

    key_pages, value_pages: uint8 [B, H, N, J * page bytes], the stages' bits as 1-bit pages one after the other.
    key_norms, value_norms: uint8 [B, H, N, 64], small floats, in the order of ``packing.pack_tokens``.
    key_halves, value_halves: uint8 [B, H, N, 32 J m], level distances of 4 bits as ``code.pack_halves`` has them.
    extra_index: uint8 [B, H, N, n], the tokens of the page whose keys have one more stage; then their bits
    extra_bits: uint8 [B, H, N, n, D/8] and level distances extra_halves: uint8 [B, H, N, n, m].
    """

    key_pages: Tensor
    key_norms: Tensor
    key_halves: Tensor
    value_pages: Tensor
    value_norms: Tensor
    value_halves: Tensor
    extra_index: Tensor
    extra_bits: Tensor
    extra_halves: Tensor


AnyKV = RINAKV | TilesKV | TransformKV


def _subspace(channels: int) -> int:
    if channels not in (16, 32, 64):
        raise ValueError("expected 16, 32 or 64")
    return channels


# what speaks of stages in a random rotation
_ROTATED = ("k_stages", "v_stages", "subspace", "extra", "feedback", "correction", "mean")
Subspace = Annotated[int, AfterValidator(_subspace)]


@dataclass(frozen=True)
class RINA(Method):
    """Recursive one-bit stages with noise feedback."""

    name: ClassVar[str] = "rina"
    paper: ClassVar[str] = "https://github.com/Misaka477/RINA-1bit-KV"
    summary: ClassVar[str] = "recursive 1-bit stages over sub-spaces, error feedback on values, noise-corrected logits"
    sees_sinks: ClassVar[bool] = True

    k_stages: int = Field(1, ge=1, le=8, description="one-bit stages of keys")
    v_stages: int = Field(1, ge=1, le=8, description="one-bit stages of values")
    subspace: Subspace = Field(32, description="channels that share a level distance; head_dim if smaller")
    extra: int = Field(0, ge=0, le=32, description="keys of each page of 64 with one more stage: the noisiest")
    feedback: bool = Field(True, description="carry the error of a value to the next, where attention is diffuse")
    correction: bool = Field(True, description="correct the logits for the noise of each key")
    mean: Centre = Field("rotated", description="mean removed from keys")
    seed: int = Field(0, ge=0, description="of the rotations")
    target_bits: float | None = Field(
        None, ge=0.5, le=4, description="place stages in layers, sides and sub-spaces: at most so many bits on average"
    )
    variant: Literal["kvtool", "published"] = Field("kvtool", description="or the published tile pursuit, to compare")

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.target_bits is not None:
            if self.variant == "published":
                raise ValueError("target_bits chooses for variant kvtool; give variant published its stages")
            given = [name for name in _ROTATED if getattr(self, name) != getattr(type(self), name)]
            if given:
                raise ValueError(f"target_bits chooses {', '.join(given)}; give one or the other")
        return self

    @cached_property
    def placed(self) -> Placed | None:
        """What ``target_bits`` stands for."""
        return (
            None
            if self.target_bits is None
            else Placed(bits=self.target_bits, scope="model", guard=0.25, context=None, seed=self.seed)
        )

    def data_free(self) -> Self | None:
        return None  # the levels are fitted: there is no version without data

    def compress(
        self,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        queries: Tensor | None = None,
        carry: Carry = None,
    ) -> tuple[AnyKV, Carry]:
        if self.placed is not None:
            kv, _ = self.placed.compress(keys, values, layer, positions=positions)
            assert isinstance(kv, TransformKV)
            return kv, None
        if self.variant == "published":
            return tiles.compress(keys, values, layer, self.k_stages, self.v_stages), None
        require_finite_tokens(keys, values, layer.index)
        k = rotation.rotate(keys.float() - self.centre(layer, positions), layer["key_rotation"])
        v = rotation.rotate(values, layer["value_rotation"])
        k_norm, k_unit = _norms(k)
        key = code.encode(k / k_unit[..., None].clamp_min(_TINY), _stages(layer, "key", self.k_stages))
        extra = self._extra(k / k_unit[..., None].clamp_min(_TINY) - key.decoded, k_unit, layer)
        v_norm, v_unit = _norms(v)
        pages = v.unflatten(2, (-1, packing.PAGE)).transpose(1, 2)  # [B, N, H, 64, D]
        units = v_unit.unflatten(2, (-1, packing.PAGE)).transpose(1, 2)
        _, value = code.feedback(pages, layer["beta"], units, _stages(layer, "value", self.v_stages))
        value_bits = value.bits.transpose(2, 3).flatten(3, 4)  # [J, B, H, T, D]
        value_halves = value.half_codes.transpose(1, 2).flatten(2, 3)  # [B, H, T, m, J]
        return RINAKV(
            _pack_stages(key.bits, packing.pack_keys),
            packing.pack_tokens(k_norm),
            code.pack_halves(key.half_codes),
            _pack_stages(value_bits, packing.pack_values),
            packing.pack_tokens(v_norm),
            code.pack_halves(value_halves),
            *extra,
        ), None

    def decompress(self, kv: AnyKV, layer: LayerCalibration, *, positions: Tensor) -> Decompressed:
        if isinstance(kv, TilesKV):
            return tiles.decompress(kv, layer)
        if isinstance(kv, TransformKV):
            assert self.placed is not None
            return self.placed.decompress(kv, layer, positions=positions)
        k, _ = self._keys(kv, layer)
        D = layer.shape.head_dim
        bits = _unpack_stages(kv.value_pages, self.v_stages, D, packing.unpack_values)
        halves = code.unpack_halves(kv.value_halves, self._spaces(D), self.v_stages)
        unit = code.decode_norm(packing.unpack_tokens(kv.value_norms)) / math.sqrt(D)
        v = code.decode(bits, halves, _stages(layer, "value", self.v_stages)) * unit[..., None]
        keys = rotation.unrotate(k, layer["key_rotation"]) + self.centre(layer, positions)
        return Decompressed(keys, v @ layer["value_decoder"])

    def attend(
        self,
        queries: Tensor,
        kv: AnyKV,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        scale: float,
        softcap: float | None = None,
    ) -> Attended:
        if not isinstance(kv, RINAKV):
            return super().attend(queries, kv, layer, positions=positions, scale=scale, softcap=softcap)
        values = self.decompress(kv, layer, positions=positions).values
        logits = self.logits(queries, kv, layer, positions=positions, scale=scale, softcap=softcap)
        return attention.from_logits(logits, values)

    def logits(
        self,
        queries: Tensor,
        kv: RINAKV,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Logits of the compressed keys, corrected and capped, [B, H, G, S, T]."""
        keys, _ = self._keys(kv, layer)
        keys = rotation.unrotate(keys, layer["key_rotation"]) + self.centre(layer, positions)
        logits = attention.logits(queries, keys, scale=scale)
        if self.correction:
            logits = logits + self.correction_of(queries, kv, layer, scale=scale)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def _keys(self, kv: RINAKV, layer: LayerCalibration) -> tuple[Tensor, Tensor]:
        """Rotated, centred keys [B, H, T, D], and the variance of their noise per sub-space [B, H, T, m]."""
        D = layer.shape.head_dim
        m = self._spaces(D)
        stages = _stages(layer, "key", self.k_stages)
        halves = code.unpack_halves(kv.key_halves, m, self.k_stages)
        unit = code.decode_norm(packing.unpack_tokens(kv.key_norms)) / math.sqrt(D)  # [B, H, T]
        y = code.decode(_unpack_stages(kv.key_pages, self.k_stages, D, packing.unpack_keys), halves, stages)
        noise = layer["key_noise"][:, None, :, self.k_stages - 1].expand(*y.shape[:-1], m)
        if self.extra:
            index, y_more, less = self._read_extra(kv, layer)
            y = y.scatter_add(2, index[..., None].expand(*index.shape, D), y_more)
            noise = noise.scatter(2, index[..., None].expand(*index.shape, m), less)
        return y * unit[..., None], noise * unit[..., None].square()

    def correction_of(self, queries: Tensor, kv: RINAKV, layer: LayerCalibration, *, scale: float) -> Tensor:
        """kappa/2 times the variance of each logit, [B, H, G, S, T]."""
        B, HQ, S, D = queries.shape
        H = layer.shape.num_kv_heads
        q = rotation.rotate(queries.reshape(B, H, -1, D), layer["key_rotation"]).reshape(B, H, HQ // H, S, D)
        energy = q.unflatten(-1, (self._spaces(D), -1)).square().sum(-1)  # [B, H, G, S, m]
        _, noise = self._keys(kv, layer)
        variance = scale**2 * energy @ noise[:, :, None].mT
        return layer["kappa"].reshape(H, HQ // H, 1, 1) / 2 * variance

    def claims(self, shape: CacheShape, tensors: Mapping[str, Tensor]) -> Sequence[Claim]:
        """The noise estimate that decides stages and corrects logits; of the published form what its source says."""
        if self.variant == "published":
            return [
                Claim("key_nmse", 1 - 0.9519**2, "expected", "its repository: cosine of keys .9519"),
                Claim("value_nmse", 1 - 0.9916**2, "expected", "its repository: cosine of values .9916"),
                Claim("bits_per_value", 1.0, "always", "its name: 1 bit"),
            ]
        if self.target_bits is not None:
            return ()
        claims = []
        for i in shape.compressible:
            noise = float(tensors[f"layers.{i}.key_noise"][..., self.k_stages - 1].mean())
            claims.append(Claim("residual_nmse", FITTED_MARGIN * noise, "expected", "calibration", i))
        return claims

    def notes(self, kv: AnyKV) -> dict[str, float]:
        return self.placed.notes(kv) if self.placed is not None and isinstance(kv, TransformKV) else {}

    # one more stage for the keys whose noise does most damage

    def _extra(self, residual: Tensor, unit: Tensor, layer: LayerCalibration) -> tuple[Tensor, Tensor, Tensor]:
        """Index, bits and level distances of the extra stage; ``residual`` [B, H, T, D] in units of ``unit``."""
        T, D = residual.shape[-2:]
        pages = residual.unflatten(2, (-1, packing.PAGE))
        # damage to the logits: the residual in the metric of the queries
        weight = layer["query_energy"].repeat_interleave(D // self._spaces(D), -1)[:, None, None]
        damage = (pages.square() * weight).sum(-1) * unit.unflatten(2, (-1, packing.PAGE)).square()
        index = damage.topk(self.extra, -1).indices.sort(-1).values  # [B, H, N, n]
        chosen = pages.gather(3, index[..., None].expand(*index.shape, D)).flatten(2, 3)
        more = code.encode(chosen, _stages(layer, "key", 1, first=self.k_stages))
        weights = 2 ** torch.arange(8, device=residual.device, dtype=torch.uint8)
        bits = (more.bits[0].unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
        shape = (T // packing.PAGE, self.extra)
        return index.to(torch.uint8), bits.unflatten(2, shape), more.half_codes[..., 0].unflatten(2, shape)

    def _read_extra(self, kv: RINAKV, layer: LayerCalibration) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, H, n'], what to add to them [B, H, n', D], and the noise that remains [B, H, n', m]."""
        N = kv.extra_index.shape[2]
        pages = packing.PAGE * torch.arange(N, device=kv.extra_index.device)[:, None]
        index = (kv.extra_index.long() + pages).flatten(2)
        bits = (kv.extra_bits[..., None] >> torch.arange(8, device=index.device, dtype=torch.uint8) & 1).flatten(-2)
        stage = _stages(layer, "key", 1, first=self.k_stages)
        more = code.decode(bits.flatten(2, 3)[None], kv.extra_halves.flatten(2, 3)[..., None], stage)
        left = layer["key_noise"][:, None, :, self.k_stages].expand(*more.shape[:-1], -1)
        return index, more, left

    # what the artifact holds

    def _spaces(self, head_dim: int) -> int:
        return head_dim // math.gcd(head_dim, self.subspace)

    def centre(self, layer: LayerCalibration, positions: Tensor) -> Tensor | float:
        """What is subtracted from the keys at ``positions`` [T]: float32 [H, T, D], or nothing."""
        return 0.0 if self.mean == "none" else centring.at(layer["key_mean"], self.mean, layer.rope, positions)

    def layer_schema(self, shape: LayerShape) -> dict[str, TensorSpec]:
        if self.variant == "published":
            return tiles.layer_schema(shape)
        if self.placed is not None:
            return self.placed.layer_schema(shape)
        H, D = shape.num_kv_heads, shape.head_dim
        m = self._spaces(D)
        schema = {
            "key_rotation": rotation.spec("hadamard", H, D),
            "value_rotation": rotation.spec("hadamard", H, D),
            "key_mids": TensorSpec("float32", (H, m, self.k_stages + 1)),
            "key_halves": TensorSpec("float32", (H, m, self.k_stages + 1)),
            "key_noise": TensorSpec("float32", (H, m, self.k_stages + 1)),
            "value_mids": TensorSpec("float32", (H, m, self.v_stages)),
            "value_halves": TensorSpec("float32", (H, m, self.v_stages)),
            "query_energy": TensorSpec("float32", (H, m)),
            "value_decoder": TensorSpec("float32", (H, D, D)),
            "beta": TensorSpec("float32", (H,)),
            "kappa": TensorSpec("float32", (shape.num_heads,)),
        }
        if self.mean != "none":
            schema["key_mean"] = centring.spec(shape)
        return schema

    def fit(self, capture: "Capture", *, progress: Progress | None = None) -> dict[str, Tensor]:
        return (
            super().fit(capture, progress=progress)
            if self.placed is None
            else self.placed.fit(capture, progress=progress)
        )

    def fit_layer(
        self, shape: LayerShape, rope: Rope | None, samples: "Iterable[LayerSample]", *, layer: int
    ) -> dict[str, Tensor]:
        if self.variant == "published":
            return tiles.draw(shape, self.seed)
        H, D = shape.num_kv_heads, shape.head_dim
        samples = list(samples)
        generator = torch.Generator().manual_seed(self.seed * 10_007 + layer)
        tensors = {f"{side}_rotation": rotation.draw("hadamard", H, D, generator) for side in ("key", "value")}
        if self.mean != "none":
            tensors["key_mean"] = centring.fit_mean(samples, self.mean)
        fitted = LayerCalibration(layer, shape, rope, tensors)  # sees the tensors as they come
        keys, values, energy = [], [], torch.zeros(H, self._spaces(D))
        for sample in samples:
            if sample.queries is None:
                raise CaptureError(f"layer {layer}: the capture has no queries; capture with --queries all")
            keep = sample.positions >= centring.SINKS
            centred = sample.keys.float() - self.centre(fitted, sample.positions)
            keys.append(rotation.rotate(centred[:, keep], tensors["key_rotation"]))
            values.append(rotation.rotate(sample.values[:, keep], tensors["value_rotation"]))
            q = rotation.rotate(sample.queries.reshape(H, -1, D), tensors["key_rotation"])
            energy += q.unflatten(-1, (self._spaces(D), -1)).square().sum((1, 3))
        tensors["query_energy"] = energy / energy.sum(-1, keepdim=True)
        for side, rotated, stages in (("key", keys, self.k_stages + 1), ("value", values, self.v_stages)):
            y = torch.cat(rotated, 1)
            y = y / _norms(y)[1][..., None].clamp_min(_TINY)
            shaped = code.fit_stages(y, D // self._spaces(D), stages)
            tensors[f"{side}_mids"], tensors[f"{side}_halves"] = shaped
            if side == "key":
                tensors["key_noise"] = code.noise(y, shaped)
        tensors["value_decoder"] = rotation.matrix(tensors["value_rotation"]).clone()
        tensors["beta"], tensors["kappa"] = torch.zeros(H), torch.zeros(shape.num_heads)
        if self.correction:
            tensors["kappa"] = fit_kappa(self, fitted, samples)
        if self.feedback:
            tensors["beta"] = fit_beta(self, fitted, samples)
        tensors["value_decoder"] = fit_output(self, fitted, samples)
        return tensors


def _norms(y: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 of the norms of ``y`` [..., D], and the decoded norms over sqrt(D)."""
    codes = code.encode_norm(y.norm(dim=-1))
    return codes, code.decode_norm(codes) / math.sqrt(y.shape[-1])


def _stages(layer: LayerCalibration, side: str, count: int, first: int = 0) -> code.Stages:
    chosen = slice(first, first + count)
    return code.Stages(layer[f"{side}_mids"][..., chosen], layer[f"{side}_halves"][..., chosen])


def _pack_stages(bits: Tensor, pack: Callable[[Tensor, Sequence[int]], Tensor]) -> Tensor:
    widths = [1] * packing.groups(bits.shape[-1])
    return torch.cat([pack(stage, widths) for stage in bits], -1)


def _unpack_stages(
    pages: Tensor, count: int, head_dim: int, unpack: Callable[[Tensor, Sequence[int], int], Tensor]
) -> Tensor:
    widths = [1] * packing.groups(head_dim)
    return torch.stack([unpack(stage, widths, head_dim) for stage in pages.chunk(count, -1)])


_TINY = 1e-30
