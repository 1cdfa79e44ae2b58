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
    return _pack(codes, widths, _KEY_ORDER)


def unpack_keys(pages: Tensor, widths: Sequence[int], head_dim: int) -> Tensor:
    """The inverse of :func:`pack_keys`: codes uint8 [..., T, head_dim]; groups of width 0 come back as zeros."""
    return _unpack(pages, widths, head_dim, _KEY_ORDER)


def pack_values(codes: Tensor, widths: Sequence[int]) -> Tensor:
    """Value codes uint8 [..., T, D], T a multiple of 64, to pages uint8 [..., T/64, page_bytes(widths)]."""
    return _pack(codes, widths, _VALUE_ORDER)


def unpack_values(pages: Tensor, widths: Sequence[int], head_dim: int) -> Tensor:
    """The inverse of :func:`pack_values`."""
    return _unpack(pages, widths, head_dim, _VALUE_ORDER)


def pack_tokens(per_token: Tensor) -> Tensor:
    """One number per token, [..., T], to [..., T/64, 64] in the order of the score registers.

    Lane q of a quad owns tokens 8*u + 2*q + r; it finds them at [q][u][r], contiguous.
    """
    pages = per_token.unflatten(-1, (-1, PAGE))
    return pages.unflatten(-1, (8, 4, 2)).transpose(-3, -2).flatten(-3)


def unpack_tokens(pages: Tensor) -> Tensor:
    """The inverse of :func:`pack_tokens`: [..., N, 64] to [..., 64*N]."""
    return pages.unflatten(-1, (4, 8, 2)).transpose(-3, -2).flatten(-4)


def _order(keys: bool) -> Tensor:
    """Where each code of a unit comes from: index token*32 + channel, as [lane, h, e, slot]."""
    g, q, h, e, slot = torch.meshgrid(*(torch.arange(n) for n in (8, 4, 2, 4, 8)), indexing="ij")
    if keys:
        token, channel = 8 * slot + g, 16 * h + 4 * q + e
    else:
        token = 32 * (slot & 1) + 16 * h + 8 * (e >> 1) + 2 * q + (e & 1)
        channel = 8 * (slot >> 1) + g
    return (token * GROUP + channel).reshape(32, 2, 4, 8)


_KEY_ORDER, _VALUE_ORDER = _order(keys=True), _order(keys=False)


def _pack(codes: Tensor, widths: Sequence[int], order: Tensor) -> Tensor:
    T, D = codes.shape[-2:]
    if T % PAGE or groups(D) != len(widths):
        raise ValueError(f"{T} tokens of {D} channels do not fill pages of {PAGE} tokens and {len(widths)} groups")
    if not widths:
        return codes.new_empty((*codes.shape[:-2], T // PAGE, 0))
    padded = F.pad(codes, (0, GROUP * len(widths) - D))
    units = padded.unflatten(-1, (-1, GROUP)).unflatten(-3, (-1, PAGE)).transpose(-3, -2)  # [..., N, group, 64, 32]
    blocks = units.flatten(-2)[..., order.to(codes.device)]  # [..., N, group, lane, h, e, slot]
    packed = [_pack_unit(blocks[..., i, :, :, :, :], width) for i, width in enumerate(widths)]
    return torch.cat(packed, -1)


def _unpack(pages: Tensor, widths: Sequence[int], head_dim: int, order: Tensor) -> Tensor:
    sizes = [256 * width for width in widths]
    if pages.shape[-1] != sum(sizes) or groups(head_dim) != len(widths):
        raise ValueError(f"pages of {pages.shape[-1]} bytes, expected {sum(sizes)} for widths {list(widths)}")
    if not widths:
        return pages.new_empty((*pages.shape[:-2], PAGE * pages.shape[-2], 0))
    blocks = [_unpack_unit(unit, width) for unit, width in zip(pages.split(sizes, -1), widths, strict=True)]
    flat = torch.stack(blocks, -5).flatten(-4)  # [..., N, group, 2048]
    units = torch.empty_like(flat)
    units[..., order.flatten().to(pages.device)] = flat
    channels = units.unflatten(-1, (PAGE, GROUP)).transpose(-3, -2).flatten(-2)  # [..., N, 64, D]
    return channels.flatten(-3, -2)[..., :head_dim]


def _fields(width: int) -> Tensor:
    """Where each bit of a code lies: for [e, slot, bit], its plane and its bit in the 32-bit word, as [4, 8, b, 2]."""
    where = torch.empty(4, 8, width, 2, dtype=torch.int64)
    for e in range(4):
        for slot in range(8):
            for bit in range(width):
                where[e, slot, bit] = torch.tensor(_field(width, e, slot, bit))
    return where


def _field(width: int, e: int, slot: int, bit: int) -> tuple[int, int]:
    if width == 1:
        return 0, 8 * e + slot
    if width == 2:
        return slot // 4, 4 * (4 * (slot % 2) + e) + 2 * (slot // 2 % 2) + bit
    if width == 3 and slot >= 6:
        return bit, 4 * (4 * (slot - 6) + e) + 3
    if width in (3, 4):
        return slot // 2, 4 * (4 * (slot % 2) + e) + bit
    return slot, 8 * e + bit


_FIELDS = {width: _fields(width) for width in WIDTHS if width}


def _pack_unit(block: Tensor, width: int) -> Tensor:
    """Codes [..., lane, h, e, slot] to a unit, uint8 [..., 256*width]."""
    lead = block.shape[:-4]
    if width == 0:
        return block.new_empty((*lead, 0))
    plane, position = _FIELDS[width].to(block.device).unbind(-1)  # [e, slot, bit]
    bits = (block[..., None] >> torch.arange(width, device=block.device, dtype=torch.uint8)) & 1
    flat = block.new_zeros((*lead, 32, 2, width * 32))
    flat[..., (plane * 32 + position).flatten()] = bits.flatten(-3)
    weights = 2 ** torch.arange(8, device=block.device, dtype=torch.uint8)
    words = (flat.unflatten(-1, (width, 4, 8)) * weights).sum(-1, dtype=torch.uint8)  # [..., lane, h, plane, byte]
    pair = 2 - width % 2
    # [..., chunk, lane, plane, h, 4]
    ordered = words.unflatten(-2, (width // pair, pair)).movedim(-3, -5).movedim(-2, -3)
    return ordered.flatten(-5)


def _unpack_unit(unit: Tensor, width: int) -> Tensor:
    """The inverse of :func:`_pack_unit`: codes uint8 [..., lane, h, e, slot]."""
    if width == 0:
        return unit.new_zeros((*unit.shape[:-1], 32, 2, 4, 8))
    pair = 2 - width % 2
    ordered = unit.unflatten(-1, (width // pair, 32, pair, 2, 4))
    words = ordered.movedim(-3, -2).movedim(-5, -3).flatten(-3, -2)  # [..., lane, h, plane, byte]
    flat = ((words[..., None] >> torch.arange(8, device=unit.device, dtype=torch.uint8)) & 1).flatten(-3)
    plane, position = _FIELDS[width].to(unit.device).unbind(-1)
    bits = flat[..., (plane * 32 + position)]  # [..., lane, h, e, slot, bit]
    return (bits << torch.arange(width, device=unit.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
