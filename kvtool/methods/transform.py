"""Transform coding, calibrated: keys and values in bases fitted offline, read from packed pages by linear maps.

For keys, mu is the mean before RoPE and R(n) the rotation of position n; W and A belong to a KV head:

    delta_n = k_n - R(n) mu          z = W delta_n         codes, gains = chain of stages (transform/code.py)
    q . k_n ~ q . R(n) mu + sum_s g_s (A_s q) . c_s        v_n ~ sum_s g_s A_s c_s

Which coefficients a stage codes differs by head, its widths by layer, keys and values; they are chosen by reverse
water-filling over the model on measured attention errors (transform/waterfill.py), and the value decoders are fitted to
attention outputs (fitting.py). docs/methods/transform.md says what is taken from whom.
"""

from collections.abc import Mapping
from functools import partial
from itertools import chain as join
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from kvtool import centring, packing, rotation
from kvtool.errors import MethodOptionError, ModelError
from kvtool.methods.base import Carry, Decompressed, LayerCalibration, Method, Progress
from kvtool.packing import GROUP, PAGE
from kvtool.shapes import CacheShape, LayerShape, TensorSpec
from kvtool.transform import code as chain
from kvtool.transform import fit as fitting
from kvtool.transform import waterfill
from kvtool.transform.code import Code, Coded
from kvtool.transform.fit import Samples, Statistics

if TYPE_CHECKING:
    from kvtool.capture import Capture, LayerSample

SIDES = ("key", "value")


class TransformKV(NamedTuple):
    """N pages of 64 tokens; S stages of keys, S' of values.

    key_pages, value_pages: uint8 [B, H, N, page bytes], 32 channels per stage.
    key_gains, value_gains: uint8 [B, H, N, 32 S], 4 bits per token and stage.
    outside: uint8 [B, H, N]; bit 0: the page's keys do not look like those calibrated on and lie in the plain
        rotation; bit 1: the values.
    """

    key_pages: Tensor
    key_gains: Tensor
    value_pages: Tensor
    value_gains: Tensor
    outside: Tensor


