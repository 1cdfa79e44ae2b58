"""H1B: one-bit key sketches, four-bit values.

Source: Vejendla, H1B-KV, https://arxiv.org/abs/2510.05529 (abstract; no code was published). Sign random projections:
Charikar 2002, and Goemans and Williamson 1995 for the arcsine law.

    paper      here
    R          projection [H, b, D], b = sketch_bits * D, rows orthogonal in blocks of D
    s_k = sign(R k), s_q = sign(R q)
    a          1 - 2 Ham(s_q, s_k) / b; its mean is 1 - 2 theta / pi

As published a is the logit itself, within [-1, 1] whatever the norms: a network that was not retrained for it attends
almost uniformly. ``score=cosine`` keeps the key's norm, maps a to a cosine and fits one temperature per query head:

    logit = scale * (tau ||q|| ||k - m|| cos(pi Ham / b) + q.m)        m the calibrated mean of the keys
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from kvtool import attention, centring, packing, rotation
from kvtool.attention import Attended
from kvtool.centring import Centre
from kvtool.errors import CaptureError
from kvtool.methods import affine
from kvtool.methods.base import Carry, Claim, Decompressed, LayerCalibration, Method, Progress
from kvtool.methods.finite import require_finite
from kvtool.shapes import CacheShape, LayerShape, Rope, TensorSpec

if TYPE_CHECKING:
    from kvtool.bounds.measures import Evidence, Measure
    from kvtool.calibration import Calibration
    from kvtool.capture import Capture, LayerSample
    from kvtool.finetune.training import Tuned
    from kvtool.models import LoadedModel


class H1BKV(NamedTuple):
    """N pages of 64 tokens.

    key_pages: uint8 [B, H, N, 8 b], the sketch's bits as 1-bit codes of b channels.
    key_norms: float16 [B, H, N, 64] in the order of ``packing.pack_tokens``; no bytes as published.
    value_pages: uint8 [B, H, N, page bytes]. value_scales, value_minima: float16 [B, H, N, 1, 64].
    """

    key_pages: Tensor
    key_norms: Tensor
    value_pages: Tensor
    value_scales: Tensor
    value_minima: Tensor


def _storable(bits: int) -> int:
    if bits not in (2, 3, 4, 8):
        raise ValueError("expected 2, 3, 4 or 8")
    return bits


ValueBits = Annotated[int, AfterValidator(_storable)]


@dataclass(frozen=True)
class H1B(Method):
    """Sign random projections for keys, min-max for values."""

    name: ClassVar[str] = "h1b"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.05529"
    summary: ClassVar[str] = "1-bit sign sketches of the keys, compared with the query's; 4-bit values"

    sketch_bits: int = Field(1, ge=1, le=8, description="bits of sketch per key channel: b = sketch_bits * head_dim")
    v_bits: ValueBits = Field(4, description="bits per value channel, min-max per token")
    score: Literal["cosine", "published"] = Field("cosine", description="a calibrated logit, or the bare agreement")
    mean: Centre = Field("rotated", description="mean removed from keys before the sketch")
    seed: int = Field(0, ge=0, description="of the projection")
    finetune_steps: int = Field(0, ge=0, le=100_000, description="LoRA steps that adapt the model to it; 0: none")
    finetune_rank: int = Field(8, ge=1, le=256, description="rank of the adapter")
    finetune_tokens: int = Field(512, ge=128, le=8192, description="tokens of text per step")

    def data_free(self) -> Self | None:
        free = replace(self, mean="none", score="published")
        return None if free == self else free

    def tune(
        self,
        calibration: "Calibration",
        capture: "Capture",
        *,
        model: "Callable[[], LoadedModel]",
        stop: int,
        progress: Progress | None = None,
    ) -> "Tuned | None":
        if not self.finetune_steps:
            return None
        from kvtool.finetune.training import finetune

        return finetune(model(), calibration, capture, stop=stop, progress=progress)

    def compress(
        self,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        queries: Tensor | None = None,
        carry: Carry = None,
    ) -> tuple[H1BKV, Carry]:
        D = layer.shape.head_dim
        centred = keys.float() - self.removed(layer, positions)
        norms = packing.pack_tokens(centred.norm(dim=-1)).half()
        value_codes, scales, minima = affine.encode(values, self.v_bits, "token", 0)
        kv = H1BKV(
            packing.pack_keys(self.sketch(centred, layer), self._key_widths(D)),
            norms if self.score == "cosine" else norms[..., :0],
            packing.pack_values(value_codes, [self.v_bits] * packing.groups(D)),
            scales,
            minima,
        )
        # the norms are looked at even where they are not stored: a NaN in a key leaves no trace in its sketch
        require_finite(kv._replace(key_norms=norms), layer.index)
        return kv, None

    def sketch(self, x: Tensor, layer: LayerCalibration) -> Tensor:
        """sign(R x) as 0 or 1, uint8 [B, H, ..., b], for ``x`` [B, H, ..., D]."""
        projection = layer["projection"].reshape(1, len(layer["projection"]), *(1,) * (x.dim() - 4), -1, x.shape[-1])
        return (x.float() @ projection.mT > 0).to(torch.uint8)

    def agreement(self, queries: Tensor, keys: Tensor) -> Tensor:
        """a = 1 - 2 Ham/b, float32 [B, H, G, S, T], of bits ``queries`` [B, H, G, S, b] and ``keys`` [B, H, T, b]."""
        # products of +-1 sum to b - 2 Ham: whole numbers, exact in float32
        signs = (2 * queries.float() - 1) @ (2 * keys.float() - 1)[:, :, None].mT
        return signs / keys.shape[-1]

    def logits(self, queries: Tensor, kv: H1BKV, layer: LayerCalibration, *, positions: Tensor, scale: float) -> Tensor:
        """Estimated logits [B, H, G, S, T] of ``queries`` [B, HQ, S, D]."""
        B, HQ, S, D = queries.shape
        H = layer.shape.num_kv_heads
        q = queries.float().reshape(B, H, HQ // H, S, D)
        keys = packing.unpack_keys(kv.key_pages, self._key_widths(D), self.sketch_bits * D)
        a = self.agreement(self.sketch(q, layer), keys)
        if self.score == "published":
            return a
        norms = packing.unpack_tokens(kv.key_norms).float()[:, :, None, None]  # [B, H, 1, 1, T]
        tau = layer["temperature"].reshape(H, HQ // H, 1, 1)
        # Ham = b (1 - a) / 2, so the angle is pi (1 - a) / 2 and its cosine sin(pi a / 2)
        estimate = tau * q.norm(dim=-1, keepdim=True) * norms * torch.sin(math.pi / 2 * a)
        removed = self.removed(layer, positions)
        if isinstance(removed, Tensor):
            estimate = estimate + q @ removed[:, None].mT
        return scale * estimate

    def attend(
        self,
        queries: Tensor,
        kv: H1BKV,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        scale: float,
        softcap: float | None = None,
    ) -> Attended:
        logits = self.logits(queries, kv, layer, positions=positions, scale=scale)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return attention.from_logits(logits, self._values(kv, layer))

    def decompress(self, kv: H1BKV, layer: LayerCalibration, *, positions: Tensor) -> Decompressed:
        """What a dequantiser can do with the sketch, for inspection: ||k|| times the mean direction of its cell."""
        D = layer.shape.head_dim
        bits = 2 * packing.unpack_keys(kv.key_pages, self._key_widths(D), self.sketch_bits * D).float() - 1
        direction = bits @ layer["projection"]
        direction = direction / direction.norm(dim=-1, keepdim=True)
        norms = (
            packing.unpack_tokens(kv.key_norms).float() if self.score == "cosine" else bits.new_ones(bits.shape[:-1])
        )
        return Decompressed(norms[..., None] * direction + self.removed(layer, positions), self._values(kv, layer))

    def _values(self, kv: H1BKV, layer: LayerCalibration) -> Tensor:
        D = layer.shape.head_dim
        codes = packing.unpack_values(kv.value_pages, [self.v_bits] * packing.groups(D), D)
        return affine.decode(codes, kv.value_scales, kv.value_minima, "token", 0)

    def claims(self, shape: CacheShape, tensors: Mapping[str, Tensor]) -> Sequence[Claim]:
        """The arcsine law: the agreement of two sketches is that of their angle, off by at most b tosses of a coin.

        Orthogonal rows stay below independent ones, at .6 of their variance on real pairs.
        """
        return [Claim("sketch_variance", 1.0, "expected", "arcsine law, of independent rows")]

    def measures(self) -> "Mapping[str, Measure]":
        return {"sketch_variance": self._sketch_variance}

    def _sketch_variance(self, evidence: "Evidence") -> Tensor:
        """Squared deviation of the agreement from 2/pi arcsin c, over its variance for b independent rows, per key."""
        from kvtool.bounds.measures import grouped

        layer, D = evidence.layer, evidence.layer.shape.head_dim
        q = grouped(evidence)[None]
        k = evidence.keys[None] - self.removed(layer, evidence.positions)
        kept = packing.unpack_keys(evidence.kv.key_pages, self._key_widths(D), self.sketch_bits * D)
        a = self.agreement(self.sketch(q, layer)[:, :, None], kept)[0, :, 0]  # [H, G*S, T]
        unit = [x / x.norm(dim=-1, keepdim=True).clamp_min(1e-30) for x in (q[0], k[0])]
        law = 2 / math.pi * torch.asin((unit[0] @ unit[1].mT).clamp(-1, 1))
        return ((a - law).square() * kept.shape[-1] / (1 - law.square()).clamp_min(1e-6)).mean(1)

    def removed(self, layer: LayerCalibration, positions: Tensor) -> Tensor | float:
        """What is subtracted from the keys at ``positions`` [T]: float32 [H, T, D], or nothing."""
        return 0.0 if self.mean == "none" else centring.at(layer["key_mean"], self.mean, layer.rope, positions)

    def _key_widths(self, head_dim: int) -> list[int]:
        return [1] * packing.groups(self.sketch_bits * head_dim)

    def layer_schema(self, shape: LayerShape) -> dict[str, TensorSpec]:
        H, D = shape.num_kv_heads, shape.head_dim
        schema = {"projection": TensorSpec("float32", (H, self.sketch_bits * D, D))}
        if self.score == "cosine":
            schema["temperature"] = TensorSpec("float32", (shape.num_heads,))
        if self.mean != "none":
            schema["key_mean"] = centring.spec(shape)
        return schema

    def fit_layer(
        self, shape: LayerShape, rope: Rope | None, samples: "Iterable[LayerSample]", *, layer: int
    ) -> dict[str, Tensor]:
        samples = list(samples)
        H, D = shape.num_kv_heads, shape.head_dim
        generator = torch.Generator().manual_seed(self.seed * 10_007 + layer)
        # orthogonal rows have less variance than independent ones, and each is still uniform on the sphere
        blocks = [rotation.draw("haar", H, D, generator) for _ in range(self.sketch_bits)]
        tensors = {"projection": torch.cat(blocks, 1)}
        if self.mean != "none":
            tensors["key_mean"] = centring.fit_mean(samples, self.mean)
        if self.score == "cosine":
            tensors["temperature"] = torch.ones(shape.num_heads)
            tensors["temperature"] = self._fit_temperature(LayerCalibration(layer, shape, rope, tensors), samples)
        return tensors

    def _fit_temperature(self, layer: LayerCalibration, samples: "Sequence[LayerSample]") -> Tensor:
        """Per query head, the tau of least KL divergence from exact attention, averaged over sampled queries [HQ]."""
        shape, total = layer.shape, torch.zeros(len(_TAUS), layer.shape.num_heads)
        for sample in samples:
            if sample.queries is None:
                raise CaptureError(f"layer {layer.index}: the capture has no queries; capture with --queries all")
            T = sample.keys.shape[1] // packing.PAGE * packing.PAGE
            keys, values, positions = sample.keys[None, :, :T], sample.values[None, :, :T], sample.positions[:T]
            queries = sample.queries[None, :, -_QUERIES:]
            kv, _ = self.compress(keys, values, layer, positions=positions)
            exact = attention.logits(queries, keys, scale=shape.scale)[..., centring.SINKS :].log_softmax(-1)
            # tau scales the sketched part alone, so the two parts are kept apart
            estimate = self.logits(queries, kv, layer, positions=positions, scale=shape.scale)
            removed = self.removed(layer, positions)
            fixed = (
                0.0 if not isinstance(removed, Tensor) else attention.logits(queries, removed[None], scale=shape.scale)
            )
            sketched = estimate - fixed
            for i, tau in enumerate(_TAUS):
                found = (tau * sketched + fixed)[..., centring.SINKS :].log_softmax(-1)
                divergence = (exact.exp() * (exact - found)).sum(-1).mean(-1)  # [1, H, G]
                total[i] += divergence.flatten()
        return torch.tensor(_TAUS)[total.argmin(0)]


_TAUS = [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15]
_QUERIES = 64  # of each sample: the last, which see the most keys
