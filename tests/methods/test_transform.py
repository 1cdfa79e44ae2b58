"""transform spends bits where they matter, and everything it stores reads back through one linear map."""

from dataclasses import replace

import pytest
import torch

from kvtool import attention, codebooks, packing
from kvtool.capture.sample import LayerSample
from kvtool.errors import MethodOptionError, ModelError
from kvtool.methods import make_method
from kvtool.methods.base import LayerCalibration, nbytes
from kvtool.methods.transform import maps, widths
from kvtool.shapes import CacheShape, LayerKind, LayerShape, Rope
from kvtool.transform import code as chain
from kvtool.transform import fit as fitting
from kvtool.transform import reach, waterfill

STREAMS = (1.0, 1e4)  # squared norms of the residual stream of the two layers


class FakeCapture:
    """Two layers of tokens whose keys and values have a steep spectrum; the second layer's errors hardly matter."""

    def __init__(self, D=64, H=2, G=2, T=320, rope=True):
        layer = LayerShape(
            kind=LayerKind.FULL,
            num_heads=H * G,
            num_kv_heads=H,
            head_dim=D,
            scale=D**-0.5,
            rope=0 if rope else None,
        )
        ropes = (Rope(inv_freq=tuple(1e4 ** (-2 * i / D) for i in range(D // 2))),) if rope else ()
        self.shape = CacheShape(layers=(layer, layer), ropes=ropes)
        self.layers, self.T = [0, 1], T

    def samples(self, layer, *, tokens=None):
        yield self.sample(layer, seed=layer)

    def sample(self, layer, seed, start=0):
        g = torch.Generator().manual_seed(seed)
        fixed = torch.Generator().manual_seed(99)
        shape, rope = self.shape.layers[layer], self.shape.rope(layer)
        H, HQ, D, T = shape.num_kv_heads, shape.num_heads, shape.head_dim, self.T
        steep = torch.exp(-torch.arange(D) / (D / 4))[:, None]  # standard deviations, a factor e every D/4 channels
        mix = steep * torch.linalg.qr(torch.randn(H, D, D, generator=fixed))[0]
        positions = torch.arange(start, start + T)
        turn = (lambda x: rope.rotate(x, positions)) if rope else (lambda x: x)
        # turned after mixing, so that the spectrum survives the rotary embedding only in part, as in a model
        keys = turn(torch.randn(H, 1, D, generator=fixed).expand(H, T, D)) + torch.randn(H, T, D, generator=g) @ mix
        values = torch.randn(H, T, D, generator=g) @ mix
        queries = torch.randn(HQ, T, D, generator=g)
        return LayerSample(
            layer, 0, shape, rope, keys, values, positions, queries, positions, stream=torch.full((T,), STREAMS[layer])
        )


_FITTED = {}


def fitted(layer=0, D=64, rope=True, **options):
    key = (D, rope, *sorted(options.items()))
    if key not in _FITTED:
        made = FakeCapture(D, rope=rope)
        method = make_method("transform", options)
        _FITTED[key] = (made, method, method.fit(made))
    made, method, tensors = _FITTED[key]
    own = {k.split(".", 2)[2]: v for k, v in tensors.items() if k.startswith(f"layers.{layer}.")}
    return method, LayerCalibration(layer, made.shape.layers[layer], made.shape.rope(layer), own), made


def through(method, layer, made, seed=7):
    sample = made.sample(layer.index, seed, start=4)
    kv, _ = method.compress(sample.keys[None], sample.values[None], layer, positions=sample.positions)
    return sample, kv, method.decompress(kv, layer, positions=sample.positions)


def nmse(found, exact):
    return float((found - exact).square().sum() / exact.square().sum())


# the chain of stages


@pytest.mark.parametrize("width", chain.BOOKS)
def test_written_out_books_are_those_of_codebooks(width):
    book = codebooks.sphere_codebook(packing.GROUP, width)
    levels, step = chain.table(width, torch.device("cpu"))
    assert torch.equal(levels, book.levels.float())
    assert step == pytest.approx(book.step, rel=1e-9)
    assert chain.distortion(width) == pytest.approx(book.mse, rel=1e-9)


def gaussian_code(stages, D=64, H=2):
    """A code for independent Gaussian coefficients with a steep spectrum, and examples of them."""
    variance = torch.exp(-torch.arange(D) / 8.0).expand(H, D)
    order, deviation, left = chain.pick(variance, stages)
    code = chain.Code(stages, torch.eye(D).expand(H, D, D), order, deviation, torch.full((H, len(stages)), -4.0))
    x = torch.randn(H, 4096, D, generator=torch.Generator().manual_seed(0)) * variance[:, None].sqrt()
    return code, x, float((left / variance.sum(-1)).mean())


@pytest.mark.parametrize("stages", [(1,), (2, 2), (2, 1, 1), (4, 2, 2), (3, 3, 3, 3), (8, 8)])
def test_distortion_is_the_one_the_allocation_counts_on(stages):
    code, x, predicted = gaussian_code(stages)
    coded = chain.encode(x, code)
    # gains in half octaves miss the table's scale by up to 19 %: costs 31 % at 8 bits, where steps are even, 5 % below
    tolerance = 0.35 if stages[0] == 8 else 0.1
    assert nmse(chain.features(coded, code) @ chain.decoder(code), x) == pytest.approx(predicted, rel=tolerance)


def test_refining_some_coefficients_beats_one_width_for_all():
    """Reverse water-filling through pages of one width per 32 channels: equal bits, less distortion."""
    errors = {}
    for stages in ((4, 4), (4, 2, 2)):
        code, x, _ = gaussian_code(stages)
        errors[stages] = nmse(chain.features(chain.encode(x, code), code) @ chain.decoder(code), x)
    assert errors[4, 2, 2] < errors[4, 4] / 1.5


def test_gains_lie_in_the_order_of_the_score_registers():
    gains = torch.randint(0, 16, (2, 3, 128), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = packing.pack_nibbles(gains)  # [2, N, 3 * 32]
    assert torch.equal(packing.unpack_nibbles(packed, 3), gains)
    page = packing.pack_tokens(gains[0, 1])[1]
    assert torch.equal(packed[0, 1, 32:64], page[0::2] | (page[1::2] << 4))


def test_a_zero_vector_stays_finite_and_small():
    code, _, _ = gaussian_code((2, 1))
    read = chain.features(chain.encode(torch.zeros(2, 64, 64), code), code) @ chain.decoder(code)
    # the smallest gain is 2^-4 of a unit that is at most 1
    assert read.abs().max() < 0.25


# the method


@pytest.mark.parametrize("bits", [1.25, 2.25, 4.25])
def test_bits_are_those_asked_for(bits):
    stored = 0.0
    for index in (0, 1):
        method, layer, made = fitted(index, bits=bits)
        sample, kv, _ = through(method, layer, made)
        stored += 8 * nbytes(kv) / (2 * sample.keys.numel()) / 2
    assert bits - 0.3 < stored <= bits  # a step of the allocation is at most 36 bits of 2 * 2 * 64


def test_bits_go_where_errors_matter():
    cost = {i: sum(widths(fitted(i, bits=2.25)[1], "key")) for i in (0, 1)}
    assert cost[0] > cost[1]
    even = {i: fitted(i, bits=2.25, scope="layer")[1] for i in (0, 1)}
    spent = [sum(widths(layer, "key")) + sum(widths(layer, "value")) for layer in even.values()]
    assert abs(spent[0] - spent[1]) <= 1


@pytest.mark.parametrize(("D", "rope"), [(32, True), (64, False), (80, True)])
def test_any_head_dim_reads_back(D, rope):
    method, layer, made = fitted(D=D, rope=rope, bits=4)
    sample, _, read = through(method, layer, made)
    # layer 0 matters more, so it has 4 bits or more: Gaussian distortion .009 and less, .03 leaves room for D = 32
    assert nmse(read.keys[0], sample.keys) < 0.03
    assert nmse(read.values[0], sample.values) < 0.03


def test_maps_fold_into_the_query_and_the_output():
    """What kernels do: codes and gains are read as they are, q and o are mapped instead."""
    method, layer, made = fitted(bits=3)
    sample, kv, read = through(method, layer, made)
    code = sum(widths(layer, "key")) and widths(layer, "key")
    codes = packing.unpack_keys(kv.key_pages, code, 32 * len(code))
    gains = packing.unpack_nibbles(kv.key_gains, len(code))
    base = layer["key_gain_base"]
    queries = sample.queries[:2].double()  # one of each KV head would do; these are of head 0
    mean = read.keys[0, 0].double() * 0
    for s, width in enumerate(code):
        levels, _ = chain.table(width, codes.device)
        gain = torch.exp2(base[0, s] + 0.5 * gains[0, 0, s].double())
        part = levels[codes[0, 0, :, 32 * s : 32 * s + 32].int()].double()
        mean = mean + gain[:, None] * (part @ maps(layer, "key")[0, 32 * s : 32 * s + 32].double())
    centre = layer.rope.rotate(layer["key_mean"][:1, None].expand(1, len(sample.positions), -1), sample.positions)[0]
    expected = queries @ (mean + centre).mT
    torch.testing.assert_close(queries @ read.keys[0, 0].double().mT, expected, rtol=1e-4, atol=1e-3)


def test_value_decoder_does_not_shrink_averages():
    """A Lloyd-Max level is the mean of its cell: averages of many tokens shrink by the distortion, .35 at 1 bit."""
    made = FakeCapture(T=1024)
    sample = made.sample(0, 0)
    # one constant under all values, which attention that looks everywhere must return
    sample = replace(sample, values=sample.values + 0.5, queries=0.1 * sample.queries)
    statistics = fitting.statistics(lambda: [sample])
    turn, variance = fitting.basis(statistics.values, statistics.outputs)
    code = fitting.make_code(turn, variance, (1, 1), sample.values[:, 4:])
    moments = fitting.Moments(code, statistics.outputs)
    seen = fitting.attention_of(sample, 64)
    features = moments.features(sample.values, seen.weights)
    exact = seen.weights @ sample.values
    moments.add(features[:, ::2], exact[:, ::2])
    plain = nmse((features / moments.units @ chain.decoder(code))[:, 1::2], exact[:, 1::2])
    refit = nmse((features / moments.units @ moments.solve())[:, 1::2], exact[:, 1::2])
    assert refit < plain / 3


def test_error_of_attention_is_below_plain_rotation_at_equal_bits():
    method, layer, made = fitted(bits=2.25, scope="layer")
    sample, kv, read = through(method, layer, made)
    other = make_method("turboquant", dict(k_bits=2, v_bits=2))
    tensors = other.fit_layer(layer.shape, layer.rope, [made.sample(0, 0)], layer=0)
    share = LayerCalibration(0, layer.shape, layer.rope, tensors)
    kv2, _ = other.compress(sample.keys[None], sample.values[None], share, positions=sample.positions)
    assert nbytes(kv) <= nbytes(kv2)
    rotated = other.decompress(kv2, share, positions=sample.positions)
    exact = attention.attend(sample.queries[None], sample.keys[None], sample.values[None], scale=layer.shape.scale)
    errors = [
        float(
            attention.relative_error(attention.attend(sample.queries[None], *r, scale=layer.shape.scale).out, exact.out)
        )
        for r in (read, rotated)
    ]
    assert errors[0] < 0.75 * errors[1]


# the guard


def test_calibrated_text_is_inside():
    method, layer, made = fitted(bits=2.25)
    assert not through(method, layer, made)[1].outside.any()


def test_a_head_outside_its_statistics_is_coded_plainly_and_alone():
    """Head 1's values are suddenly 20 times larger from the second page on."""
    method, layer, made = fitted(bits=4, scope="layer")
    sample = made.sample(0, 7, start=4)
    values = sample.values.clone()
    values[1, 64:] = 20 * torch.randn(values[1, 64:].shape, generator=torch.Generator().manual_seed(1))
    kv, _ = method.compress(sample.keys[None], values[None], layer, positions=sample.positions)
    assert kv.outside[0, 0].tolist() == [0] * 5
    assert kv.outside[0, 1].tolist() == [0] + [2] * 4
    (share,) = method.notes(kv).values()
    assert share == pytest.approx(4 / 2 / kv.outside.numel())
    careless = replace(method, guard=1.0)
    kv_careless, _ = careless.compress(sample.keys[None], values[None], layer, positions=sample.positions)
    assert not kv_careless.outside.any()
    guarded, unguarded = (
        nmse(m.decompress(k, layer, positions=sample.positions).values[0, 1], values[1])
        for m, k in ((method, kv), (careless, kv_careless))
    )
    assert guarded < unguarded / 2


def test_not_a_number_is_refused():
    method, layer, made = fitted(bits=2.25)
    sample = made.sample(0, 7)
    keys = sample.keys.clone()
    keys[0, 3, 1] = torch.inf
    with pytest.raises(ModelError, match="layer 0: keys: expected finite numbers"):
        method.compress(keys[None], sample.values[None], layer, positions=sample.positions)


# the choice


def test_partitions_are_all_and_ordered():
    found = waterfill._partitions(5, 3)
    assert set(found) == {(4, 1), (3, 2), (3, 1, 1), (2, 2, 1)}


def test_a_budget_that_buys_nothing_is_refused():
    options = [[waterfill.Candidate("transform", (1,), 36, 1.0)]]
    with pytest.raises(ValueError, match="the cheapest options cost 36"):
        waterfill.share(options, 20)
    with pytest.raises(MethodOptionError, match="bits"):
        make_method("transform", {"bits": 0.05})


# tokens where none were captured


@pytest.mark.parametrize("far", [0, 1, 777])
def test_moments_are_averaged_over_all_places(far):
    rope = Rope(inv_freq=(1.0, 0.2, 0.2, 1e-4, 0.0), scaling=1.3)
    x = torch.randn(2, 50, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = x.mT @ x
    unscaled = Rope(inv_freq=rope.inv_freq)
    turned = (unscaled.rotate(x, torch.full((50,), n)).double() for n in range(far + 1))
    expected = sum(y.mT @ y for y in turned) / (far + 1)
    torch.testing.assert_close(reach.averaged(moment, rope, far), expected, rtol=1e-5, atol=1e-5)


def test_tokens_are_moved_and_brought_back():
    rope = Rope(inv_freq=(1.0, 0.01), scaling=1.3)
    x, positions = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40)
    away = reach.moved(x, rope, positions, 5000)
    assert nmse(away, x) > 0.5
    torch.testing.assert_close(away.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(reach.moved(away, rope, positions, 5000, back=True), x, rtol=1e-4, atol=1e-4)


class Slow(FakeCapture):
    """Keys whose spectrum is steep before the rotary embedding, which turns them by less than a circle in T tokens."""

    def sample(self, layer, seed, start=0):
        sample = super().sample(layer, seed, start)
        rope = Rope(inv_freq=tuple(x / 50 for x in sample.rope.inv_freq))
        g = torch.Generator().manual_seed(seed)
        H, T, D = sample.keys.shape
        spread = torch.exp(-torch.arange(D) / 4.0)
        keys = rope.rotate(1 + spread * torch.randn(H, T, D, generator=g), sample.positions)
        return replace(sample, rope=rope, keys=keys)


def test_a_served_context_beyond_the_capture_is_fitted():
    """What was fitted to 320 tokens is as good 3000 tokens on as a served context says, and worse without."""
    errors = {}
    for context in (None, "4k"):
        made = Slow()
        method = make_method("transform", {"bits": 2.25, "context": context})
        tensors = method.fit(made)
        own = {k.split(".", 2)[2]: v for k, v in tensors.items() if k.startswith("layers.0.")}
        for start in (0, 3000):
            sample = made.sample(0, 7, start)
            layer = LayerCalibration(0, sample.shape, sample.rope, own)
            kv, _ = method.compress(sample.keys[None], sample.values[None], layer, positions=sample.positions)
            found = method.decompress(kv, layer, positions=sample.positions).keys[0]
            centre = sample.rope.rotate(torch.ones_like(sample.keys), sample.positions)
            errors[context, start] = float((found - sample.keys).square().sum() / (sample.keys - centre).square().sum())
    assert errors[None, 3000] > 2 * errors[None, 0], errors
    assert errors["4k", 3000] < 1.2 * errors["4k", 0], errors
    assert errors["4k", 3000] < 0.7 * errors[None, 3000], errors


def test_the_context_served_is_the_models_own_or_the_one_asked_for():
    shape = FakeCapture().shape.model_copy(update={"context": 8192})
    assert make_method("transform", {}).longest(shape) == 8192
    assert make_method("transform", {"context": "32k"}).longest(shape) == 32768
    with pytest.raises(MethodOptionError, match="context: length 'long'"):
        make_method("transform", {"context": "long"})
