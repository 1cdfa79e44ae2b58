"""transform below 1.25 bits: tokens are kept by what they will be worth, at levels, within the rate, and read back."""

from dataclasses import replace

import pytest
import torch

from kvtool import attention
from kvtool.backends import choose_backend
from kvtool.calibration import Calibration
from kvtool.capture.sample import LayerSample
from kvtool.errors import CaptureError, ModelError
from kvtool.fitting import fit
from kvtool.methods import make_method
from kvtool.methods.base import LayerCalibration, nbytes
from kvtool.policy import CachePolicy
from kvtool.rdkv.pages import token_levels
from kvtool.runtime import serve
from kvtool.shapes import CacheShape, LayerKind, LayerShape, Rope
from kvtool.transform import keeping, ladder, worth


class FakeCapture:
    """Two layers of random tokens with a mean and uneven channels; all that ``fit`` may look at."""

    def __init__(self, D=64, H=2, G=3, T=448):
        layer = LayerShape(kind=LayerKind.FULL, num_heads=H * G, num_kv_heads=H, head_dim=D, scale=D**-0.5, rope=0)
        self.rope = Rope(inv_freq=tuple(1e4 ** (-i / (D // 2)) for i in range(D // 2)))
        self.shape = CacheShape(layers=(layer, layer), ropes=(self.rope,))
        self.layers, self.T = [0, 1], T

    def samples(self, layer, *, tokens=None):
        yield self.sample(layer, self.T, seed=10 * layer)

    def sample(self, layer, T, seed, start=0):
        g = torch.Generator().manual_seed(seed)
        shape = self.shape.layers[layer]
        H, HQ, D = shape.num_kv_heads, shape.num_heads, shape.head_dim
        fixed = torch.Generator().manual_seed(layer)
        mean, spread = torch.randn(H, 1, D, generator=fixed), torch.rand(H, 1, D, generator=fixed) + 0.3
        positions = torch.arange(start, start + T)
        keys = self.rope.rotate(mean + spread * torch.randn(H, T, D, generator=g), positions)
        values = torch.randn(H, T, D, generator=g)
        queries = self.rope.rotate(torch.randn(HQ, T, D, generator=g), positions)
        return LayerSample(layer, 0, shape, self.rope, keys, values, positions, queries, positions)


_FITTED = {}


def fitted(bits=0.75, D=64, layer=1, **options):
    key = (bits, D, *sorted(options.items()))
    if key not in _FITTED:
        made = FakeCapture(D)
        method = make_method("transform", {"bits": bits, **options})
        _FITTED[key] = (made, method, method.fit(made))
    made, method, tensors = _FITTED[key]
    own = {name.split(".", 2)[2]: x for name, x in tensors.items() if name.startswith(f"layers.{layer}.")}
    return method, LayerCalibration(layer, made.shape.layers[layer], made.shape.rope(layer), own), made


def tokens(made, T, B=2, start=4, layer=1):
    rows = [made.sample(layer, T, seed=100 + b, start=start) for b in range(B)]
    keys, values, queries = (torch.stack([getattr(row, x) for row in rows]) for x in ("keys", "values", "queries"))
    return keys, values, queries, rows[0].positions


def through(method, layer, keys, values, queries, positions, carry=None):
    carry = method.begin(queries, keys[:, :, :0], values[:, :, :0], layer, sinks=0, carry=carry)
    kv, carry = method.compress(keys, values, layer, positions=positions, queries=queries, carry=carry)
    return kv, carry, method.decompress(kv, layer, positions=positions)


def stored(kv, keys):
    return 8 * nbytes(kv) / (2 * keys.numel())


# what is stored


@pytest.mark.parametrize("bits", [0.75, 1.2])
def test_a_layer_keeps_within_its_rate_and_the_layers_within_the_budget(bits):
    rates = []
    for index in (0, 1):
        method, layer, made = fitted(bits, layer=index)
        keys, values, queries, positions = tokens(made, 2048, B=1, layer=index)
        kv, carry, _ = through(method, layer, keys, values, queries, positions)
        rates.append(float(layer["rate"]) / 128)
        # what is left is less than a page of the highest level
        page = max(ladder.page_bits(layer)) / (2 * keys.numel())
        assert rates[-1] - page <= stored(kv, keys) <= rates[-1]
        left = rates[-1] * 2 * keys.numel() - 8 * nbytes(kv)
        assert float(carry.left) == pytest.approx(left, abs=1)
    assert sum(rates) / 2 <= bits


@pytest.mark.parametrize("T", [1, 7, 63, 65, 1000])
@pytest.mark.parametrize("D", [64, 80])
def test_any_length_is_stored_within_the_rate_and_reads_back(T, D):
    method, layer, made = fitted(1.2, D)
    keys, values, queries, positions = tokens(made, T)
    kv, _, read = through(method, layer, keys, values, queries, positions)
    assert stored(kv, keys) <= max(float(layer["rate"]) / (2 * D), ladder.PLANES / (2 * D) * 8)
    kept = (token_levels(kv.levels, T) > 0).sum(-1)
    assert torch.equal((read.bias == 0).sum(-1), kept)
    assert read.keys.isfinite().all()
    found = method.attend(queries, kv, layer, positions=positions, scale=0.125)
    assert found.out.isfinite().all()


def test_pages_hold_each_token_at_its_level():
    """Random levels, so every segment has an odd length: packed and read back is what each level's code gives."""
    _, layer, made = fitted(1.2)
    keys, values, _, positions = tokens(made, 300)
    levels = torch.randint(0, ladder.LEVELS, keys.shape[:3], generator=torch.Generator().manual_seed(0)).byte()
    kv = ladder.pack(keys, values, levels, layer, positions, guard=1.0)
    assert torch.equal(token_levels(kv.levels, 300), levels)
    found_keys, found_values, real = ladder.unpack(kv, layer, positions)
    for level in range(1, ladder.LEVELS):
        key, value = ladder.restore(keys, values, layer, positions, level)
        for b in range(2):
            for h in range(2):
                order = levels[b, h].argsort(descending=True, stable=True)[: int((levels[b, h] > 0).sum())]
                rows = (levels[b, h, order] == level).nonzero().squeeze(1)
                assert real[b, h, rows].all()
                torch.testing.assert_close(found_keys[b, h, rows], key[b, h, order[rows]], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(found_values[b, h, rows], value[b, h, order[rows]], atol=1e-4, rtol=1e-4)


def test_higher_levels_cost_more_and_lose_less():
    _, layer, made = fitted(1.2)
    keys, values, _, positions = tokens(made, 256)
    errors = []
    for level in range(1, ladder.LEVELS):
        key, value = ladder.restore(keys, values, layer, positions, level)
        errors.append(float((key - keys).square().mean() / 2 + (value - values).square().mean()))
    bits = ladder.page_bits(layer)
    assert bits == sorted(bits)
    assert errors == sorted(errors, reverse=True)
    assert layer["distortion"].tolist() == sorted(layer["distortion"].tolist(), reverse=True)


def test_sequences_of_a_batch_are_as_if_alone():
    method, layer, made = fitted(0.75)
    keys, values, queries, positions = tokens(made, 512)
    # the second has all of its weight on few tokens, so the rows keep different numbers of tokens
    keys[1, :, ::50] *= 3
    both, _, _ = through(method, layer, keys, values, queries, positions)
    levels = token_levels(both.levels, 512)
    for b in range(2):
        row = slice(b, b + 1)
        alone, _, _ = through(method, layer, keys[row], values[row], queries[row], positions)
        # products of other shapes may round differently, and two tokens of one worth change places
        assert (token_levels(alone.levels, 512) != levels[row]).float().mean() < 0.01
        alone = ladder.pack(keys[row], values[row], levels[row], layer, positions, method.guard)
        for field, x, y in zip(both._fields, both, alone, strict=True):
            assert (x[row, ..., : y.shape[-1]] != y).float().mean() < 1e-3, field
            assert not x[row, ..., y.shape[-1] :].any(), field


# which tokens stay


def test_what_queries_look_at_is_kept():
    """One token that the last queries look at, long ago, with all others alike."""
    method, layer, made = fitted(0.75)
    keys, values, queries, positions = tokens(made, 1024, B=1)
    keys[:, :, 100] = 3 * queries.unflatten(1, (2, 3)).sum(2)[:, :, -1]
    queries[:, :, -64:] = queries[:, :, -1:]
    kv, _, _ = through(method, layer, keys, values, queries, positions)
    levels = token_levels(kv.levels, 1024)
    assert (levels[0, :, 100] > 0).all()
    assert (levels > 0).float().mean() < 0.9


def test_keeping_by_worth_beats_keeping_at_random():
    """At the same bytes; on tokens some of which are really attended."""
    method, layer, made = fitted(0.75)
    keys, values, queries, positions = tokens(made, 1024, B=1)
    keys = (
        keys * torch.linspace(0.2, 2.0, 1024)[torch.randperm(1024, generator=torch.Generator().manual_seed(5))][:, None]
    )
    exact = attention.attend(queries[:, :, -64:], keys, values, scale=0.125).out
    errors = []
    for score in (None, torch.rand(keys.shape[:3], generator=torch.Generator().manual_seed(6))):
        known = method.begin(queries, keys[:, :, :0], values[:, :, :0], layer, sinks=0)
        w = keeping.worth_of(keys, values, layer, positions, queries, known) if score is None else score
        levels, _ = keeping.plan(w, layer, known.left)
        read = keeping.decompress(ladder.pack(keys, values, levels, layer, positions, 1.0), layer, positions)
        found = attention.attend(queries[:, :, -64:], *read, scale=0.125).out
        errors.append(float(attention.relative_error(found, exact)))
    assert errors[0] < 0.9 * errors[1]


def test_without_queries_the_newest_stay():
    method, layer, made = fitted(0.75)
    keys, values, _, positions = tokens(made, 640)
    kv, _ = method.compress(keys, values, layer, positions=positions)
    levels = token_levels(kv.levels, 640)
    kept = levels > 0
    assert kept.any()
    assert torch.equal(kept.sort(-1).values, kept)  # all false, then all true


def test_a_growing_cache_spends_its_rate_over_time():
    """Blocks of 64 that leave the window: one may keep nothing, but bits are carried on."""
    method, layer, made = fitted(0.75)
    keys, values, queries, positions = tokens(made, 64 * 24, B=1)
    carry, bits = None, 0
    for block in range(24):
        own = slice(64 * block, 64 * block + 64)
        kv, carry, _ = through(
            method,
            layer,
            keys[:, :, own],
            values[:, :, own],
            queries[:, :, own.stop - 1 : own.stop],
            positions[own],
            carry,
        )
        bits += 8 * nbytes(kv)
        allowed = float(layer["rate"]) * 2 * own.stop
        assert bits <= allowed
    assert bits > allowed - 2 * max(ladder.page_bits(layer))


def test_a_page_outside_the_statistics_lies_in_the_plain_rotation():
    method, layer, made = fitted(1.2)
    keys, values, queries, positions = tokens(made, 512, B=1)
    inside, _, _ = through(method, layer, keys, values, queries, positions)
    assert not inside.outside.any()
    kv, _, read = through(method, layer, keys, 50 * values, queries, positions)
    assert (kv.outside == 2).all()
    assert method.notes(kv)["of pages outside what was calibrated"] == 0.5
    # their range is 3 octaves wider
    careless, _, narrow = through(replace(method, guard=1.0), layer, keys, 50 * values, queries, positions)
    assert not careless.outside.any()
    assert read.values.norm(dim=-1).mean() > 4 * narrow.values.norm(dim=-1).mean()


# the regression


def test_regression_finds_the_mean_of_what_is_worth_something():
    """Gamma noise of shape 1/2 around e^(a.x): the mean is found, which is e^1.27 times the mean logarithm's."""
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.ones(2, 20_000, 1), torch.randn(2, 20_000, 2, generator=g)], -1)
    a = torch.tensor([[-4.0, 1.0, 0.5], [-2.0, -0.5, 0.0]])
    noise = torch.randn(2, 20_000, generator=g).square()  # chi squared: mean 1
    found = worth.regress(x, worth.predict(x, a) * noise)
    # the standard error of a coefficient is sqrt(2 / 20000) = .01; steps are clamped at a factor of 4, which takes .09
    torch.testing.assert_close(found, a, atol=0.12, rtol=0)


def test_worth_is_what_noise_on_a_logit_costs():
    """Independent noise of 1 % on every logit moves the output by worth, summed: 2 % on 400 draws of 64 tokens."""
    g = torch.Generator().manual_seed(1)
    made = FakeCapture(T=128)
    sample = made.sample(0, 128, seed=3)
    seen = worth.future(sample, 96, 32, 1)
    importance = torch.ones(6)
    H, N = 2, seen.weights.shape[-1]
    expected = worth.turned_out(seen, sample.values[:, :N].float(), importance).sum(-1)
    logits = seen.weights.clamp_min(1e-38).log()
    noisy = (logits + 0.01 * torch.randn(400, *logits.shape, generator=g)).softmax(-1) @ sample.values[:, :N].float()
    moved = (noisy - seen.out).square().sum(-1).mean((0, 2)) / 0.01**2
    torch.testing.assert_close(moved, expected, rtol=0.1, atol=0)
    assert len(moved) == H


def test_features_of_one_pass_and_of_queries_in_parts_agree(monkeypatch):
    _, layer, made = fitted(0.75)
    keys, values, queries, positions = tokens(made, 200, B=1)
    known = worth.begin(queries, keys[:, :, :4], values[:, :, :4], layer, sinks=4, carry=None)
    importance = torch.ones(6)
    rest = keys[:, :, 4:], values[:, :, 4:], layer, importance, known
    whole = worth.features(queries, *rest, positions=positions[4:])
    monkeypatch.setattr(worth, "_WEIGHTS", 1)
    torch.testing.assert_close(worth.features(queries, *rest, positions=positions[4:]), whole, atol=1e-4, rtol=1e-4)
    assert whole.shape == (1, 2, 196, worth.FEATURES)


# what is refused


def test_not_a_number_is_refused():
    method, layer, made = fitted(0.75)
    keys, values, queries, positions = tokens(made, 64, B=1)
    values[0, 0, 3, 1] = torch.nan
    with pytest.raises(ModelError, match="layer 1: values: expected finite numbers"):
        through(method, layer, keys, values, queries, positions)


def test_a_capture_without_queries_is_refused():
    class Silent(FakeCapture):
        def sample(self, layer, T, seed, start=0):
            one = super().sample(layer, T, seed, start)
            return LayerSample(layer, 0, one.shape, one.rope, one.keys, one.values, one.positions)

    with pytest.raises(CaptureError, match="--queries all"):
        make_method("transform", {"bits": 0.4}).fit(Silent())


def test_kernels_say_that_they_have_none_and_auto_takes_the_reference():
    kernels = pytest.importorskip("kvtool.kernels.transform")
    method = make_method("transform", {"bits": 0.4})
    reason = kernels.refuses(method)
    assert reason == "transform at 0.4 bits evicts tokens, for which there is no kernel"
    assert kernels.refuses(make_method("transform")) is None
    assert choose_backend("auto", method, torch.device("cpu")).kernel is None


def test_from_a_bit_and_a_quarter_on_nothing_is_evicted():
    assert make_method("transform", {"bits": 1.2499}).block is None
    assert make_method("transform", {"bits": 1.25}).block == 64
    assert not make_method("transform").evicts


# served


def test_generation_keeps_within_the_rate_while_it_grows(tiny_model, tiny_capture, tmp_path):
    policy = CachePolicy(sinks=4, window=32)
    method = make_method("transform", {"bits": 1.2})
    made = fit(tiny_capture, method, policy=policy, out=tmp_path / "t.safetensors")
    assert "of tokens kept" in made.calibration.provenance["notes"]
    calibration = Calibration.load(made.path)
    prompt = torch.randint(0, 95, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), serve(tiny_model.model, calibration) as cache:
        options = {"max_new_tokens": 76, "min_new_tokens": 76, "do_sample": False, "pad_token_id": 0}
        tiny_model.model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **options)
        held = cache.nbytes()
        runs = [len(layer.parts) for _, layer in cache.compressed_layers()]
    assert held.tokens == 375
    assert runs == [2, 2]  # the prompt, and a block of 64
    values = 2 * 2 * 2 * 32 * 2 * (264 + 64)  # of two sequences and layers
    assert 0 < 8 * held.compressed <= 1.2 * values
