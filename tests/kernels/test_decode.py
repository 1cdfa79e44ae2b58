"""Kernels read packing.py's bytes and agree with float64 attention over them; run in Triton's interpreter without a GPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from kvtool.kernels.packed import Codec, Launch, Packed, attend_packed
from kvtool.kernels.reference import reference

from kvtool import packing
from kvtool.attention import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEVELS = {
    2: torch.tensor([-127, -38, 38, 127], dtype=torch.int8),
    3: torch.tensor([-127, -79, -45, -14, 14, 45, 79, 127], dtype=torch.int8),
    4: torch.tensor([-127, -97, -75, -59, -43, -31, -19, -7, 7, 19, 31, 43, 59, 75, 97, 127], dtype=torch.int8),
}
STD = {0: 1.0, 1: 1.0, 2: 93.0, 3: 78.0, 4: 66.0, 8: 73.0}


def random_cache(B, H, N, D, key_widths, value_widths, seed=0):
    """Random codes and scales; logits have a standard deviation near 1.5."""
    g = torch.Generator().manual_seed(seed)

    def side(pack, widths):
        groups = [
            torch.randint(0, 1 << w, (B, H, 64 * N, 32), generator=g, dtype=torch.int64).to(torch.uint8) for w in widths
        ]
        codes = torch.cat(groups, -1)
        codes[..., D:] = 0
        scales = packing.pack_tokens(0.5 + torch.rand(B, H, 64 * N, generator=g)).half()
        return pack(codes[..., : packing.GROUP * len(widths)], widths), scales

    key_pages, key_scales = side(packing.pack_keys, key_widths)
    value_pages, value_scales = side(packing.pack_values, value_widths)
    pad = packing.GROUP * len(key_widths)

    def transform(widths):
        q, _ = torch.linalg.qr(torch.randn(H, pad, pad, generator=g, dtype=torch.float64))
        steps = torch.cat([torch.full((32,), 1 / STD[w]) for w in widths])
        return q.float()[:, :D, :] * steps

    codec = Codec(
        tuple(key_widths),
        tuple(value_widths),
        transform(key_widths).to(DEVICE),
        transform(value_widths).mT.contiguous().to(DEVICE),
        LEVELS,
        LEVELS,
    )
    kv = Packed(*(x.to(DEVICE) for x in (key_pages, key_scales, value_pages, value_scales)))
    return kv, codec


def random_queries(B, HQ, S, D, seed=1, std=1.5):
    return (std * torch.randn(B, HQ, S, D, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


def check(found, exact, limit):
    assert torch.isfinite(found.out).all()
    assert relative_error(found.out, exact.out) < limit
    assert (found.lse.double() - exact.lse).abs().max() < 2e-3  # 16-bit queries: 2^-15 of the largest logit


# the weights have 15 bits relative to the largest of a warp's pages, so small ones round to a few percent
LIMIT = 3e-3


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_every_width_agrees_with_float64(width):
    kv, codec = random_cache(1, 2, 5, 128, [width] * 4, [width] * 4)
    queries = random_queries(1, 8, 1, 128)
    exact = reference(queries, kv, codec, scale=128**-0.5)
    check(attend_packed(queries, kv, codec, scale=128**-0.5, launch=Launch(splits=2)), exact, LIMIT)
