"""The packed page: the one definition of how codes lie in memory, read by every method and every kernel.

A *page* is 64 tokens of one KV head. Channels come in *groups* of 32, and each group has its own width: 0, 1, 2, 3
(exactly 3.0), 4 or 8 bits. A page is the concatenation of its groups' *units*; a unit of width b is 256*b bytes.
head_dim is padded with zero codes to a multiple of 32.

Both operands of attention meet the tensor cores as the B operand of ``mma.m16n8k32`` (two of them, side by side, are
its A operand), so both units hold, for each of the 32 lanes of a warp, 2 registers (h) x 8 slots of 4 codes (e):

    lane = 4*g + q          keys:   token = 8*slot + g               channel = 16*h + 4*q + e
                            values: token = 32*(slot & 1) + 16*h + 8*(e >> 1) + 2*q + (e & 1)
                                    channel = 8*(slot >> 1) + g

The 8 slots of one (lane, h) share b little-endian 32-bit words, called planes; plane p of lane l and register h:

    b = 8   plane p is slot p; byte e is the code
    b = 4   nibble 4*i + e is slot 2*p + i
    b = 2   bits 2j..2j+1 of nibble 4*i + e are slot 4*p + 2*j + i
    b = 3   the low 3 bits of nibble 4*i + e are slot 2*p + i, for 3 planes; the nibbles' top bits spell slot 6 + i,
            bit p of the code in plane p
    b = 1   bit s of byte e is slot s

so a table look-up turns a masked word into a ready fragment register with one byte permutation, and no bit is wasted.
Planes are stored two by two when b is even ([plane pair][lane][plane][h], 16 bytes a lane) and one by one when it is
odd ([plane][lane][h], 8 bytes a lane), so that a warp always reads whole, contiguous vectors.

Codes are unsigned; what they mean (a table, a scale per token) belongs to the method.
"""

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PAGE = 64  # tokens
GROUP = 32  # channels
WIDTHS = (0, 1, 2, 3, 4, 8)  # bits


