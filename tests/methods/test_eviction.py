"""Promises of the eviction baselines: bytes as asked, the right tokens kept, the published formulas."""

import pytest
import torch

from kvtool import attention, scores
from kvtool.errors import MethodOptionError
from kvtool.methods import make_method
from kvtool.methods.base import LayerCalibration, nbytes
from kvtool.methods.eviction import Eviction, pyramid
from kvtool.shapes import LayerKind, LayerShape, Rope

POLICIES = ("snapkv", "pyramidkv", "tova", "expected", "h2o", "streaming")
SHAPE = LayerShape(kind=LayerKind.FULL, num_heads=6, num_kv_heads=2, head_dim=16, scale=0.25, rope=0)
ROPE = Rope(inv_freq=tuple(1e4 ** (-2 * i / 16) for i in range(8)))


def layer(fraction, rope=ROPE):
    return LayerCalibration(0, SHAPE, rope, {"fraction": torch.tensor(fraction)})


def random(T=200, S=70, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(2, h, n, 16, generator=g) for h, n in ((6, S), (2, T), (2, T)))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.1, 0.0248])
def test_keeps_the_share_asked_for_and_whole_tokens_in_order(policy, fraction):
    queries, keys, values = random()
    method, at = Eviction(policy=policy), torch.arange(4, 204)
    carry = method.begin(queries, keys[:, :, :20], values[:, :, :20], layer(fraction), sinks=4)
    kv, _ = method.compress(keys, values, layer(fraction), positions=at, queries=queries, carry=carry)
    kept = int(fraction * 200)
    assert nbytes(kv) == 2 * 2 * 2 * kept * 16 * 2
    for b in range(2):
        for h in range(2):
            rows = [int((keys[b, h].half() == k).all(-1).nonzero()) for k in kv.keys[b, h]]
            assert rows == sorted(set(rows))
            assert torch.equal(kv.values[b, h], values[b, h, rows].half())


def test_everything_kept_is_exact_attention():
    queries, keys, values = random()
    keys, values = keys.half().float(), values.half().float()
    for policy in POLICIES:
        method, at = Eviction(policy=policy), torch.arange(200)
        kv, _ = method.compress(keys, values, layer(1.0), positions=at, queries=queries)
        found = method.attend(queries, kv, layer(1.0), positions=at, scale=0.25)
        assert torch.allclose(found.out, attention.attend(queries, keys, values, scale=0.25).out, atol=1e-5)


@pytest.mark.parametrize("policy", ["snapkv", "pyramidkv", "tova", "expected", "h2o"])
def test_a_token_that_is_attended_is_kept(policy):
    """Queries that all point at one key: every scorer but recency must keep it."""
    queries, keys, values = random(seed=1)
    direction = torch.ones(16)
    rope = None  # with rotary embedding a direction is no direction
    keys[:, :, 77] = 8 * direction
    queries = direction + 0.1 * queries
    method = Eviction(policy=policy, pool=1)
    kv, _ = method.compress(keys, values, layer(0.02, rope), positions=torch.arange(200), queries=queries)
    assert (kv.keys == keys[:, :, 77:78].half()).all(-1).any(-1).all()


def test_streaming_keeps_the_newest():
    queries, keys, values = random()
    kv, _ = Eviction(policy="streaming").compress(
        keys, values, layer(0.1), positions=torch.arange(200), queries=queries
    )
    assert torch.equal(kv.keys, keys[:, :, -20:].half())


