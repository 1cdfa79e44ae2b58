"""Kernels read the bytes of packing.py and agree with float64 attention; in Triton's interpreter without a GPU."""

import pytest
import torch

from kvtool import packing
from kvtool.attention import relative_error
from kvtool.errors import BackendError
from kvtool.kernels.packed import Codec, Launch, Packed, attend_packed
from kvtool.kernels.reference import reference

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
    kv, codec = random_cache(1, 1, 5, 64, [width] * 2, [width] * 2)
    queries = random_queries(1, 4, 1, 64)
    exact = reference(queries, kv, codec, scale=0.125)
    check(attend_packed(queries, kv, codec, scale=0.125, launch=Launch(splits=2)), exact, LIMIT)


@pytest.mark.parametrize(
    ("D", "group", "S"), [(64, 3, 1), (80, 4, 1), (96, 1, 2), (128, 8, 1), (256, 2, 3), (64, 7, 3)]
)
def test_head_dims_query_groups_and_several_query_tokens(D, group, S):
    widths = [4, 2, 1, 0, 3, 2, 8, 2][: packing.groups(D)]
    kv, codec = random_cache(1, 1, 3, D, widths, widths[::-1])
    queries = random_queries(1, group, S, D)
    exact = reference(queries, kv, codec, scale=D**-0.5)
    check(attend_packed(queries, kv, codec, scale=D**-0.5, launch=Launch(splits=1)), exact, LIMIT)


def test_sequences_of_different_lengths_see_their_own_pages_only():
    kv, codec = random_cache(3, 1, 6, 64, [2, 2], [2, 2])
    queries = random_queries(3, 2, 1, 64)
    pages = torch.tensor([6, 1, 0], dtype=torch.int32, device=DEVICE)
    found = attend_packed(queries, kv, codec, scale=0.125, pages=pages, launch=Launch(splits=3))
    for b in (0, 1):
        own = Packed(*(x[b : b + 1, :, : int(pages[b])] for x in kv))
        exact = reference(queries[b : b + 1], own, codec, scale=0.125)
        assert relative_error(found.out[b : b + 1], exact.out) < LIMIT
        assert (found.lse[b : b + 1] - exact.lse).abs().max() < 2e-3
    assert (found.out[2] == 0).all()
    assert (found.lse[2] == -torch.inf).all()


def test_a_page_table_reads_the_same_pages_from_anywhere():
    kv, codec = random_cache(2, 1, 4, 64, [3, 1], [4, 2])
    queries = random_queries(2, 2, 1, 64)
    straight = attend_packed(queries, kv, codec, scale=0.125, launch=Launch(splits=1))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    table = torch.argsort(order).reshape(2, 4).to(torch.int32).to(DEVICE)
    pool = Packed(*(x.transpose(1, 2).flatten(0, 1)[order].transpose(0, 1)[None].contiguous() for x in kv))
    paged = attend_packed(queries, pool, codec, scale=0.125, page_table=table, launch=Launch(splits=1))
    assert torch.equal(paged.out, straight.out)
    assert torch.equal(paged.lse, straight.lse)


def test_bias_and_softcap_follow_the_logits():
    kv, codec = random_cache(1, 1, 2, 64, [4, 4], [4, 4])
    queries = random_queries(1, 3, 2, 64, std=4)
    bias = torch.randn(1, 3, 2, 128, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    for arguments in ({"softcap": 5.0}, {"bias": bias}, {"bias": bias, "softcap": 5.0}):
        exact = reference(queries, kv, codec, scale=0.125, **arguments)
        check(attend_packed(queries, kv, codec, scale=0.125, launch=Launch(splits=1), **arguments), exact, LIMIT)


def test_flat_and_peaked_logits():
    kv, codec = random_cache(1, 1, 4, 64, [2] * 2, [2] * 2)
    for std in (0.01, 8.0):
        queries = random_queries(1, 4, 1, 64, std=std)
        exact = reference(queries, kv, codec, scale=0.125)
        found = attend_packed(queries, kv, codec, scale=0.125, launch=Launch(splits=1))
        assert relative_error(found.out, exact.out) < LIMIT


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q, kv: (q[..., :48], kv), "head_dim"),
        (lambda q, kv: (q.repeat(1, 9, 1, 1), kv), "per KV head"),
        (lambda q, kv: (q.repeat(1, 1, 9, 1), kv), "query tokens"),
        (lambda q, kv: (q.repeat(1, 1, 1, 2)[..., ::2], kv), "contiguous"),
        (lambda q, kv: (q, kv._replace(key_pages=kv.key_pages[..., :-256])), "key_pages"),
        (lambda q, kv: (q, kv._replace(value_scales=kv.value_scales.float())), "value_scales"),
    ],
)
def test_the_launcher_refuses_in_one_sentence(change, says):
    kv, codec = random_cache(1, 1, 1, 64, [2, 2], [2, 2])
    queries, kv = change(random_queries(1, 2, 1, 64), kv)
    with pytest.raises(BackendError, match=says) as refusal:
        attend_packed(queries, kv, codec, scale=1.0)
    assert "\n" not in str(refusal.value)


def test_a_bias_in_units_is_the_same_bias():
    kv, codec = random_cache(1, 1, 2, 64, [2, 2], [2, 2])
    queries = random_queries(1, 3, 2, 64)
    codes = torch.randint(-32767, 32768, (1, 3, 2, 128), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    units = torch.tensor([1e-4, 1e-5, 3e-4]).to(DEVICE)[None, :, None].expand(1, 3, 2)
    exact = reference(queries, kv, codec, scale=0.125, bias=codes * units[..., None])
    found = attend_packed(queries, kv, codec, scale=0.125, bias=codes.to(torch.int16), bias_unit=units)
    check(found, exact, LIMIT)