@dataclass(frozen=True)
class Transform(Method):
    """Calibrated transform coding with water-filled widths."""

    name: ClassVar[str] = "transform"
    paper: ClassVar[str] = "https://arxiv.org/abs/2511.01815"
    summary: ClassVar[str] = "transform coding fitted to the model, with bits spent where attention needs them"
    sees_sinks: ClassVar[bool] = True
    widest: ClassVar[int] = 8  # bits of a stage at most

    bits: float = Field(2.25, ge=0.5, le=16, description="average bits per value, gains and flags included")
    scope: Literal["model", "layer"] = Field("model", description="share the budget over the model, or layer by layer")
    guard: float = Field(
        0.25, gt=0, le=1, description="share of a page's tokens beyond the calibrated range that makes it plain"
    )
    seed: int = Field(0, ge=0, description="of the random rotations")

    def compress(
        self,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        queries: Tensor | None = None,
        carry: Carry = None,
    ) -> tuple[TransformKV, Carry]:
        delta = keys.float() - centring.at(layer["key_mean"], "rotated", layer.rope, positions)
        key, key_outside = self._encode(delta, layer, "key")
        value, value_outside = self._encode(values.float(), layer, "value")
        return (
            TransformKV(
                packing.pack_keys(key.codes, widths(layer, "key")),
                packing.pack_nibbles(key.gains),
                packing.pack_values(value.codes, widths(layer, "value")),
                packing.pack_nibbles(value.gains),
                key_outside.to(torch.uint8) | (value_outside.to(torch.uint8) << 1),
            ),
            None,
        )

    def decompress(self, kv: TransformKV, layer: LayerCalibration, *, positions: Tensor) -> Decompressed:
        keys, values = widths(layer, "key"), widths(layer, "value")
        codes = packing.unpack_keys(kv.key_pages, keys, GROUP * len(keys))
        delta = _decode(codes, kv.key_gains, kv.outside & 1, layer, "key")
        codes = packing.unpack_values(kv.value_pages, values, GROUP * len(values))
        read = _decode(codes, kv.value_gains, kv.outside >> 1, layer, "value")
        return Decompressed(delta + centring.at(layer["key_mean"], "rotated", layer.rope, positions), read)

    def notes(self, kv: TransformKV) -> dict[str, float]:
        outside = torch.stack([kv.outside & 1, kv.outside >> 1]).float()
        return {"of pages outside what was calibrated": outside.mean().item()}

    def _encode(self, x: Tensor, layer: LayerCalibration, side: str) -> tuple[Coded, Tensor]:
        """Codes of ``x`` [B, H, T, D], and which pages [B, H, N] are coded plainly."""
        if not x.isfinite().all():
            raise ModelError(
                f"layer {layer.index}: {side}s: expected finite numbers, found NaN or infinity; "
                "the model's cache has overflowed: load the model in bfloat16 or float32"
            )
        coded = chain.encode(x, code_of(layer, side))
        outside = coded.clipped.unflatten(-1, (-1, PAGE)).float().mean(-1) > self.guard
        if outside.any():
            plain = chain.encode(x, plain_code(layer, side))
            tokens = outside.repeat_interleave(PAGE, -1)
            coded = Coded(
                torch.where(tokens[..., None], plain.codes, coded.codes),
                torch.where(tokens[..., None, :], plain.gains, coded.gains),
                coded.clipped,
            )
        return coded, outside

    # what the artifact holds

    def layer_schema(self, shape: LayerShape) -> dict[str, TensorSpec]:
        H, D = shape.num_kv_heads, shape.head_dim
        S, C = waterfill.max_stages(D), max(D, GROUP)
        schema = {"key_mean": centring.spec(shape)}
        for side in SIDES:
            schema |= {
                f"{side}_widths": TensorSpec("int8", (S,)),
                f"{side}_basis": TensorSpec("float32", (H, C, D)),
                f"{side}_order": TensorSpec("int16", (H, S, GROUP)),
                f"{side}_deviation": TensorSpec("float32", (H, S, GROUP)),
                f"{side}_gain_base": TensorSpec("float32", (H, S)),
                f"{side}_decoder": TensorSpec("float16", (H, GROUP * S, D)),
                f"{side}_plain": rotation.spec("hadamard", H, D),
                f"{side}_plain_base": TensorSpec("float32", (H, S)),
            }
        return schema

    def fit(self, capture: "Capture", *, progress: Progress | None = None) -> dict[str, Tensor]:
        layers = capture.layers
        done, steps = 0, 2 * len(layers)

        def step() -> None:
            nonlocal done
            done += 1
            if progress:
                progress(done, steps)

        statistics, plain, options = {}, {}, {}
        for i in layers:
            samples = partial(capture.samples, i)
            statistics[i] = fitting.statistics(samples)
            plain[i] = self._plain(capture.shape.layers[i], i)
            options[i] = [
                waterfill.candidates(side, statistics[i], samples, plain[i][side], self.bits, self.widest)
                for side in SIDES
            ]
            step()
        chosen = self._choose(capture.shape, options)
        tensors: dict[str, Tensor] = {}
        for i in layers:
            for side, candidate in zip(SIDES, chosen[i], strict=True):
                fields = _fit_side(side, candidate, statistics[i], plain[i][side], partial(capture.samples, i))
                tensors |= {f"layers.{i}.{side}_{field}": tensor for field, tensor in fields.items()}
            tensors[f"layers.{i}.key_mean"] = statistics[i].mean
            step()
        return tensors

    def _choose(
        self, shape: CacheShape, options: Mapping[int, list[list[waterfill.Candidate]]]
    ) -> dict[int, list[waterfill.Candidate]]:
        """Candidates of keys and values of every layer, within the budget of its scope."""
        scopes = [list(options)] if self.scope == "model" else [[i] for i in options]
        chosen: dict[int, list[waterfill.Candidate]] = {}
        for scope in scopes:
            # flags: one byte a page
            budget = sum(self.bits * 2 * shape.layers[i].head_dim - 8 / PAGE for i in scope)
            items = list(join.from_iterable(options[i] for i in scope))
            try:
                picked = iter(waterfill.share(items, budget))
            except ValueError as error:
                raise MethodOptionError(f"transform bits={self.bits}: {error}; allow more bits") from error
            for i in scope:
                chosen[i] = [next(picked) for _ in SIDES]
        return chosen

    def _plain(self, shape: LayerShape, layer: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 10_007 + layer)
        return {side: rotation.draw("hadamard", shape.num_kv_heads, shape.head_dim, generator) for side in SIDES}


