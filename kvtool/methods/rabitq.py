"""RaBitQ: unbiased random codes of the angle, as a compressed cache or as a sketch that says what to read.

Sources: https://arxiv.org/abs/2405.12497 and https://arxiv.org/abs/2409.09913 (the codes), RaBitQCache,
https://arxiv.org/abs/2606.31519 (the sketch). ``rabitq_code`` has the mathematics of one vector.

mode ``codes``: keys and values as B-bit codes, read back as  centre + rescale * P u.
mode ``topp``: keys and values stay exact, a 1-bit code of each key is kept beside them, and attention reads only the
tokens that hold a share p of the softmax (``kvtool.sparse``). Memory grows by the sketch; what is read shrinks.

With centres c_k, c_q the logit is  <k - c_k, q - c_q> + q.c_k + c_q.(k - c_k), and only the first term is estimated.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from kvtool import attention, centring, packing, sparse
from kvtool.attention import Attended
from kvtool.centring import Centre
from kvtool.errors import CaptureError, ModelError
from kvtool.methods import rabitq_code as code
from kvtool.methods import rabitq_query
from kvtool.methods.base import Carry, Claim, Decompressed, LayerCalibration, Method
from kvtool.methods.finite import require_finite_tokens
from kvtool.methods.rabitq_code import Delta, RotationKind
from kvtool.shapes import CacheShape, LayerShape, Rope, TensorSpec

if TYPE_CHECKING:
    from kvtool.capture import LayerSample


# the law is a mean over rotations and a head has one: if all its vectors point one way, that one may be unlucky (the
# distortion of a vector has a relative deviation of .12 at 1 bit; three heads a layer, 2.9 deviations)
_ONE_ROTATION = 1.2


class RaBitQKV(NamedTuple):
    """Codes of N pages of 64 tokens.

    key_pages, value_pages: uint8 [B, H, N, page bytes].
    key_scales, value_scales: float16 [B, H, N, 64], in the order of ``packing.pack_tokens``.
    """

    key_pages: Tensor
    key_scales: Tensor
    value_pages: Tensor
    value_scales: Tensor


class SketchKV(NamedTuple):
    """The exact cache and its sketch.

    keys, values: [B, H, T, D] as given. code_pages: uint8 [B, H, N, page bytes] of 1-bit codes.
    code_scales: float16 [B, H, N, 64]. query_terms: float16 [B, H, T, G], c_q.(k - c_k) of each query head; no bytes
    without a query centre.
    """

    keys: Tensor
    values: Tensor
    code_pages: Tensor
    code_scales: Tensor
    query_terms: Tensor


@dataclass(frozen=True)
class RaBitQ(Method):
    """Random-rotation codes with an exact error law."""

    name: ClassVar[str] = "rabitq"
    paper: ClassVar[str] = "https://arxiv.org/abs/2409.09913"
    summary: ClassVar[str] = (
        "unbiased random codes with a proven error bound; or exact top-p attention by a 1-bit sketch"
    )
    block: ClassVar[int | None] = 128  # tokens coded together, two pages: what is newer stays exact

    mode: Literal["codes", "topp"] = Field(
        "codes", description="store codes, or sketch an exact cache for top-p reading"
    )
    k_bits: int = Field(3, ge=1, le=8, description="bits per key channel; 5, 6 and 7 are stored in 8")
    v_bits: int = Field(3, ge=1, le=8, description="bits per value channel; likewise")
    rotation: RotationKind = Field("fhtkac", description="four rounds of signs and Hadamard, or uniform (Haar)")
    mean: Centre = Field(
        "rotated", description="centre of the keys: the mean, or the pre-RoPE mean turned to the position"
    )
    delta: Delta = Field("unbiased", description="scale of a key's code; values always take least-squares")
    p: float = Field(0.95, gt=0, le=1, description="topp: share of the softmax to keep, of the tokens it applies to")
    candidates: float = Field(0.0, ge=0, lt=1, description="topp: share p' of the estimate to rescore; 0: from p")
    rescore: bool = Field(
        True, description="topp: exact logits of the candidates; false: trust the estimate, as published"
    )
    query_mean: bool = Field(
        True, description="topp: centre queries on their captured mean, 2 bytes per token and head"
    )
    query_bits: int = Field(4, ge=0, le=8, description="topp: bits of the query in the estimate; 0: as it is")
    seed: int = Field(0, ge=0, description="of the random rotations")

    @property
    def judged_by(self) -> int:
        # each of them makes three selections by halving
        return 128 if self.mode == "topp" else super().judged_by

    def data_free(self) -> Self | None:
        free = replace(self, mean="none", query_mean=False)
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
    ) -> tuple[RaBitQKV | SketchKV, Carry]:
        require_finite_tokens(keys, values, layer.index)
        residual = keys.float() - self.centre(layer, positions)
        if self.mode == "topp":
            pages, scales = _encode(residual, layer["key_rotation"], 1, "unbiased", packing.pack_keys)
            terms = keys.new_empty(*keys.shape[:3], 0)
            if self.query_mean:
                terms = torch.einsum("bhtd,hgd->bhtg", residual, self._query_centre(layer))
            return SketchKV(keys, values, pages, scales, terms.half()), None
        return RaBitQKV(
            *_encode(residual, layer["key_rotation"], self.k_bits, self.delta, packing.pack_keys),
            *_encode(values.float(), layer["value_rotation"], self.v_bits, "least-squares", packing.pack_values),
        ), None

    def decompress(self, kv: RaBitQKV | SketchKV, layer: LayerCalibration, *, positions: Tensor) -> Decompressed:
        if isinstance(kv, SketchKV):
            return Decompressed(kv.keys.float(), kv.values.float())
        D = layer.shape.head_dim
        keys = _decode(kv.key_pages, kv.key_scales, self.k_bits, D, packing.unpack_keys)
        values = _decode(kv.value_pages, kv.value_scales, self.v_bits, D, packing.unpack_values)
        keys = code.unrotate(keys, code.rotation_matrix(layer["key_rotation"]), D) + self.centre(layer, positions)
        return Decompressed(keys, code.unrotate(values, code.rotation_matrix(layer["value_rotation"]), D))

    def attend(
        self,
        queries: Tensor,
        kv: RaBitQKV | SketchKV,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        scale: float,
        softcap: float | None = None,
    ) -> Attended:
        if not isinstance(kv, SketchKV):
            return super().attend(queries, kv, layer, positions=positions, scale=scale, softcap=softcap)
        exact = attention.logits(queries, kv.keys, scale=scale, softcap=softcap)  # [B, H, G, S, T]
        kept = self.select(queries, kv, layer, exact, positions=positions, scale=scale, softcap=softcap).kept
        return attention.from_logits(exact.masked_fill(~kept, -torch.inf), kv.values)

    def reads(
        self,
        queries: Tensor,
        kv: RaBitQKV | SketchKV,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        scale: float,
        softcap: float | None = None,
    ) -> sparse.Selection | None:
        """The tokens that :meth:`attend` reads, as masks [B, H, G, S, T]; None if it reads all of them."""
        if not isinstance(kv, SketchKV):
            return None
        exact = attention.logits(queries, kv.keys, scale=scale, softcap=softcap)
        return self.select(queries, kv, layer, exact, positions=positions, scale=scale, softcap=softcap)

    def select(
        self,
        queries: Tensor,
        kv: SketchKV,
        layer: LayerCalibration,
        exact: Tensor,
        *,
        positions: Tensor,
        scale: float,
        softcap: float | None = None,
    ) -> sparse.Selection:
        """The tokens each query [B, HQ, S, D] reads, as masks of the ``exact`` logits [B, H, G, S, T]."""
        estimate = self.estimate(queries, kv, layer, positions=positions, scale=scale, softcap=softcap)
        if not self.rescore:
            kept = sparse.top_p(estimate, self.p)
            return sparse.Selection(kept, kept)
        share = max(self.candidates, self.p) if self.candidates else None
        noise = self.noise(queries, kv, layer, scale=scale)
        return sparse.select(estimate, noise, exact, self.p, share)

    def estimate(
        self,
        queries: Tensor,
        kv: SketchKV,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Logits [B, H, G, S, T] from the sketch alone: unbiased, one per query head."""
        B, HQ, S, D = queries.shape
        H = kv.keys.shape[1]
        q = queries.float().reshape(B, H, HQ // H, S, D)
        centred = q - self._query_centre(layer)[:, :, None] if self.query_mean else q
        matrix = code.rotation_matrix(layer["key_rotation"])[:, None]  # [H, 1, P, P]
        rotated = code.rotate(centred, matrix)
        if self.query_bits:
            rotated = rabitq_query.quantise(rotated, self.query_bits).dequantised()
        stored = _decode(kv.code_pages, kv.code_scales, 1, matrix.shape[-1], packing.unpack_keys)
        products = rotated @ stored[:, :, None].mT
        if self.mean != "none":
            products = products + q @ self.centre(layer, positions)[:, None].mT
        if self.query_mean:
            products = products + kv.query_terms.float().permute(0, 1, 3, 2)[:, :, :, None]
        found = products * scale
        return found if softcap is None else softcap * torch.tanh(found / softcap)

    def noise(self, queries: Tensor, kv: SketchKV, layer: LayerCalibration, *, scale: float) -> Tensor:
        """Variance of :meth:`estimate`, [B, H, G, S, T]: lemma B.3 at a right angle, every code at the mean cosine."""
        B, HQ, S, D = queries.shape
        H, P = kv.keys.shape[1], code.padded(D)
        q = queries.float().reshape(B, H, HQ // H, S, D)
        norms = (q - self._query_centre(layer)[:, :, None] if self.query_mean else q).square().sum(-1)
        # rescale = ||r|| / (<obar, o> ||u||), and ||u||^2 = P/4
        radii = packing.unpack_tokens(kv.code_scales).float().square() * (P / 4) * (1 - code.COSINE**2)
        return norms[..., None] * radii[:, :, None, None] * (scale**2 / (P - 1))

    def claims(self, shape: CacheShape, tensors: Mapping[str, Tensor]) -> Sequence[Claim]:
        if self.mode == "topp":
            return [
                Claim("missing_mass", 1 - self.p, "expected", "arXiv 2606.31519, with exact rescoring"),
                Claim("missing_mass_excess", 0.0, "always", "o - o_kept = m (o_rest - o_kept)"),
            ]
        claims = []
        for i in shape.compressible:
            P = code.padded(shape.layers[i].head_dim)
            for quantity, bits, delta in (
                ("residual_nmse", self.k_bits, self.delta),
                ("value_nmse", self.v_bits, "least-squares"),
            ):
                limit = _ONE_ROTATION * code.expected_distortion(P, bits, delta)
                claims.append(Claim(quantity, limit, "expected", f"law of a random vector of {P} channels", i))
        return claims

    # the centres

    def centre(self, layer: LayerCalibration, positions: Tensor) -> Tensor:
        """c_k at ``positions``, [H, T, D] float32; zeros without a mean."""
        H, D = layer.shape.num_kv_heads, layer.shape.head_dim
        if self.mean == "none":
            return torch.zeros((), device=positions.device).expand(H, len(positions), D)
        return centring.at(layer["key_mean"], self.mean, layer.rope, positions)

    def _query_centre(self, layer: LayerCalibration) -> Tensor:
        """c_q by KV head, [H, G, D]."""
        return layer["query_mean"].unflatten(0, (layer.shape.num_kv_heads, -1))

    def layer_schema(self, shape: LayerShape) -> dict[str, TensorSpec]:
        H, HQ, D = shape.num_kv_heads, shape.num_heads, shape.head_dim
        schema = {"key_rotation": code.rotation_spec(self.rotation, H, D)}
        if self.mode == "codes":
            schema["value_rotation"] = code.rotation_spec(self.rotation, H, D)
        if self.mean != "none":
            schema["key_mean"] = centring.spec(shape)
        if self.mode == "topp" and self.query_mean:
            schema["query_mean"] = TensorSpec("float32", (HQ, D))
        return schema

    def fit_layer(
        self, shape: LayerShape, rope: Rope | None, samples: "Iterable[LayerSample]", *, layer: int
    ) -> dict[str, Tensor]:
        H, D = shape.num_kv_heads, shape.head_dim
        generator = torch.Generator().manual_seed(self.seed * 10_007 + layer)
        tensors = {"key_rotation": code.draw_rotation(self.rotation, H, D, generator)}
        if self.mode == "codes":
            tensors["value_rotation"] = code.draw_rotation(self.rotation, H, D, generator)
        if self.mean != "none":
            tensors["key_mean"] = centring.fit_mean(samples, self.mean)
        if self.mode == "topp" and self.query_mean:
            tensors["query_mean"] = _query_mean(samples)
        return tensors


def _encode(
    residual: Tensor, rotation: Tensor, bits: int, delta: Delta, pack: Callable[[Tensor, Sequence[int]], Tensor]
) -> tuple[Tensor, Tensor]:
    """Pages and packed scales of ``residual`` [B, H, T, D]."""
    rotated = code.rotate(residual, code.rotation_matrix(rotation))
    codes = code.encode(rotated, bits)
    scales = packing.pack_tokens(code.rescale(rotated, codes, bits, delta)).half()
    if not scales.isfinite().all():
        raise ModelError(
            "rabitq: expected keys and values whose codes scale below 65504, found NaN or more; the model's cache has "
            "overflowed: load the model in bfloat16 or float32"
        )
    return pack(codes, _widths(bits, codes.shape[-1])), scales


def _decode(
    pages: Tensor, scales: Tensor, bits: int, dim: int, unpack: Callable[[Tensor, Sequence[int], int], Tensor]
) -> Tensor:
    """Rotated vectors [B, H, T, P] of the codes of a head_dim ``dim``, scaled."""
    P = code.padded(dim)
    codes = unpack(pages, _widths(bits, P), P)
    return packing.unpack_tokens(scales).float()[..., None] * code.grid(codes, bits)


def _widths(bits: int, dim: int) -> list[int]:
    """The widths of a page: the least one that holds ``bits``."""
    return [min(width for width in packing.WIDTHS if width >= bits)] * packing.groups(dim)


def _query_mean(samples: "Iterable[LayerSample]") -> Tensor:
    """The mean query of each head, float32 [HQ, D], post-RoPE: it is stored in products with keys."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for sample in samples:
        if sample.queries is None:
            raise CaptureError(
                f"layer {sample.layer}: rabitq centres queries and the capture has none; capture again with "
                "--queries all, or use -o query_mean false"
            )
        total, count = total + sample.queries.double().sum(1), count + sample.queries.shape[1]
    if not count:
        raise CaptureError("expected queries to take a mean of, found none; capture again with --queries all")
    return (total / count).float()