def test_h2o_keeps_the_heaviest_of_causal_attention_and_the_newest(monkeypatch):
    """Against the definition: a causal softmax over the whole prompt, summed over every query, half of the budget."""
    g = torch.Generator().manual_seed(2)
    queries, keys, values = (torch.randn(1, h, 100, 16, generator=g) for h in (6, 2, 2))
    weights = (queries.reshape(1, 2, 3, 100, 16) @ keys[:, :, None].mT * 0.25).masked_fill(
        torch.ones(100, 100, dtype=torch.bool).triu(1), -torch.inf
    )
    total = weights.softmax(-1).sum(-2).mean(2)[..., 4:84]  # 4 sinks and a window of 16 stay exact
    method, inner, outer = Eviction(policy="h2o"), slice(4, 84), [*range(4), *range(84, 100)]
    monkeypatch.setattr("kvtool.methods.eviction._WEIGHTS", 6 * 80 * 7)  # seven queries at a time
    carry = method.begin(queries, keys[:, :, outer], values[:, :, outer], layer(0.25), sinks=4)
    at = torch.arange(4, 84)
    # the first queries come before some sinks, which they see here: a hundredth of their weights
    score = method.score(keys[:, :, inner], values[:, :, inner], layer(0.25), at, queries, carry)
    assert torch.allclose(score, total, rtol=0.01)
    kv, _ = method.compress(
        keys[:, :, inner], values[:, :, inner], layer(0.25), positions=at, queries=queries, carry=carry
    )
    heavy = total[..., :70].topk(10, -1).indices.sort(-1).values  # 20 are kept: 10 heavy, 10 recent
    for h in range(2):
        kept = [*(heavy[0, h] + 4).tolist(), *range(74, 84)]
        assert torch.equal(kv.keys[0, h], keys[0, h, kept].half())


def test_blocks_that_come_later_keep_their_share_in_the_long_run():
    _, keys, values = random(T=640)
    carry, kept = None, 0
    for start in range(0, 640, 64):
        part = slice(start, start + 64)
        kv, carry = Eviction().compress(
            keys[:, :, part], values[:, :, part], layer(0.0248), positions=torch.arange(64), carry=carry
        )
        kept += kv.keys.shape[2]
    assert kept == int(0.0248 * 640)


@pytest.mark.parametrize("share", [0.0248, 0.125, 0.5, 0.9])
def test_the_pyramid_falls_and_has_the_right_mean(share):
    shares = pyramid(share, 30)
    assert sum(shares) / 30 == pytest.approx(share)
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] <= shares[0] <= 1
    assert pyramid(share, 1) == [share]


def test_expected_attention_is_the_mean_of_exp_over_gaussian_queries():
    """E exp(s q.k) = exp(s mu.k + s^2 k^T Sigma k / 2), against the queries themselves, without rotary embedding."""
    g = torch.Generator().manual_seed(3)
    mix = torch.randn(16, 16, generator=g) / 4
    queries = torch.randn(1, 6, 200_000, 16, generator=g) @ mix + 0.3
    keys, values = torch.randn(1, 2, 10, 16, generator=g), torch.ones(1, 2, 10, 16)
    found = scores.mass(scores.expect(queries, keys, values, scale=0.25, rope=None, end=200_000))
    mean = (queries.reshape(1, 2, 3, -1, 16) @ keys[:, :, None].mT * 0.25).exp().mean(-2)
    assert torch.allclose(found, (mean / mean.sum(-1, keepdim=True)).mean(2), rtol=0.05)  # 200k draws of a lognormal


def test_expected_attention_turns_queries_to_the_next_positions():
    """All queries equal before rotary embedding: the expectation is that query averaged over the next 512 positions."""
    g = torch.Generator().manual_seed(4)
    query = torch.randn(16, generator=g)
    queries = ROPE.rotate(query.expand(1, 6, 50, 16), torch.arange(950, 1000))
    keys = torch.randn(1, 2, 8, 16, generator=g)
    found = scores.mass(scores.expect(queries, keys, keys, scale=0.25, rope=ROPE, end=1000))
    ahead = ROPE.rotate(query.expand(512, 16), torch.arange(1000, 1512)).mean(0)
    assert torch.allclose(found, (0.25 * keys @ ahead).softmax(-1), atol=1e-4)


def test_a_bad_budget_is_refused_in_one_sentence():
    with pytest.raises(MethodOptionError, match="above 0 % and up to 100 %"):
        make_method("eviction", {"budget": "0"})