def widths(layer: LayerCalibration, side: str) -> tuple[int, ...]:
    """Bits of each stage of a side."""
    return tuple(width for width in layer[f"{side}_widths"].tolist() if width)


def code_of(layer: LayerCalibration, side: str) -> Code:
    """The fitted code of a side."""
    own = widths(layer, side)
    S = len(own)
    return Code(
        own,
        layer[f"{side}_basis"],
        layer[f"{side}_order"][:, :S].long(),
        layer[f"{side}_deviation"][:, :S],
        layer[f"{side}_gain_base"][:, :S],
    )


def plain_code(layer: LayerCalibration, side: str) -> Code:
    """The code of the same widths that assumes nothing: a random rotation, and a wide range of gains."""
    own = widths(layer, side)
    turn, variance = fitting.plain_basis(layer[f"{side}_plain"])
    order, deviation, _ = chain.pick(variance, own)
    return Code(own, turn, order, deviation, layer[f"{side}_plain_base"][:, : len(own)])


def maps(layer: LayerCalibration, side: str) -> Tensor:
    """A, float32 [H, 32 S, D]: channels as stored to channels of the model; q A^T is what a kernel multiplies."""
    return layer[f"{side}_decoder"][:, : GROUP * len(widths(layer, side))].float()


def _decode(codes: Tensor, gains: Tensor, outside: Tensor, layer: LayerCalibration, side: str) -> Tensor:
    code = code_of(layer, side)
    coded = Coded(codes, packing.unpack_nibbles(gains, len(code.widths)), codes.new_empty(0))
    x = chain.features(coded, code) @ maps(layer, side)
    if outside.any():
        other = plain_code(layer, side)
        tokens = outside.bool().repeat_interleave(PAGE, -1)[..., None]
        x = torch.where(tokens, chain.features(coded, other) @ chain.decoder(other), x)
    return x


def _fit_side(
    side: str, candidate: waterfill.Candidate, statistics: Statistics, plain: Tensor, samples: Samples
) -> dict[str, Tensor]:
    """The tensors of one side of one layer."""
    H, _, D = statistics.keys.shape
    S = waterfill.max_stages(D)
    first = next(iter(samples()))
    examples = _vectors(side, first, statistics)[:, first.positions >= centring.SINKS][
        :, :: max(1, first.keys.shape[1] // 4096)
    ]
    code = waterfill.build(side, candidate, statistics, plain, examples)
    decoder = chain.decoder(code)
    if side == "value":
        moments = fitting.Moments(code, statistics.outputs)
        for sample in samples():
            seen = fitting.attention_of(sample, 128)
            if seen is not None:
                values = sample.values.float()
                moments.add(moments.features(values, seen.weights), seen.weights @ values)
        decoder = moments.solve()
    plain_turn, plain_variance = fitting.plain_basis(plain)
    ordinary = fitting.make_code(plain_turn, plain_variance, candidate.widths, examples)
    missing = S - len(code.widths)

    def padded(x: Tensor, rows: int = 1) -> Tensor:
        return torch.cat([x, x.new_zeros(H, missing * rows, *x.shape[2:])], 1)

    return {
        "widths": torch.tensor([*code.widths, *[0] * missing], dtype=torch.int8),
        "basis": code.basis.contiguous(),
        "order": padded(code.order).to(torch.int16),
        "deviation": padded(code.deviation),
        "gain_base": padded(code.gain_base),
        "decoder": padded(decoder, GROUP).half(),
        "plain": plain,
        # three octaves higher than anything seen: what is outside is usually too large
        "plain_base": padded(ordinary.gain_base) + 3,
    }


def _vectors(side: str, sample: "LayerSample", statistics: Statistics) -> Tensor:
    return fitting.centred(sample, statistics.mean) if side == "key" else sample.values.float()
