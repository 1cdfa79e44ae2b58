"""The contract of kvtool/methods/base.py, held against every registered method."""

from dataclasses import fields, replace

import pytest
import torch

from kvtool import attention
from kvtool.calibration import Calibration
from kvtool.capture.sample import LayerSample
from kvtool.errors import MethodOptionError, ModelError
from kvtool.methods import METHODS, make_method
from kvtool.methods.base import nbytes
from kvtool.shapes import CacheShape, LayerKind, LayerShape, Rope

PAGED = [name for name, method in METHODS.items() if method.block is not None and not method.moves]


class FakeCapture:
    """Two layers of random tokens with a mean and uneven channels; all that ``fit`` may look at."""

    def __init__(self, D=64, H=2, G=3, T=384):
        layer = LayerShape(kind=LayerKind.FULL, num_heads=H * G, num_kv_heads=H, head_dim=D, scale=D**-0.5, rope=0)
        self.rope = Rope(inv_freq=tuple(1e4 ** (-i / (D // 2)) for i in range(D // 2)))
        self.shape = CacheShape(layers=(layer, layer), ropes=(self.rope,))
        self.layers = [0, 1]
        self._samples = {i: [self.sample(i, T, seed=10 * i)] for i in self.layers}

    def samples(self, layer, *, tokens=None):
        return iter(self._samples[layer])

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


_CAPTURES, _FITTED = {}, {}


def capture(D=64):
    return _CAPTURES.setdefault(D, FakeCapture(D))


def calibration(name, D=64, **options):
    key = (name, D, *sorted(options.items()))
    if key not in _FITTED:
        method = make_method(name, options)
        _FITTED[key] = Calibration(method, capture(D).shape, method.fit(capture(D)))
    return _FITTED[key]


def tokens(D=64, T=640, B=2, start=4, layer=1):
    """Unseen keys, values and queries [B, H, T, D], and their positions."""
    rows = [capture(D).sample(layer, T, seed=100 + b, start=start) for b in range(B)]
    keys, values, queries = (torch.stack([getattr(row, x) for row in rows]) for x in ("keys", "values", "queries"))
    return keys, values, queries[:, :, -32:], rows[0].positions


def compress(made, keys, values, queries, positions, layer=1, carry=None):
    share, method = made.layer(layer), made.method
    carry = method.begin(queries, keys[:, :, :0], values[:, :, :0], share, sinks=0, carry=carry)
    kv, carry = method.compress(keys, values, share, positions=positions, queries=queries, carry=carry)
    return kv, method.decompress(kv, share, positions=positions), carry


def bit_ladder(name):
    """Options of growing rate, for methods that let one choose it."""
    known = {field.name for field in fields(METHODS[name])}
    if {"k_bits", "v_bits"} <= known:
        return [dict(k_bits=b, v_bits=b) for b in (2, 3, 4, 8)]
    if "bits" in known:
        return [dict(bits=b) for b in (4, 16)]
    return []


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("D", [64, 80, 128])
def test_fit_makes_exactly_the_schema(name, D):
    made = calibration(name, D)
    schema = made.method.schema(made.shape)
    assert made.tensors.keys() == schema.keys()
    assert [schema[key].mismatch(tensor) for key, tensor in made.tensors.items()] == [None] * len(schema)


@pytest.mark.parametrize("name", METHODS)
def test_fit_is_repeatable(name):
    made = calibration(name)
    again = made.method.fit(capture())
    assert all(torch.equal(tensor, again[key]) for key, tensor in made.tensors.items())


@pytest.mark.parametrize("name", METHODS)
def test_artifact_round_trips_bit_for_bit(name, tmp_path):
    made = calibration(name)
    read = Calibration.load(made.save(tmp_path / "a.safetensors"))
    assert (read.method, read.shape, read.policy) == (made.method, made.shape, made.policy)
    assert read.tensors.keys() == made.tensors.keys()
    assert all(torch.equal(tensor, read.tensors[key]) for key, tensor in made.tensors.items())
    assert read.save(tmp_path / "b.safetensors").stat().st_size == (tmp_path / "a.safetensors").stat().st_size


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("D", "T"), [(64, 128), (64, 640), (80, 128), (128, 640)])
def test_what_comes_back_has_the_shape_of_what_went_in(name, D, T):
    keys, values, queries, positions = tokens(D, T)
    made = calibration(name, D)
    kv, decoded, _ = compress(made, keys, values, queries, positions)
    assert decoded.keys.shape == decoded.values.shape
    assert (*decoded.keys.shape[:2], decoded.keys.shape[3]) == (2, 2, D)
    # only a method that takes the prefill at once may leave tokens out
    assert decoded.keys.shape[2] == T or (made.method.block is None and 0 < decoded.keys.shape[2] < T)
    assert decoded.keys.dtype.is_floating_point
    assert not decoded.keys.isnan().any()
    assert not decoded.values.isnan().any()
    if decoded.bias is not None:
        assert decoded.bias.shape == decoded.keys.shape[:3]
        # an evicted token is hidden, never all of them
        assert (decoded.bias > -torch.inf).any(-1).all()
    assert 0 < nbytes(kv) <= 4 * 2 * keys.numel()


@pytest.mark.parametrize("name", METHODS)
def test_attend_is_attention_over_what_comes_back_for_every_head_of_a_group(name):
    keys, values, queries, positions = tokens()
    made = calibration(name)
    kv, decoded, _ = compress(made, keys, values, queries, positions)
    scale = keys.shape[-1] ** -0.5
    found = made.method.attend(queries, kv, made.layer(1), positions=positions, scale=scale)
    assert found.out.shape == queries.shape
    assert found.lse.shape == queries.shape[:3]
    assert found.out.isfinite().all()
    if type(made.method).attend is type(made.method).__mro__[1].attend:  # not an estimator
        expected = attention.attend(queries, *decoded, scale=scale)
        torch.testing.assert_close(found.out, expected.out)


@pytest.mark.parametrize("name", [name for name in METHODS if bit_ladder(name)])
def test_error_shrinks_with_bits_and_attention_becomes_exact(name):
    keys, values, queries, positions = tokens()
    exact = attention.attend(queries, keys, values, scale=0.125)
    errors, sizes = [], []
    for options in bit_ladder(name):
        made = calibration(name, **options)
        kv, _, _ = compress(made, keys, values, queries, positions)
        found = made.method.attend(queries, kv, made.layer(1), positions=positions, scale=0.125)
        errors.append(float(attention.relative_error(found.out, exact.out)))
        sizes.append(nbytes(kv))
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)
    # 8 bits: 1e-4 in power, so 1 %; rdkv's 16 bits include the levels of its tokens, so that a few are coarser
    assert errors[-1] < 0.03


@pytest.mark.parametrize("name", PAGED)
@pytest.mark.parametrize("D", [64, 80])
def test_two_calls_are_one(name, D):
    keys, values, queries, positions = tokens(D, 640)
    made = calibration(name, D)
    whole, _, _ = compress(made, keys, values, queries, positions)
    first, _, carry = compress(made, keys[:, :, :256], values[:, :, :256], queries, positions[:256])
    second, _, _ = compress(made, keys[:, :, 256:], values[:, :, 256:], queries, positions[256:], carry=carry)
    for field, a, b, c in zip(whole._fields, whole, first, second, strict=True):
        joined = torch.cat([x.view(torch.uint8) if x.element_size() == 1 else x for x in (b, c)], 2)
        a = a.view(torch.uint8) if a.element_size() == 1 else a
        # products of other shapes may round differently: a code in ten thousand sits on a boundary
        assert (joined != a).float().mean() < 1e-4 if a.numel() else a.shape == joined.shape, field


@pytest.mark.parametrize("name", PAGED)
def test_bytes_grow_with_tokens_alone(name):
    made = calibration(name)
    sizes = []
    for T in (128, 640):
        keys, values, queries, positions = tokens(T=T)
        sizes.append(nbytes(compress(made, keys, values, queries, positions)[0]) / T)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", METHODS)
def test_heads_and_sequences_do_not_disturb_each_other(name):
    keys, values, queries, positions = tokens(T=256)
    made = calibration(name)
    both = compress(made, keys, values, queries, positions)[1]
    alone = compress(made, keys[1:], values[1:], queries[1:], positions)[1]
    torch.testing.assert_close(both.keys[1:], alone.keys, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(both.values[1:], alone.values, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("side", "bad"), [(0, float("nan")), (1, float("inf"))])
def test_what_is_not_finite_is_refused_in_one_sentence(name, side, bad):
    *both, queries, positions = tokens(T=256)
    both[side] = both[side].clone()
    both[side][1, 0, 70, 3] = bad
    with pytest.raises(ModelError, match="expected .*found NaN or.* load the model in bfloat16 or float32") as refusal:
        compress(calibration(name), *both, queries, positions)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", METHODS)
def test_data_free_learns_nothing(name):
    """Fitted to other data, the data-free method is the same artifact."""
    free = METHODS[name]().data_free()
    if free is None:
        return
    assert free.data_free() is None
    one, other = capture(), FakeCapture(T=256)
    a, b = free.fit(one), free.fit(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", METHODS)
def test_claims_hold_on_unseen_tokens(name):
    from kvtool.bounds.measures import Evidence, measure

    made = calibration(name)
    keys, values, queries, positions = tokens(B=1)
    kv, decoded, _ = compress(made, keys, values, queries, positions)
    for claim in made.method.claims(made.shape, made.tensors):
        if claim.layer not in (None, 1):
            continue
        evidence = Evidence(made.method, made.layer(1), keys[0], values[0], queries[0], positions, kv, decoded)
        cases = measure(claim.quantity, evidence).double()
        worst = cases.max() if claim.kind == "always" else cases.mean()
        assert float(worst) <= claim.limit, claim


@pytest.mark.parametrize("name", METHODS)
def test_every_option_can_be_given_as_text_and_says_what_it_is(name):
    default = METHODS[name]()
    for field in fields(METHODS[name]):
        value = getattr(default, field.name)
        if value is not None:
            assert make_method(name, {field.name: str(value)}) == replace(default, **{field.name: value})
        assert field.default.description, field.name  # type: ignore[union-attr]


@pytest.mark.parametrize("name", METHODS)
def test_names_and_sources_are_stated(name):
    method = METHODS[name]
    assert method.name == name
    assert method.summary
    assert method.paper.startswith("https://") or name == "exact"
    with pytest.raises(MethodOptionError, match=f"{name} has no option 'nonsense'"):
        make_method(name, {"nonsense": "1"})
