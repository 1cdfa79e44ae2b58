"""The packed page: nothing is lost, nothing is wasted, and every bit lies where the documentation draws it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.packing import (
    GROUP,
    PAGE,
    WIDTHS,
    groups,
    pack_keys,
    pack_tokens,
    pack_values,
    page_bytes,
    unpack_keys,
    unpack_tokens,
    unpack_values,
)

SIDES = [(pack_keys, unpack_keys), (pack_values, unpack_values)]


def codes(widths, pages, head_dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = [
        torch.randint(0, 1 << widths[c // GROUP], (2, pages * PAGE), dtype=torch.uint8, generator=generator)
        for c in range(head_dim)
    ]
    return torch.stack(columns, -1)


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=4),
    short=st.integers(0, GROUP - 1),
    pages=st.integers(1, 3),
    side=st.sampled_from(SIDES),
)
def test_unpacking_gives_back_what_was_packed(widths, short, pages, side):
    pack, unpack = side
    head_dim = GROUP * len(widths) - short
    given_codes = codes(widths, pages, head_dim)
    packed = pack(given_codes, widths)
    # exactly b bits for every code of a group, 3.0 included
    assert packed.shape == (2, pages, page_bytes(widths))
    assert page_bytes(widths) * 8 == sum(widths) * GROUP * PAGE
    assert torch.equal(unpack(packed, widths, head_dim), given_codes)


def test_a_part_without_channels_has_no_bytes():
    """A layer whose budget is zero on one side has no groups at all."""
    empty = torch.zeros(2, 3, 128, 0, dtype=torch.uint8)
    for pack, unpack in SIDES:
        assert pack(empty, []).shape == (2, 3, 2, 0)
        assert unpack(pack(empty, []), [], 0).shape == empty.shape


# token 8*slot + g, channel 16*h + 4*q + e of a key; unit of 32 channels; byte and bits by the module's drawing
@pytest.mark.parametrize(
    ("width", "token", "channel", "value", "byte", "stored"),
    [
        # slot 3, g 5, h 1, q 2, e 1: lane 22, plane 1, nibble 4 + 1; pairs of planes: word (22*2 + 1)*2 + 1
        (4, 29, 25, 9, 4 * ((22 * 2 + 1) * 2 + 1) + 2, 9 << 4),
        # slot 5: plane 1, j 0, i 1, nibble 4 + 1, lowest bits
        (2, 45, 25, 3, 4 * ((22 * 2 + 1) * 2 + 1) + 2, 3 << 4),
        # slot 3 of one bit: byte e, bit 3; one plane: word 22*2 + 1
        (1, 29, 25, 1, 4 * (22 * 2 + 1) + 1, 1 << 3),
        # slot 3 of eight bits: plane 3, second of pair 1; byte e
        (8, 29, 25, 200, 4 * (128 + (22 * 2 + 1) * 2 + 1) + 1, 200),
        # slot 3 of three bits: plane 1, nibble 4 + 1, low three bits
        (3, 29, 25, 5, 4 * (64 + 22 * 2 + 1) + 2, 5 << 4),
    ],
)
def test_a_key_lies_where_it_is_drawn(width, token, channel, value, byte, stored):
    x = torch.zeros(PAGE, GROUP, dtype=torch.uint8)
    x[token, channel] = value
    page = pack_keys(x, [width])[0]
    assert page.nonzero().tolist() == [[byte]]
    assert page[byte] == stored


def test_the_top_bits_of_three_bit_nibbles_spell_the_last_slots():
    x = torch.zeros(PAGE, GROUP, dtype=torch.uint8)
    x[8 * 6, 0] = 5  # slot 6, g 0, h 0, q 0, e 0: bit p of the code on top of nibble 0 of plane p
    page = pack_keys(x, [3])[0]
    assert page.nonzero().flatten().tolist() == [0, 4 * 128]
    assert page[0] == page[4 * 128] == 8


def test_values_lie_in_the_order_of_the_weights():
    x = torch.zeros(PAGE, GROUP, dtype=torch.uint8)
    # slot 2*ct + step = 2*3 + 1, g 5, h 1, q 2, e 3: token 32*1 + 16*1 + 8*1 + 2*2 + 1, channel 8*3 + 5
    x[61, 29] = 200
    page = pack_values(x, [8])[0]
    assert page.nonzero().tolist() == [[4 * (3 * 128 + (22 * 2 + 1) * 2 + 1) + 3]]


def test_one_number_per_token_is_contiguous_for_a_lane():
    packed = pack_tokens(torch.arange(2.0 * PAGE))
    # lane q of a quad owns tokens 8u + 2q + r
    assert packed[0, 16:20].tolist() == [2, 3, 10, 11]
    assert torch.equal(unpack_tokens(packed), torch.arange(2.0 * PAGE))


def test_a_page_must_be_whole():
    with pytest.raises(ValueError, match="63 tokens"):
        pack_keys(torch.zeros(63, 32, dtype=torch.uint8), [4])
    with pytest.raises(ValueError, match="expected 1024"):
        unpack_keys(torch.zeros(1, 512, dtype=torch.uint8), [4], 32)
    assert groups(80) == 3