def groups(head_dim: int) -> int:
    """Channel groups of a page, the last one padded."""
    return -(-head_dim // GROUP)


def page_bytes(widths: Sequence[int]) -> int:
    """Bytes of one packed page whose groups have ``widths`` bits."""
    return sum(256 * width for width in widths)


def pack_keys(codes: Tensor, widths: Sequence[int]) -> Tensor:
    """Key codes uint8 [..., T, D], T a multiple of 64, to pages uint8 [..., T/64, page_bytes(widths)].

    Raises:
        ValueError: T is not a multiple of 64, or ``widths`` does not have one entry per group.
    """
    return _pack(codes, widths, "key")


def unpack_keys(pages: Tensor, widths: Sequence[int], head_dim: int) -> Tensor:
    """The inverse of :func:`pack_keys`: codes uint8 [..., T, head_dim]; groups of width 0 come back as zeros."""
    return _unpack(pages, widths, head_dim, "key")


def pack_values(codes: Tensor, widths: Sequence[int]) -> Tensor:
    """Value codes uint8 [..., T, D], T a multiple of 64, to pages uint8 [..., T/64, page_bytes(widths)]."""
    return _pack(codes, widths, "value")


def unpack_values(pages: Tensor, widths: Sequence[int], head_dim: int) -> Tensor:
    """The inverse of :func:`pack_values`."""
    return _unpack(pages, widths, head_dim, "value")


def pack_tokens(per_token: Tensor) -> Tensor:
    """One number per token, [..., T], to [..., T/64, 64] in the order of the score registers.

    Lane q of a quad owns tokens 8*u + 2*q + r; it finds them at [q][u][r], contiguous.
    """
    pages = per_token.unflatten(-1, (-1, PAGE))
    return pages.unflatten(-1, (8, 4, 2)).transpose(-3, -2).flatten(-3)


def unpack_tokens(pages: Tensor) -> Tensor:
    """The inverse of :func:`pack_tokens`: [..., N, 64] to [..., 64*N]."""
    return pages.unflatten(-1, (4, 8, 2)).transpose(-3, -2).flatten(-4)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes of 4 bits, n per token, [..., n, T], to [..., T/64, 32 n]: two tokens a byte, ordered as pack_tokens."""
    pages = pack_tokens(codes).movedim(-3, -2)  # [..., N, n, 64]
    return (pages[..., 0::2] | (pages[..., 1::2] << 4)).flatten(-2)


def unpack_nibbles(pages: Tensor, n: int) -> Tensor:
    """The inverse of :func:`pack_nibbles`: [..., n, T]."""
    packed = pages.unflatten(-1, (n, PAGE // 2))
    both = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)  # [..., N, n, 64]
    return unpack_tokens(both.movedim(-2, -3))


_Entry = tuple[int, int, int, int]  # take, right, mask, left


class _Piece(NamedTuple):
    """Part of how a unit is packed or unpacked: ``out[put] |= (source[take] >> right & mask) << left``, all [n].

    put: int64, or None for every place.
    """

    put: Tensor | None
    take: Tensor  # int64
    right: Tensor  # uint8
    mask: Tensor  # uint8
    left: Tensor  # uint8


def _pack(codes: Tensor, widths: Sequence[int], side: str) -> Tensor:
    T, D = codes.shape[-2:]
    if T % PAGE or groups(D) != len(widths):
        raise ValueError(f"{T} tokens of {D} channels do not fill pages of {PAGE} tokens and {len(widths)} groups")
    if not widths:
        return codes.new_empty((*codes.shape[:-2], T // PAGE, 0))
    padded = F.pad(codes, (0, GROUP * len(widths) - D))
    units = padded.unflatten(-1, (-1, GROUP)).unflatten(-3, (-1, PAGE)).transpose(-3, -2).flatten(-2)
    if len(set(widths)) == 1:
        return _join(units, _layout(side, widths[0], codes.device)[0], 256 * widths[0]).flatten(-2)
    packed = [
        _join(units[..., i, :], _layout(side, width, codes.device)[0], 256 * width) for i, width in enumerate(widths)
    ]
    return torch.cat(packed, -1)


def _unpack(pages: Tensor, widths: Sequence[int], head_dim: int, side: str) -> Tensor:
    sizes = [256 * width for width in widths]
    if pages.shape[-1] != sum(sizes) or groups(head_dim) != len(widths):
        raise ValueError(f"pages of {pages.shape[-1]} bytes, expected {sum(sizes)} for widths {list(widths)}")
    if not widths:
        return pages.new_empty((*pages.shape[:-2], PAGE * pages.shape[-2], 0))
    if len(set(widths)) == 1:
        units = _join(
            pages.unflatten(-1, (len(widths), sizes[0])), _layout(side, widths[0], pages.device)[1], PAGE * GROUP
        )
    else:
        parts = zip(pages.split(sizes, -1), widths, strict=True)
        units = torch.stack([_join(x, _layout(side, b, pages.device)[1], PAGE * GROUP) for x, b in parts], -2)
    channels = units.unflatten(-1, (PAGE, GROUP)).transpose(-3, -2).flatten(-2)  # [..., N, 64, D]
    return channels.flatten(-3, -2)[..., :head_dim]


def _join(source: Tensor, pieces: Sequence[_Piece], n: int) -> Tensor:
    """``source`` uint8 [..., m] to uint8 [..., n], piece by piece."""
    out = source.new_zeros((*source.shape[:-1], n))
    for put, take, right, mask, left in pieces:
        part = source.index_select(-1, take)
        part.bitwise_right_shift_(right).bitwise_and_(mask).bitwise_left_shift_(left)
        # pieces have no bit in common, so their sum is their union
        out = out.bitwise_or_(part) if put is None else out.index_add_(-1, put, part)
    return out


@cache
def _layout(side: str, width: int, device: torch.device) -> tuple[list[_Piece], list[_Piece]]:
    """How the codes [64 * 32] of a unit of ``side`` key or value make its bytes [256 * width], and the reverse."""
    packing: list[list[_Entry]] = [[] for _ in range(256 * width)]
    unpacking: list[list[_Entry]] = [[] for _ in range(PAGE * GROUP)]
    pair = 2 - width % 2
    for lane, h, e, slot in product(range(32), range(2), range(4), range(8)):
        code = _code(side, lane, h, e, slot)
        for plane, bit, first, bits in _fields(width, e, slot):
            byte = 4 * (((plane // pair * 32 + lane) * pair + plane % pair) * 2 + h) + bit // 8
            mask = (1 << bits) - 1
            packing[byte].append((code, first, mask, bit % 8))
            unpacking[code].append((byte, bit % 8, mask, first))
    return _pieces(packing, device), _pieces(unpacking, device)


def _pieces(entries: list[list[_Entry]], device: torch.device) -> list[_Piece]:
    """The first entry of every place, then the second of those that have one, and so on."""
    pieces = []
    for j in range(max(map(len, entries), default=0)):
        places = [place for place, mine in enumerate(entries) if len(mine) > j]
        take, right, mask, left = torch.tensor([entries[place][j] for place in places], device=device).unbind(-1)
        put = None if len(places) == len(entries) else torch.tensor(places, device=device)
        pieces.append(_Piece(put, take, right.byte(), mask.byte(), left.byte()))
    return pieces


def _code(side: str, lane: int, h: int, e: int, slot: int) -> int:
    """The code's place in its unit, token * 32 + channel."""
    g, q = divmod(lane, 4)
    if side == "key":
        return (8 * slot + g) * GROUP + 16 * h + 4 * q + e
    return (32 * (slot & 1) + 16 * h + 8 * (e >> 1) + 2 * q + (e & 1)) * GROUP + 8 * (slot >> 1) + g


def _fields(width: int, e: int, slot: int) -> list[tuple[int, int, int, int]]:
    """Where the code of ``slot`` and ``e`` lies: (plane, bit of the 32-bit word, first bit of the code, bits)."""
    if width == 0:
        return []
    if width == 1:
        return [(0, 8 * e + slot, 0, 1)]
    if width == 2:
        return [(slot // 4, 4 * (4 * (slot % 2) + e) + 2 * (slot // 2 % 2), 0, 2)]
    if width == 3 and slot >= 6:
        return [(plane, 4 * (4 * (slot - 6) + e) + 3, plane, 1) for plane in range(3)]
    if width in (3, 4):
        return [(slot // 2, 4 * (4 * (slot % 2) + e), 0, width)]
    return [(slot, 8 * e, 0, 8)]
