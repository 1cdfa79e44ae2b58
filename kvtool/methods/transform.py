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
from kvtool.errors import InputError, MethodOptionError
from kvtool.methods.base import (
    LOOKS_BACK,
    WHOLE_PROMPT,
    Carry,
    Decompressed,
    LayerCalibration,
    Method,
    Progress,
)
from kvtool.methods.finite import require_finite_tokens
from kvtool.packing import GROUP, PAGE
from kvtool.shapes import CacheShape, LayerShape, TensorSpec
from kvtool.transform import code as chain
from kvtool.transform import fit as fitting
from kvtool.transform import keeping, waterfill, worth
from kvtool.transform.code import Code, Coded
from kvtool.transform.fit import Samples, Statistics
from kvtool.transform.ladder import SIDES, LadderKV
from kvtool.units import parse_tokens

if TYPE_CHECKING:
    from kvtool.capture import Capture

EVICTS_BELOW = 1.25  # bits


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

    bits: float = Field(2.25, ge=0.1, le=16, description="average bits per value, all included; below 1.25 evicts too")
    scope: Literal["model", "layer"] = Field("model", description="share the budget over the model, or layer by layer")
    guard: float = Field(
        0.25, gt=0, le=1, description="share of a page's tokens beyond the calibrated range that makes it plain"
    )
    context: str | None = Field(None, description="longest context served, e.g. 32k; the model's own if not given")
    seed: int = Field(0, ge=0, description="of the random rotations")

    def __post_init__(self) -> None:
        if self.context is not None:
            try:
                parse_tokens(self.context)
            except InputError as error:
                raise ValueError(f"context: {error}") from error
        if self.evicts:
            # which tokens stay is a choice among all of a prompt
            object.__setattr__(self, "block", None)

    @property
    def evicts(self) -> bool:
        """Whether tokens are dropped, because coding all of them would cost more than it is worth."""
        return self.bits < EVICTS_BELOW

    @property
    def looks_back(self) -> int:
        return WHOLE_PROMPT if self.evicts else LOOKS_BACK

    def begin(
        self,
        queries: Tensor | None,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        *,
        sinks: int,
        carry: Carry = None,
    ) -> Carry:
        return worth.begin(queries, keys, values, layer, sinks=sinks, carry=carry) if self.evicts else carry

    def compress(
        self,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        queries: Tensor | None = None,
        carry: Carry = None,
    ) -> tuple[TransformKV | LadderKV, Carry]:
        require_finite_tokens(keys, values, layer.index)
        if self.evicts:
            return keeping.compress(self, keys, values, layer, positions=positions, queries=queries, carry=carry)
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

    def decompress(self, kv: TransformKV | LadderKV, layer: LayerCalibration, *, positions: Tensor) -> Decompressed:
        if isinstance(kv, LadderKV):
            return keeping.decompress(kv, layer, positions)
        keys, values = widths(layer, "key"), widths(layer, "value")
        codes = packing.unpack_keys(kv.key_pages, keys, GROUP * len(keys))
        delta = _decode(codes, kv.key_gains, kv.outside & 1, layer, "key")
        codes = packing.unpack_values(kv.value_pages, values, GROUP * len(values))
        read = _decode(codes, kv.value_gains, kv.outside >> 1, layer, "value")
        return Decompressed(delta + centring.at(layer["key_mean"], "rotated", layer.rope, positions), read)

    def notes(self, kv: TransformKV | LadderKV) -> dict[str, float]:
        if isinstance(kv, LadderKV):
            return keeping.notes(kv)
        outside = torch.stack([kv.outside & 1, kv.outside >> 1]).float()
        return {"of pages outside what was calibrated": outside.mean().item()}

    def _encode(self, x: Tensor, layer: LayerCalibration, side: str) -> tuple[Coded, Tensor]:
        """Codes of ``x`` [B, H, T, D], and which pages [B, H, N] are coded plainly."""
        return chain.encode_guarded(x, code_of(layer, side), partial(plain_code, layer, side), self.guard)

    # what the artifact holds

    def layer_schema(self, shape: LayerShape) -> dict[str, TensorSpec]:
        if self.evicts:
            return keeping.schema(shape)
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
        if self.evicts:
            from kvtool.transform import sparse

            return sparse.fit(self, capture, progress)
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
            statistics[i] = fitting.statistics(samples, self.longest(capture.shape))
            plain[i] = self.plain(capture.shape.layers[i], i)
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

    def longest(self, shape: CacheShape) -> int | None:
        """Tokens of the longest context served, if it is known."""
        return shape.context if self.context is None else parse_tokens(self.context)

    def plain(self, shape: LayerShape, layer: int) -> dict[str, Tensor]:
        """The random rotations of a layer, for pages outside its statistics."""
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
    return chain.decode_guarded(coded, code, maps(layer, side), partial(plain_code, layer, side), outside)


def _fit_side(
    side: str, candidate: waterfill.Candidate, statistics: Statistics, plain: Tensor, samples: Samples
) -> dict[str, Tensor]:
    """The tensors of one side of one layer."""
    first = next(iter(samples()))
    examples = fitting.examples(side, first, statistics)[:, first.positions >= centring.SINKS][
        :, :: max(1, first.keys.shape[1] // 4096)
    ]
    code = waterfill.build(side, candidate, statistics, plain, examples)
    decoder = fitting.value_decoders([code], statistics, samples)[0] if side == "value" else chain.decoder(code)
    fields = fitting.tensors_of(code, decoder, plain, examples, stages=waterfill.max_stages(plain.shape[-1]))
    return fields | {"basis": code.basis.contiguous(), "plain": plain}
