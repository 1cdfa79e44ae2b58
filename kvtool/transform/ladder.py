"""Transform codes at several levels: what ``transform`` stores when there is less than a bit for most tokens.

Below about one bit per value it is better to forget tokens than to code all of them worse. Every token has a level:
0 is eviction, levels 1 to 3 are pairs of stage chains (code.py), one for its key and one for its value. Tokens of one
level and head lie together in whole pages, in order of position, as in rdkv/pages.py; two bits a token say its level.

Of a layer's tensors, side key or value, levels 1 to 3 first: ``<side>_widths`` [3, S], ``_order`` and ``_deviation``
[3, H, S, 32], ``_gain_base`` and ``_plain_base`` [3, H, S], ``_decoder`` [3, H, 32 S, D]; ``_basis`` [H, C, D] and
``_plain`` are those of all levels.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool import centring, packing, rotation
from kvtool.packing import GROUP, PAGE
from kvtool.rdkv.pages import empty, from_rows, in_rows, planes, token_levels
from kvtool.shapes import LayerShape, TensorSpec
from kvtool.transform import code as chain
from kvtool.transform import fit as fitting
from kvtool.transform.code import Code, Coded

if TYPE_CHECKING:
    from kvtool.methods.base import LayerCalibration

LEVELS = 4
PLANES = 2  # bits a token, for its level
STAGES = 4
SIDES = ("key", "value")


class LadderKV(NamedTuple):
    """One compressed run of tokens; sequences are padded to the longest of the batch.

    levels: uint8 [B, H, 2, ceil(T/8)], bit planes of each token's level.
    key_codes, value_codes: uint8 [B, bytes], the pages of all segments. key_gains, value_gains: uint8 [B, bytes],
        4 bits per token and stage. outside: uint8 [B, pages]; bit 0: the keys of a page lie in the plain rotation.
    """

    levels: Tensor
    key_codes: Tensor
    value_codes: Tensor
    key_gains: Tensor
    value_gains: Tensor
    outside: Tensor


class Rung(NamedTuple):
    """How one side of one level is coded: its code, its decoder [H, 32 S, D], and the code outside the statistics."""

    code: Code
    decoder: Tensor
    plain: Callable[[], Code]


def schema(shape: LayerShape) -> dict[str, TensorSpec]:
    """The tensors of the codes of one layer."""
    H, D, S, L = shape.num_kv_heads, shape.head_dim, STAGES, LEVELS - 1
    specs = {"key_mean": centring.spec(shape)}
    for side in SIDES:
        specs |= {
            f"{side}_widths": TensorSpec("int8", (L, S)),
            f"{side}_basis": TensorSpec("float32", (H, max(D, GROUP), D)),
            f"{side}_order": TensorSpec("int16", (L, H, S, GROUP)),
            f"{side}_deviation": TensorSpec("float32", (L, H, S, GROUP)),
            f"{side}_gain_base": TensorSpec("float32", (L, H, S)),
            f"{side}_decoder": TensorSpec("float16", (L, H, GROUP * S, D)),
            f"{side}_plain": rotation.spec("hadamard", H, D),
            f"{side}_plain_base": TensorSpec("float32", (L, H, S)),
        }
    return specs


def widths(layer: "LayerCalibration", side: str, level: int) -> tuple[int, ...]:
    """Bits of each stage of a side at ``level`` 1 to 3."""
    return tuple(width for width in layer[f"{side}_widths"][level - 1].tolist() if width)


def rung(layer: "LayerCalibration", side: str, level: int) -> Rung:
    """One side of ``level`` 1 to 3."""
    own = widths(layer, side, level)
    S = len(own)
    order, deviation, base, wide, decoder = (
        layer[f"{side}_{field}"][level - 1] for field in ("order", "deviation", "gain_base", "plain_base", "decoder")
    )
    code = Code(own, layer[f"{side}_basis"], order[:, :S].long(), deviation[:, :S], base[:, :S])

    def plain() -> Code:
        turn, variance = fitting.plain_basis(layer[f"{side}_plain"])
        picked, alike, _ = chain.pick(variance, own)
        return Code(own, turn, picked, alike, wide[:, :S])

    return Rung(code, decoder[:, : GROUP * S].float(), plain)


def page_bits(layer: "LayerCalibration") -> list[int]:
    """Bits of a page of 64 tokens at each level, all that is stored but the levels themselves."""
    return [0, *(8 * sum(_sizes(layer, level)) for level in range(1, LEVELS))]


def pack(
    keys: Tensor, values: Tensor, levels: Tensor, layer: "LayerCalibration", positions: Tensor, guard: float
) -> LadderKV:
    """Keys and values [B, H, T, D] at ``levels`` [B, H, T] to pages."""
    delta = keys.float() - centring.at(layer["key_mean"], "rotated", layer.rope, positions)
    sides = (("key", delta, packing.pack_keys), ("value", values.float(), packing.pack_values))
    rungs = {(side, level): rung(layer, side, level) for side in SIDES for level in range(1, LEVELS)}

    def encode(b: int, h: int, level: int, tokens: Tensor) -> tuple[Tensor, ...]:
        codes, gains = [], []
        outside = torch.zeros(-(-len(tokens) // PAGE), dtype=torch.uint8, device=keys.device)
        for bit, (side, x, packed) in enumerate(sides):
            one = _of_head(rungs[side, level], h)
            whole = F.pad(x[b, h, tokens], (0, 0, 0, -len(tokens) % PAGE))[None]
            coded, plainly = chain.encode_guarded(whole, one.code, one.plain, guard)
            codes.append(packed(coded.codes[0], one.code.widths).flatten())
            gains.append(packing.pack_nibbles(coded.gains[0]).flatten())
            outside |= plainly[0].to(torch.uint8) << bit
        return *codes, *gains, outside

    return LadderKV(planes(levels, PLANES), *in_rows(levels, encode, fields=5))


def unpack(kv: LadderKV, layer: "LayerCalibration", positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, H, K, D] float32 of the kept tokens, and which rows are real, bool [B, H, K]."""
    levels = token_levels(kv.levels, len(positions))
    centre = centring.at(layer["key_mean"], "rotated", layer.rope, positions)
    rungs = {(side, level): rung(layer, side, level) for side in SIDES for level in range(1, LEVELS)}
    keys, values, real = empty(levels, layer.shape.head_dim)
    sizes = {level: _sizes(layer, level) for level in range(1, LEVELS)}
    for b, h, level, tokens, rows, (*codes, key_gains, value_gains, outside) in from_rows(
        kv[1:], levels, lambda h, level: sizes[level]
    ):
        found = []
        for bit, side in enumerate(SIDES):
            one = _of_head(rungs[side, level], h)
            unpacked = packing.unpack_keys if side == "key" else packing.unpack_values
            own, gains = one.code.widths, (key_gains, value_gains)[bit]
            read = unpacked(codes[bit], own, GROUP * len(own))[None]
            coded = Coded(read, packing.unpack_nibbles(gains, len(own))[None], read.new_empty(0))
            plainly = (outside[None, :, 0] >> bit) & 1
            found.append(chain.decode_guarded(coded, one.code, one.decoder, one.plain, plainly)[0, : len(tokens)])
        keys[b, h, rows] = found[0] + centre[h, tokens]
        values[b, h, rows] = found[1]
        real[b, h, rows] = True
    return keys, values, real


