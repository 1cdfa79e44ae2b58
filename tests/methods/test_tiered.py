"""Tiered: blocks change places, never their order, and never cost more than the budget."""

import errno
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool import attention, home
from kvtool.bounds.claims import check_claims
from kvtool.calibration import CachePolicy, Calibration
from kvtool.capture import Capture
from kvtool.capture.sample import LayerSample
from kvtool.errors import MethodOptionError, ModelError
from kvtool.fitting import fit
from kvtool.methods import make_method
from kvtool.methods.base import LayerCalibration, nbytes
from kvtool.runtime import exact_prefill, serve
from kvtool.shapes import LayerKind, LayerShape
from kvtool.tiered import originals, places

PLAIN = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
MIX = (0.2, 0.2, 0.3, 0.3)


def layer_of(method, H=2, G=2, D=32, shares=MIX, host=1 << 30, thresholds=(0.0, 0.0, 0.0)):
    """A layer whose codes are data-free and whose tiers are as given."""
    shape = LayerShape(kind=LayerKind.FULL, num_heads=H * G, num_kv_heads=H, head_dim=D, scale=D**-0.5)
    g = torch.Generator().manual_seed(0)
    sample = LayerSample(0, 0, shape, None, torch.randn(H, 128, D, generator=g), torch.randn(H, 128, D, generator=g),
                         torch.arange(128))  # fmt: skip
    tensors = {}
    for prefix, coded in method._coded().items():
        tensors |= {prefix + k: t for k, t in coded.fit_layer(shape, None, [sample], layer=0).items()}
    tensors |= {"shares": torch.tensor(shares), "thresholds": torch.tensor(thresholds)}
    return LayerCalibration(0, shape, None, tensors | {"host_bytes": torch.tensor(host)})


def tokens(blocks, H=2, D=32, B=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, H, 64 * blocks, D, generator=g) for _ in range(2))


class Cache:
    """What the runtime does with a method that moves, without a model: ``step`` is one pass."""

    def __init__(self, layer, method, B=1, dtype=torch.float32):
        self.layer, self.method, self.B, self.state, self.kv = layer, method, B, None, None
        H, D = layer.shape.num_kv_heads, layer.shape.head_dim
        self.keys = self.values = torch.zeros(B, H, 0, D, dtype=dtype)

    def step(self, blocks=0, shares=None):
        """``blocks`` leave the window; ``shares`` [N] is what every query just saw of each block."""
        H, D = self.layer.shape.num_kv_heads, self.layer.shape.head_dim
        start = 4 + self.keys.shape[2]
        keys, values = (x.to(self.keys.dtype) for x in tokens(blocks, H, D, self.B, seed=start))
        if shares is not None:
            seen = torch.as_tensor(shares, dtype=torch.float32).expand(self.B, self.layer.shape.num_heads, 1, -1)
            self.state = self.method.observe(seen, self.state)
        self.state = self.method.begin(None, keys[:, :, :0], values[:, :, :0], self.layer, sinks=4, carry=self.state)
        at = torch.arange(start, start + keys.shape[2])
        self.kv, self.state = self.method.compress(keys, values, self.layer, positions=at, carry=self.state)
        self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)

    def read(self):
        at = torch.arange(4, 4 + self.keys.shape[2])
        return self.method.decompress(self.kv, self.layer, positions=at)

    def tier(self):
        """[B, N, H]"""
        return self.kv.tier.unflatten(1, (-1, self.layer.shape.num_kv_heads))


def pointed(blocks, at, rest=0.001):
    shares = torch.full((blocks,), rest)
    shares[at] = 0.9
    return shares


@pytest.fixture(scope="module")
def half_model(make_tiny):
    loaded = make_tiny()
    loaded.model.bfloat16()
    yield loaded.model
    loaded.model.float()


def served_calibration(model, method, shares, window=32, host=1 << 30):
    from kvtool.models.geometry import cache_shape

    shape = cache_shape(model)
    one = layer_of(method, D=32, shares=shares)
    tensors = {f"layers.{i}.{k}": t for i in shape.compressible for k, t in one.tensors.items() if k != "host_bytes"}
    return Calibration(method, shape, tensors | {"host_bytes": torch.tensor(host)}, CachePolicy(window=window))


