"""The packed form of rdkv: tokens sorted into pages of equal width, head by head and level by level.

A *level* of a KV head is a set of widths: one per 32-channel group of the keys and one for the values. Level 0 is
eviction, the last level is 16 bits. Tokens of one level lie together in whole pages, in order of position, so the
level of every token (3 bits) is all it takes to find them again. Segments are stored level by level from the highest,
within a level head by head.

Keys lose the mean m of their head before rotary embedding, turned to the position: x = k - R(n) m, then y = x U with
U orthogonal: channels sorted by importance and rotated inside each group (``grouped``), or rotated as a whole when all
groups have one width. Values are rotated as a whole. Each token has one 8-bit gain for its key and one for its value,
in steps of an eighth of an octave; codes are Lloyd-Max indices of y / (gain * spread of the group). At 16 bits codes
are uniform, a page of their high bytes before a page of their low ones: two pages of 8 bits to a kernel.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvtool import centring, codebooks, packing

if TYPE_CHECKING:
    from kvtool.methods.base import LayerCalibration

LEVELS = 8  # three bits a token
EXACT = 16
_GAIN_STEPS = 8  # per octave
_GAIN_ZERO = 144  # gains of 2^-18 to 2^13.9


class Pages(NamedTuple):
    """One compressed run of tokens; sequences are padded to the longest of the batch.

    levels: uint8 [B, H, 3, ceil(T/8)], bit planes of each token's level.
    key_codes, value_codes: uint8 [B, bytes], the pages of all segments.
    key_gains, value_gains: uint8 [B, 64 * pages], each page in the order of ``packing.pack_tokens``.
    """

    levels: Tensor
    key_codes: Tensor
    value_codes: Tensor
    key_gains: Tensor
    value_gains: Tensor


def level_bytes(widths: Tensor, head_dim: int) -> Tensor:
    """Bytes of one page at each level, int64 [H, L], for ``widths`` [H, L, G+1]; gains included."""
    unit = packing.PAGE * packing.GROUP // 8
    packed = unit * (widths[..., :-1].sum(-1, dtype=torch.int64) + packing.groups(head_dim) * widths[..., -1].long())
    return packed + (widths[..., -1] > 0).long() * 2 * packing.PAGE


def pack(keys: Tensor, values: Tensor, levels: Tensor, layer: "LayerCalibration", positions: Tensor) -> Pages:
    """Keys and values [B, H, T, D] at ``levels`` [B, H, T] to pages."""
    rotated = _Rotated(keys, values, layer, positions)
    return Pages(planes(levels, 3), *in_rows(levels, rotated.encode, fields=4))


def unpack(kv: Pages, layer: "LayerCalibration", positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, H, K, D] float32 of the kept tokens, and which rows are real, bool [B, H, K]."""
    levels = token_levels(kv.levels, len(positions))
    maps = _Maps(layer)
    centre = _centre(layer, positions)
    keys, values, real = empty(levels, layer.shape.head_dim)

    def sizes(h: int, level: int) -> tuple[int, ...]:
        return *maps.page_bytes(h, level), packing.PAGE, packing.PAGE

    for b, h, level, tokens, rows, (key_codes, value_codes, *gains) in from_rows(kv[1:], levels, sizes):
        key, value = maps.decode(h, level, [key_codes, value_codes], gains, -(-len(tokens) // packing.PAGE))
        keys[b, h, rows] = key[: len(tokens)] + centre[h, tokens]
        values[b, h, rows] = value[: len(tokens)]
        real[b, h, rows] = True
    return keys, values, real


def in_rows(
    levels: Tensor, encode: Callable[[int, int, int, Tensor], tuple[Tensor, ...]], *, fields: int
) -> list[Tensor]:
    """What ``encode(b, h, level, tokens)`` makes of each segment, uint8: field by field [B, bytes], zeros behind."""
    rows = []
    for b in range(len(levels)):
        parts = [encode(b, h, level, tokens) for level, h, tokens in segments(levels[b])]
        nothing = [torch.zeros(0, dtype=torch.uint8, device=levels.device)]
        each = zip(*parts, strict=True) if parts else [()] * fields
        rows.append([torch.cat([*nothing, *field]) for field in each])
    return [torch.nn.utils.rnn.pad_sequence(list(field), batch_first=True) for field in zip(*rows, strict=True)]


def from_rows(
    fields: Sequence[Tensor], levels: Tensor, sizes: Callable[[int, int], tuple[int, ...]]
) -> Iterator[tuple[int, int, int, Tensor, slice, list[Tensor]]]:
    """Every segment of ``fields`` as :func:`in_rows` made them: b, h, level, tokens, where they go, and its bytes.

    sizes: bytes of a page of each field for a head and level. Bytes come as [pages, size].
    """
    for b, row in enumerate(levels):
        at, byte = [0] * len(row), [0] * len(fields)
        for level, h, tokens in segments(row):
            n = -(-len(tokens) // packing.PAGE)
            own = sizes(h, level)
            parts = [
                f[b, o : o + n * size].unflatten(0, (n, size)) for f, o, size in zip(fields, byte, own, strict=True)
            ]
            byte = [o + n * size for o, size in zip(byte, own, strict=True)]
            rows = slice(at[h], at[h] + len(tokens))
            at[h] = rows.stop
            yield b, h, level, tokens, rows, parts


def empty(levels: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the tokens that ``levels`` [B, H, T] keep: keys and values [B, H, K, D], and which rows are real."""
    kept = int((levels > 0).sum(-1).max()) if levels.numel() else 0
    keys, values = (torch.zeros(*levels.shape[:2], kept, head_dim, device=levels.device) for _ in range(2))
    return keys, values, torch.zeros(keys.shape[:3], dtype=torch.bool, device=levels.device)


def restore(
    keys: Tensor, values: Tensor, levels: Tensor, layer: "LayerCalibration", positions: Tensor
) -> tuple[Tensor, Tensor]:
    """What keys and values [1, H, T, D] look like after :func:`pack` and :func:`unpack`, each token at its own place.

    Evicted tokens are zeros. For measuring many allocations: bits are not packed.
    """
    rotated = _Rotated(keys, values, layer, positions)
    centre = _centre(layer, positions)
    out_keys, out_values = torch.zeros_like(keys, dtype=torch.float32), torch.zeros_like(values, dtype=torch.float32)
    for level, h, tokens in segments(levels[0]):
        *codes, y_gain, v_gain = rotated.codes(0, h, level, tokens)
        key, value = rotated.decode_codes(h, level, codes[0], codes[1], y_gain, v_gain)
        out_keys[0, h, tokens], out_values[0, h, tokens] = key + centre[h, tokens], value
    return out_keys, out_values


def segments(levels: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Level, head and tokens (ascending) of each segment of one sequence's ``levels`` [H, T], in stored order."""
    for level in range(LEVELS - 1, 0, -1):
        for h in range(levels.shape[0]):
            tokens = (levels[h] == level).nonzero().squeeze(1)
            if len(tokens):
                yield level, h, tokens


def kept_tokens(levels: Tensor) -> Tensor:
    """Tokens in the order :func:`unpack` returns them, for one head's ``levels`` [T]."""
    return levels.argsort(descending=True, stable=True)[: int((levels > 0).sum())]


class _Maps:
    """The linear maps and tables of one layer."""

    def __init__(self, layer: "LayerCalibration") -> None:
        self.widths = layer["widths"].tolist()
        self.dim = layer.shape.head_dim
        self.spread = layer["spread"].float()
        self.key_basis, self.value_basis = layer["key_basis"].float(), layer["value_basis"].float()

    def page_bytes(self, h: int, level: int) -> tuple[int, int]:
        *key, value = self.widths[h][level]
        return packing.page_bytes(key), packing.page_bytes([value] * len(key))

    def grouped(self, h: int, level: int) -> int:
        return int(len(set(self.widths[h][level][:-1])) > 1)

    def decode(self, h: int, level: int, codes: list[Tensor], gains: list[Tensor], n: int) -> tuple[Tensor, Tensor]:
        *key_widths, value_width = self.widths[h][level]
        value_widths = [value_width] * len(key_widths)
        pages = [c.reshape(n, -1) for c in codes]
        key_codes = _unpacked(packing.unpack_keys, pages[0], key_widths, self.dim)
        value_codes = _unpacked(packing.unpack_values, pages[1], value_widths, self.dim)
        unpacked = [packing.unpack_tokens(g.reshape(n, -1)) for g in gains]
        return self.decode_codes(h, level, key_codes, value_codes, unpacked[0], unpacked[1])

    def decode_codes(
        self, h: int, level: int, key_codes: Tensor, value_codes: Tensor, key_gain: Tensor, value_gain: Tensor
    ) -> tuple[Tensor, Tensor]:
        *key_widths, value_width = self.widths[h][level]
        grouped = self.grouped(h, level)
        y = table_values(key_codes, key_widths) * self.scale(h, grouped) * gain(key_gain)[:, None]
        v = table_values(value_codes, [value_width] * len(key_widths)) * gain(value_gain)[:, None]
        return y @ self.key_basis[h, grouped].mT, v @ self.value_basis[h].mT

    def scale(self, h: int, grouped: int) -> Tensor:
        if not grouped:
            return self.spread.new_ones(self.dim)
        return self.spread[h].repeat_interleave(packing.GROUP)[: self.dim]


class _Rotated(_Maps):
    """Keys and values of one run after centring and rotation."""

    def __init__(self, keys: Tensor, values: Tensor, layer: "LayerCalibration", positions: Tensor) -> None:
        super().__init__(layer)
        centred = keys.float() - _centre(layer, positions)
        self.y = [centred @ self.key_basis[:, grouped] for grouped in (0, 1)]
        self.v = values.float() @ self.value_basis

    def encode(self, b: int, h: int, level: int, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *key_widths, value_width = self.widths[h][level]
        fill = -len(tokens) % packing.PAGE
        y_codes, v_codes, *gains = self.codes(b, h, level, tokens)
        y_pages = _packed(packing.pack_keys, _padded(y_codes, fill), key_widths)
        v_pages = _packed(packing.pack_values, _padded(v_codes, fill), [value_width] * len(key_widths))
        y_gain, v_gain = (packing.pack_tokens(_padded(g, fill)).flatten() for g in gains)
        return y_pages.flatten(), v_pages.flatten(), y_gain, v_gain

    def codes(self, b: int, h: int, level: int, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *key_widths, value_width = self.widths[h][level]
        grouped = self.grouped(h, level)
        y = self.y[grouped][b, h, tokens] / self.scale(h, grouped)
        v = self.v[b, h, tokens]
        y_gain, v_gain = gain_code(y), gain_code(v)
        y_codes = table_codes(y / gain(y_gain)[:, None], key_widths)
        v_codes = table_codes(v / gain(v_gain)[:, None], [value_width] * len(key_widths))
        return y_codes, v_codes, y_gain, v_gain


def _packed(pack: Callable[[Tensor, list[int]], Tensor], codes: Tensor, widths: list[int]) -> Tensor:
    if EXACT not in widths:
        return pack(codes, widths)
    halves = [pack((codes >> shift & 255).to(torch.uint8), [8] * len(widths)) for shift in (8, 0)]
    return torch.cat(halves, -1)


def _unpacked(
    unpack: Callable[[Tensor, list[int], int], Tensor], pages: Tensor, widths: list[int], head_dim: int
) -> Tensor:
    if EXACT not in widths:
        return unpack(pages, widths, head_dim)
    high, low = (unpack(half, [8] * len(widths), head_dim).int() for half in pages.chunk(2, -1))
    return high << 8 | low


def gain_code(x: Tensor) -> Tensor:
    """The 8-bit gain of each row of ``x`` [N, D]: its root mean square, rounded in the logarithm."""
    rms = x.pow(2).mean(-1).sqrt().clamp(min=1e-9)
    return (rms.log2() * _GAIN_STEPS + _GAIN_ZERO).round().clamp(0, 255).to(torch.uint8)


def gain(code: Tensor) -> Tensor:
    """What a gain code stands for, float32."""
    return ((code.float() - _GAIN_ZERO) / _GAIN_STEPS).exp2()


def exact_step(head_dim: int) -> float:
    """The step of 16-bit codes, for entries of unit mean square: none of them exceeds sqrt(head_dim)."""
    # 5 % for the rounding of the gain
    return 1.05 * head_dim**0.5 / 32768


def table_codes(x: Tensor, widths: list[int]) -> Tensor:
    """Codes uint8 (int32 at 16 bits) of ``x`` [..., D], entries of unit variance, each group at its width."""
    if EXACT in widths:
        return (x / exact_step(x.shape[-1]) + 32768).floor().clamp(0, 65535).int()
    parts = []
    for group, width in zip(x.split(packing.GROUP, -1), widths, strict=True):
        if width == 0:
            parts.append(torch.zeros_like(group, dtype=torch.uint8))
            continue
        book = codebooks.sphere_codebook(x.shape[-1], width)
        parts.append(codebooks.nearest(group.contiguous(), book.levels.to(x.device), book.step))
    return torch.cat(parts, -1)


def table_values(codes: Tensor, widths: list[int]) -> Tensor:
    """What ``codes`` [..., D] stand for, float32; 0 where the width is 0."""
    if EXACT in widths:
        return (codes.float() - 32767.5) * exact_step(codes.shape[-1])
    parts = []
    for group, width in zip(codes.split(packing.GROUP, -1), widths, strict=True):
        if width == 0:
            parts.append(torch.zeros_like(group, dtype=torch.float32))
            continue
        book = codebooks.sphere_codebook(codes.shape[-1], width)
        parts.append(codebooks.look_up(book.levels.to(codes.device), group) * book.step)
    return torch.cat(parts, -1)


def _centre(layer: "LayerCalibration", positions: Tensor) -> Tensor:
    """The mean of each head's keys as rotary embedding turns it, [H, T, D]."""
    return centring.at(layer["key_mean"].float(), "rotated", layer.rope, positions)


def _padded(x: Tensor, fill: int) -> Tensor:
    return torch.cat([x, x.new_zeros(fill, *x.shape[1:])]) if fill else x


def planes(levels: Tensor, count: int) -> Tensor:
    """Levels [B, H, T] below 2^count to bit planes uint8 [B, H, count, ceil(T/8)], lowest bit first."""
    padded = torch.nn.functional.pad(levels.to(torch.uint8), (0, -levels.shape[-1] % 8))
    bits = (padded[..., None, :] >> torch.arange(count, device=levels.device, dtype=torch.uint8)[:, None]) & 1
    weights = 2 ** torch.arange(8, device=levels.device, dtype=torch.uint8)
    return (bits.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def token_levels(planes: Tensor, tokens: int) -> Tensor:
    """The level of each token, uint8 [B, H, T], from the bit planes that are stored."""
    bits = (planes[..., None] >> torch.arange(8, device=planes.device, dtype=torch.uint8)) & 1
    flat = bits.flatten(-2)[..., :tokens]  # [B, H, planes, T]
    weights = 2 ** torch.arange(flat.shape[2], device=planes.device, dtype=torch.uint8)
    return (flat * weights[:, None]).sum(2, dtype=torch.uint8)