def restore(
    keys: Tensor, values: Tensor, layer: "LayerCalibration", positions: Tensor, level: int
) -> tuple[Tensor, Tensor]:
    """What keys and values [..., H, T, D] look like at ``level`` 1 to 3, unguarded and unpacked: for measuring."""
    centre = centring.at(layer["key_mean"], "rotated", layer.rope, positions)
    found = []
    for side, x in (("key", keys.float() - centre), ("value", values.float())):
        one = rung(layer, side, level)
        found.append(chain.features(chain.encode(x, one.code), one.code) @ one.decoder)
    return found[0] + centre, found[1]


def _sizes(layer: "LayerCalibration", level: int) -> tuple[int, ...]:
    """Bytes of a page of each field."""
    keys, values = (widths(layer, side, level) for side in SIDES)
    half = PAGE // 2
    return packing.page_bytes(keys), packing.page_bytes(values), half * len(keys), half * len(values), 1


def _of_head(one: Rung, h: int) -> Rung:
    return Rung(_head(one.code, h), one.decoder[h : h + 1], partial(_plain_head, one.plain, h))


def _plain_head(plain: Callable[[], Code], h: int) -> Code:
    return _head(plain(), h)


def _head(code: Code, h: int) -> Code:
    own = slice(h, h + 1)
    return Code(code.widths, code.basis[own], code.order[own], code.deviation[own], code.gain_base[own])