def prompt(tokens, batch=1):
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(1))


def test_all_hot_is_the_plain_cache_bit_for_bit(half_model):
    ids = prompt(300, batch=2)
    made = served_calibration(half_model, make_method("tiered", {"tiers": "100,0,0,0"}), (1.0, 0.0, 0.0, 0.0))
    with torch.inference_mode():
        prefill = exact_prefill(half_model, ids[:, :200])
        with serve(half_model, made) as cache:
            cache.adopt(prefill)
            assert cache.layers[0].parts.tokens == 128
            for t in range(200, 290, 3):
                served = half_model(ids[:, t : t + 3], past_key_values=cache).logits
                plain = _plain(half_model, ids[:, t : t + 3], prefill.cache)
                assert torch.equal(plain, served), t
            assert cache.layers[0].parts.tokens == 192
            assert cache.nbytes().host == 0


def _plain(model, ids, cache):
    """The model's own step while it is being served: by its own attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        return model(ids, past_key_values=cache).logits
    finally:
        model.set_attn_implementation(before)


def test_beams_follow_blocks_originals_and_scores(half_model):
    made = served_calibration(half_model, make_method("tiered", {"tiers": "100,0,0,0"}), (1.0, 0.0, 0.0, 0.0))
    options = dict(max_new_tokens=12, num_beams=3, **PLAIN)
    with serve(half_model, made) as cache:
        served = half_model.generate(prompt(290), past_key_values=cache, **options)
        assert cache.layers[0].parts.tokens == 256
    assert torch.equal(served, half_model.generate(prompt(290), **options))


def test_a_mixed_cache_serves_batches_and_counts_the_host_apart(half_model):
    made = served_calibration(half_model, make_method("tiered", {"cooldown": 0}), MIX)
    with serve(half_model, made) as cache:
        out = half_model.generate(prompt(290, batch=2), max_new_tokens=20, past_key_values=cache, **PLAIN)
        assert out.shape == (2, 310)
        size = cache.nbytes()
    # 2 layers, 2 sequences: of 8 units one is hot, the originals of the others are on the host, with two numbers each
    assert size.host == 2 * 2 * 7 * (4 * 64 * 32 + 16)
    assert size.stored == size.compressed + size.exact
    assert size.resident == size.stored


OPERATIONS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2**20)), min_size=1, max_size=6)


@settings(max_examples=15, deadline=None)
@given(first=st.integers(1, 5), operations=OPERATIONS, host=st.sampled_from([0, 3 * 4 * 64 * 32, 1 << 30]))
def test_blocks_stay_in_order_after_any_sequence_of_moves(first, operations, host):
    method = make_method("tiered", {"cooldown": 0, "hysteresis": 1, "halflife": 1})
    cache = Cache(layer_of(method, host=host), method, B=2)
    cache.step(first)
    for blocks, seed in operations:
        count = cache.kv.tier.shape[1] // 2 + blocks
        shares = torch.rand(2, 4, 1, count, generator=torch.Generator().manual_seed(seed)) ** 4
        cache.step(blocks, shares=shares)
        read = cache.read()
        for found, exact in ((read.keys, cache.keys), (read.values, cache.values)):
            found, exact = (torch.nn.functional.normalize(x, dim=-1) for x in (found, exact))
            # 2 bits leave a cosine of .94; two of these random tokens have at most .8
            assert torch.equal((found @ exact.mT).argmax(-1), torch.arange(exact.shape[2]).expand(2, 2, -1))
        for b in range(2):
            counts = torch.bincount(cache.kv.tier[b].long(), minlength=4).tolist()
            assert counts == places.capacities(torch.tensor(MIX), cache.kv.tier.shape[1])


def test_a_question_after_the_demotion_brings_the_original_back():
    method = make_method("tiered", {"cooldown": 0})
    cache = Cache(layer_of(method, shares=(0.1, 0.1, 0.5, 0.3)), method)
    cache.step(10)
    for _ in range(3):
        cache.step(shares=pointed(10, 9))
    assert cache.tier()[0, 2].min() >= 2
    before = cache.read()
    # after n queries the scores are 1 - 2^(-n/16) and 2^(-n/16): n = 26 is more than twice the old one
    for _ in range(28):
        cache.step(shares=pointed(10, 2))
    assert cache.tier()[0, 2].tolist() == [0, 0]
    after, block = cache.read(), slice(128, 192)
    # hot is 16 bits of the float32 original; the 3-bit code was off by a fifth
    torch.testing.assert_close(after.keys[:, :, block], cache.keys[:, :, block], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after.values[:, :, block], cache.values[:, :, block], rtol=1e-3, atol=1e-3)
    assert attention.relative_error(before.keys[:, :, block], cache.keys[:, :, block]) > 0.15


def test_without_an_original_nothing_goes_up():
    method = make_method("tiered", {"cooldown": 0})
    cache = Cache(layer_of(method, shares=(0.1, 0.1, 0.5, 0.3), host=0), method)
    cache.step(10)
    tier, read = cache.tier(), cache.read()
    for _ in range(3):
        cache.step(shares=pointed(10, 2))
    assert torch.equal(cache.tier()[:, 2], tier[:, 2])
    assert torch.equal(cache.read().keys[:, :, 128:192], read.keys[:, :, 128:192])
    assert method.host_bytes(cache.state) == 0


def test_with_originals_going_back_and_forth_changes_nothing():
    method = make_method("tiered", {"cooldown": 0, "halflife": 1e-3})
    # what a 16-bit model gives; float32 is rounded to float16 when it is first held as an original
    cache = Cache(layer_of(method, shares=(0.1, 0.0, 0.9, 0.0)), method, dtype=torch.float16)
    cache.step(10)
    states = []
    for at in (2, 7, 2, 7, 2):
        cache.step(shares=pointed(10, at))
        states.append(cache.kv)
    assert not torch.equal(states[0].tier, states[1].tier)
    for a, b in ((0, 2), (2, 4), (1, 3)):
        assert torch.equal(states[a].tier, states[b].tier)
        for x, y in zip((*states[a].hot, *states[a].cold), (*states[b].hot, *states[b].cold), strict=True):
            assert torch.equal(x, y)


def test_the_host_keeps_what_was_used_last_within_its_bytes():
    method = make_method("tiered", {"cooldown": 0, "recency": 0.0})
    unit = 4 * 64 * 32 + 16  # a block of one head in 16 bits, and its books
    cache = Cache(layer_of(method, shares=(0.0, 0.0, 1.0, 0.0), host=6 * unit), method)
    cache.step(5)
    assert cache.state.held.host.unit[0].tolist() == [4, 5, 6, 7, 8, 9]  # of equals the newest
    cache.step(shares=pointed(5, 2))  # block 2 matters to both heads
    cache.step(1)
    assert cache.state.held.host.unit[0].tolist() == [4, 5, 8, 9, 10, 11]
    held = cache.state.held.host
    assert nbytes(held) == 6 * unit
    assert method.host_bytes(cache.state) == nbytes(held)
    for slot, u in enumerate(held.unit[0].tolist()):
        block = slice(u // 2 * 64, u // 2 * 64 + 64)
        torch.testing.assert_close(held.keys[0, slot].float(), cache.keys[0, u % 2, block], rtol=1e-3, atol=1e-3)


def test_what_the_host_has_no_room_for_goes_to_the_file_and_comes_back():
    unit = 4 * 64 * 32 + 16
    method = make_method("tiered", {"cooldown": 0, "halflife": 1e-3, "recency": 0.0})
    layer = layer_of(method, shares=(0.1, 0.0, 0.9, 0.0), host=4 * unit)
    filed = replace(layer, tensors={**layer.tensors, "disk_bytes": torch.tensor(100 * unit)})
    roomy = replace(layer, tensors={**layer.tensors, "host_bytes": torch.tensor(100 * unit)})
    one, other = (Cache(x, method, B=2, dtype=torch.float16) for x in (filed, roomy))
    for at in (None, 2, 7, 2, 9, 0):
        for cache in (one, other):
            cache.step(10 if at is None else 0, None if at is None else pointed(10, at))
        host, disk = one.state.held
        assert host.unit.shape[1] == 4
        for b in range(2):
            # nobody is in both, the newest in memory, and all that is not hot is somewhere
            units = [x[x >= 0].tolist() for x in (host.unit[b], disk.unit[b])]
            assert sorted(units[0] + units[1]) == (one.kv.tier[b] > 0).nonzero().squeeze(1).tolist()
            assert host.used[b].min() >= disk.used[b].max()
            for row, u in enumerate(disk.unit[b].tolist()):
                block = slice(u // 2 * 64, u // 2 * 64 + 64)
                assert u < 0 or torch.equal(disk.values[b, row], one.values[b, u % 2, block])
        # where originals lie changes nothing
        assert torch.equal(one.kv.tier, other.kv.tier)
        assert torch.equal(one.read().keys, other.read().keys)
    assert method.host_bytes(one.state) == 2 * 4 * unit
    assert 2 * 14 * unit <= method.disk_bytes(one.state) <= 2 * 100 * unit
    assert not list(home.home().iterdir())  # the file has no name


def test_the_file_drops_what_was_used_least_recently_and_grows_within_its_budget():
    unit = 4 * 64 * 32 + 16
    method = make_method("tiered", {"cooldown": 0, "recency": 0.0})
    layer = layer_of(method, shares=(0.0, 0.0, 1.0, 0.0), host=0)
    cache = Cache(replace(layer, tensors={**layer.tensors, "disk_bytes": torch.tensor(6 * unit)}), method)
    held = []
    for _ in range(4):
        cache.step(1)
        held.append(sorted(u for u in cache.state.held.disk.unit[0].tolist() if u >= 0))
    assert held == [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 7]]
    assert method.host_bytes(cache.state) == 0
    assert method.disk_bytes(cache.state) == 6 * unit


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_is_full_or_read_only_is_said_in_one_sentence(code, monkeypatch):
    def refused(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refused)
    method = make_method("tiered")
    layer = layer_of(method, host=0)
    with pytest.raises(ModelError, match=f"bytes of disk under .*{os.strerror(code)}.*smaller -o disk_mib") as error:
        Cache(replace(layer, tensors={**layer.tensors, "disk_bytes": torch.tensor(1 << 30)}), method).step(3)
    assert "\n" not in str(error.value)


def test_the_file_is_served_and_counted_apart(half_model):
    method = make_method("tiered", {"tiers": "0,0,50,50", "disk_mib": 64})
    calibration = served_calibration(half_model, method, (0.0, 0.0, 0.5, 0.5), host=0)
    calibration = replace(calibration, tensors={**calibration.tensors, "disk_bytes": torch.tensor(1 << 30)})
    ids = prompt(300)
    with serve(half_model, calibration) as cache:
        half_model.generate(ids, max_new_tokens=2, past_key_values=cache, **PLAIN)
        size = cache.nbytes()
    assert size.host == 0
    assert size.disk >= 2 * 6 * (4 * 64 * 32 + 16)  # 2 layers of 3 blocks of 2 heads


def test_host_memory_that_cannot_be_had_is_said(monkeypatch):
    def exhausted(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(originals._Found, "read", exhausted)
    method = make_method("tiered")
    with pytest.raises(ModelError, match="bytes of host memory .* use a smaller -o host_mib"):
        Cache(layer_of(method), method).step(3)


@pytest.mark.parametrize(("options", "match"), [
    (dict(bits=3, budget="20%"), "expected one budget"),
    (dict(tiers="5,15,70"), "percentages of hot, warm, cold and archive that sum to 100"),
    (dict(tiers="5,15,70,20"), "sum to 100"),
    (dict(budget="0"), "share of the 16-bit cache"),
    (dict(host_mib=-1), "host_mib"),
    (dict(cold_bits=2), "expected archive_bits below cold_bits 2, found 2"),
])  # fmt: skip
def test_bad_options_are_one_sentence(options, match):
    with pytest.raises(MethodOptionError, match=match):
        make_method("tiered", options)


@pytest.mark.parametrize(("options", "match"), [
    (dict(bits=2), "at 2 bits: expected at least 2.5.*, what the archive alone takes at head_dim 32"),
    (dict(bits=4, tiers="50,0,50,0"), "tiers 50,0,50,0: expected at most 4 bits, found 9.*; give more bits"),
])  # fmt: skip
def test_tiers_that_do_not_fit_are_refused(options, match, tiny_capture):
    with pytest.raises(MethodOptionError, match=match):
        fit(Capture.open(tiny_capture.path), make_method("tiered", options))


@pytest.mark.parametrize("options", [dict(bits=4.0), dict(budget="30%"), dict(tiers="10,20,40,30"), dict(bits=17.0)])
def test_the_fitted_budget_holds_on_unseen_tokens(options, tiny_capture):
    made = fit(tiny_capture, make_method("tiered", options)).calibration
    results = check_claims(made, tiny_capture)
    assert len(results) == 2
    assert all(one.holds for one in results)
    assert torch.isclose(made.tensors["layers.0.shares"].sum(), torch.tensor(1.0))


def test_nothing_moves_while_attention_does_not():
    method = make_method("tiered", {"cooldown": 0})
    cache = Cache(layer_of(method), method)
    cache.step(10)
    shares = torch.rand(10, generator=torch.Generator().manual_seed(3))
    for _ in range(200):
        cache.step(shares=shares)
    settled = cache.kv.tier
    noise = torch.Generator().manual_seed(4)
    for _ in range(20):  # a third up or down is less than the hysteresis
        cache.step(shares=shares * (1 + 0.3 * (2 * torch.rand(10, generator=noise) - 1)))
        assert torch.equal(cache.kv.tier, settled)


def test_who_has_moved_stays_for_the_cooldown():
    method = make_method("tiered", {"cooldown": 5, "hysteresis": 1, "halflife": 1e-3})
    cache = Cache(layer_of(method, shares=(0.1, 0.0, 0.9, 0.0)), method)
    cache.step(10)
    cache.step(shares=pointed(10, 2))
    history = []
    for _ in range(8):
        cache.step(shares=pointed(10, 7))
        history.append(int(cache.tier()[0, 2, 0]))
    assert history[:4] == [0] * 4
    assert history[-1] == 2


def test_harm_is_the_error_of_the_output_when_a_unit_is_coded():
    """First order: exact for the small noise of 8 bits; for 3 bits within a fifth."""
    method = make_method("tiered")
    layer = layer_of(method, H=2, G=2, D=32)
    g = torch.Generator().manual_seed(5)
    keys, values = torch.randn(2, 640, 32, generator=g), torch.randn(2, 640, 32, generator=g)
    queries, at = 2 * torch.randn(4, 640, 32, generator=g), torch.arange(640)
    sample = LayerSample(0, 0, layer.shape, None, keys, values, at, queries, at)
    codecs = method.codecs(layer)
    found = places.damage(sample, codecs, recency=1e9)  # ranked by age alone, the newest first
    end, blocks = 640 - 106, found.harm.shape[1] // 2
    first = end - 106 - 64 * blocks
    exact = attend_later(sample, keys, values, end)
    for t, tolerance in ((1, 0.02), (2, 0.2)):
        codec = codecs[t]
        positions = at[first : first + 64]
        part = slice(first, first + 64)
        kv, _ = codec.method.compress(keys[None, :, part], values[None, :, part], codec.layer, positions=positions)
        read = codec.method.decompress(kv, codec.layer, positions=positions)
        for head in range(2):
            coded = keys.clone(), values.clone()
            for x, y in zip(coded, read[:2], strict=True):
                x[head, part] = y[0, head]
            error = (attend_later(sample, *coded, end) - exact).square().sum(-1)[2 * head : 2 * head + 2].mean()
            expected = float(error / exact.square().sum(-1).mean())
            assert float(found.harm[t, 2 * (blocks - 1) + head]) == pytest.approx(expected, rel=tolerance)


def attend_later(sample, keys, values, end):
    out = attention.attend(
        sample.queries[None], keys[None], values[None], scale=sample.shape.scale, causal=True
    ).out[0]  # fmt: skip
    return out[:, end:]
