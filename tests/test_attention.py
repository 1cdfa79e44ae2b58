"""Attention as a mergeable state, against softmax written out."""

from itertools import pairwise

import pytest
import torch

from kvtool.attention import attend, block_shares, merge, relative_error, weight


def inputs(S=5, T=100, B=2, H=2, G=3, D=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    return make(B, H * G, S, D), make(B, H, T, D), make(B, H, T, D), make(B, H, T)


@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_softmax(softcap, causal):
    queries, keys, values, bias = inputs()
    out, lse = attend(queries, keys, values, bias, scale=0.4, softcap=softcap, causal=causal)
    for head in (0, 5):
        for s in (0, 4):
            seen = 100 - 5 + s + 1 if causal else 100
            x = keys[1, head // 3, :seen] @ queries[1, head, s] * 0.4
            x = (x if softcap is None else softcap * torch.tanh(x / softcap)) + bias[1, head // 3, :seen]
            # float64: only the order of sums differs
            torch.testing.assert_close(out[1, head, s], x.softmax(0) @ values[1, head // 3, :seen], rtol=0, atol=1e-12)
            torch.testing.assert_close(lse[1, head, s], x.logsumexp(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cuts", [(0, 4, 61, 100), (0, 100), (0, 1, 2, 3, 100)])
def test_parts_merge_exactly_and_their_weights_are_their_share(cuts):
    queries, keys, values, bias = inputs()
    whole = attend(queries, keys, values, bias, scale=0.25)
    pieces = [slice(a, b) for a, b in pairwise(cuts)]
    parts = [attend(queries, keys[:, :, c], values[:, :, c], bias[:, :, c], scale=0.25) for c in pieces]
    merged = merge(*parts)
    torch.testing.assert_close(merged.out, whole.out, rtol=0, atol=1e-12)
    torch.testing.assert_close(merged.lse, whole.lse, rtol=0, atol=1e-12)
    p = (queries.reshape(2, 2, 3, 5, 16) @ keys[:, :, None].mT * 0.25 + bias[:, :, None, None]).softmax(-1)
    for part, c in zip(parts, pieces, strict=True):
        torch.testing.assert_close(weight(part.lse, merged.lse), p[..., c].sum(-1).flatten(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [100, 0])
def test_a_part_without_visible_tokens_is_nothing(tokens):
    queries, keys, values, bias = inputs()
    hidden = torch.full_like(bias, -torch.inf)[:, :, :tokens]
    nothing = attend(queries, keys[:, :, :tokens], values[:, :, :tokens], hidden, scale=0.25)
    assert nothing.out.eq(0).all()
    assert nothing.lse.eq(-torch.inf).all()
    something = attend(queries, keys, values, bias, scale=0.25)
    assert torch.equal(merge(something, nothing).out, something.out)
    assert merge(nothing, nothing).out.eq(0).all()


def test_an_evicted_token_does_not_count():
    queries, keys, values, bias = inputs()
    bias[:, :, 10:20] = -torch.inf
    kept = [i for i in range(100) if not 10 <= i < 20]
    out = attend(queries, keys, values, bias, scale=0.25).out
    expected = attend(queries, keys[:, :, kept], values[:, :, kept], bias[:, :, kept], scale=0.25).out
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_half_precision_is_computed_in_float32():
    queries, keys, values, _ = inputs(T=1000)
    exact = attend(*(x.bfloat16().double() for x in (queries, keys, values)), scale=0.25).out
    out = attend(*(x.bfloat16() for x in (queries, keys, values)), scale=0.25).out
    assert out.dtype == torch.float32
    # float32 sums of 1000 terms
    assert relative_error(out, exact) < 1e-5


@pytest.mark.parametrize(("S", "first"), [(1, 0), (1, 4), (7, 4), (100, 4)])
def test_shares_of_blocks_are_sums_of_the_softmax(S, first):
    queries, keys, _, _ = inputs(S=S)
    found = block_shares(queries, keys, first=first, block=64, scale=0.25)
    hidden = torch.ones(S, 100, dtype=torch.bool).triu(100 - S + 1)
    weights = (queries.unflatten(1, (2, 3)) @ keys[:, :, None].mT * 0.25).masked_fill(hidden, -torch.inf).softmax(-1)
    pieces = [slice(first, first + 64), slice(first + 64, 100)]
    expected = torch.stack([weights[..., piece].sum(-1) for piece in pieces], -1).flatten(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
