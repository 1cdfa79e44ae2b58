"""Lengths, sizes and widths as people write them; rope as it turns and turns back."""

import pytest
import torch

from kvtool.errors import InputError
from kvtool.shapes import Rope
from kvtool.units import (
    format_bytes,
    format_seconds,
    format_tokens,
    parse_bits,
    parse_bytes,
    parse_indices,
    parse_tokens,
)


@pytest.mark.parametrize(("text", "tokens"), [("128k", 131072), ("8K", 8192), ("1m", 1 << 20), ("77", 77), (5, 5)])
def test_lengths(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-1", "8kk", "1.5k", "many"])
def test_lengths_that_are_none(text):
    with pytest.raises(InputError, match="expected a positive number of tokens"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("text", "size"), [("4GiB", 4 << 30), ("512 MiB", 512 << 20), ("1e9", 10**9), ("1.5k", 1536), (10, 10)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "-4", "4 parsecs", "0", "1.2.3"])
def test_sizes_that_are_none(text):
    with pytest.raises(InputError, match="expected a positive size"):
        parse_bytes(text)


def test_bits():
    assert parse_bits("3") == (3, 3)
    assert parse_bits("k4v2.5") == (4, 2.5)
    with pytest.raises(InputError, match="k4v3"):
        parse_bits("v4k3")


def test_indices():
    assert parse_indices("0,5-7, 3", 10) == [0, 3, 5, 6, 7]
    assert parse_indices("all", 3) == [0, 1, 2]
    for text, reason in (("3-1", "outside 0-9"), ("10", "outside 0-9"), ("a", "expected a list")):
        with pytest.raises(InputError, match=reason):
            parse_indices(text, 10)


def test_what_people_read():
    assert [format_tokens(n) for n in (131072, 1000, 1025)] == ["128k", "1000", "1025"]
    assert [format_bytes(n) for n in (10, 1023, 188.7e6, 3 << 30)] == ["10 B", "1023 B", "180 MiB", "3 GiB"]
    assert [format_seconds(s) for s in (2.34, 42, 75, 3700)] == ["2.3 s", "42 s", "1 min 15 s", "1 h 1 min"]


@pytest.mark.parametrize("rotary", [16, 64])
@pytest.mark.parametrize("scaling", [1.0, 1.1386])
def test_rope_turns_and_turns_back(rotary, scaling):
    rope = Rope(inv_freq=tuple(1e4 ** (-2 * i / rotary) for i in range(rotary // 2)), scaling=scaling)
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 5, 1000, 131071, 999_999, 3])
    turned = rope.rotate(x, positions)
    torch.testing.assert_close(rope.unrotate(turned, positions), x, rtol=1e-5, atol=1e-6)
    assert torch.equal(turned[..., rotary:], x[..., rotary:])
    # channel c turns with channel c + R/2 by position times frequency
    angle = 1000 * rope.inv_freq[1]
    a, b = x[0, 3, 1].item(), x[0, 3, 1 + rotary // 2].item()
    expected = scaling * (a * torch.tensor(angle, dtype=torch.float64).cos() - b * torch.tensor(angle).double().sin())
    assert turned[0, 3, 1].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
