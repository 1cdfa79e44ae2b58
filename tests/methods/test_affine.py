"""Affine is min-max with a float minimum, KIVI's layout by default."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.bounds.measures import Evidence, measure
from kvtool.errors import MethodOptionError, ModelError
from kvtool.methods import affine, make_method
from kvtool.methods.base import LayerCalibration, nbytes
from kvtool.shapes import LayerKind, LayerShape


def through(keys, values, **options):
    method = make_method("affine", options)
    _, H, T, D = keys.shape
    shape = LayerShape(kind=LayerKind.FULL, num_heads=H, num_kv_heads=H, head_dim=D, scale=D**-0.5)
    layer, positions = LayerCalibration(0, shape, None, {}), torch.arange(T)
    kv, _ = method.compress(keys, values, layer, positions=positions)
    return kv, method.decompress(kv, layer, positions=positions)


def gaussian(D=64, T=1024, H=2, seed=0):
    return torch.randn(1, H, T, D, generator=torch.Generator().manual_seed(seed))


def nmse(found, exact):
    return float((found - exact).square().sum() / exact.square().sum())


# error of uniform noise inside the steps, N(0,1): group, bits, error; the group's own extremes are exact on top
UNIFORM = [(32, 2, 0.1652), (32, 3, 0.0300), (32, 4, 0.00652), (32, 8, 2.2e-5), (128, 2, 0.2538), (128, 4, 0.01015)]


@pytest.mark.parametrize(("group", "bits", "error"), UNIFORM)
def test_gaussian_data_has_the_error_of_its_range(group, bits, error):
    x = gaussian(D=128)
    _, found = through(x, x, k_axis="token", k_bits=bits, v_bits=bits, k_group=group % 128, v_group=group % 128)
    # two of the group's values lie on levels and have no error
    expected = error * (group - 2) / group
    # 2048 to 8192 groups whose range varies by 17 %; the table has three digits; 8 bits feel float16's rounding
    assert nmse(found.keys, x) == pytest.approx(expected, rel=0.03 if bits < 8 else 0.15)
    assert nmse(found.values, x) == pytest.approx(expected, rel=0.03 if bits < 8 else 0.15)


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("D", [64, 80, 96])
def test_every_layout_is_undone_exactly_on_its_own_grid(axis, group, D):
    """Whole numbers between a group's 0 and 15 are levels of 4 bits, wherever they lie."""
    x = torch.randint(0, 16, (2, 2, 128, D), generator=torch.Generator().manual_seed(0)).float()
    x[:, :, ::32] = 0
    x[:, :, 1::32] = 15
    x[..., ::16] = 0
    x[..., 1::16] = 15
    _, found = through(x, x, k_axis=axis, v_axis=axis, k_group=group, v_group=group)
    assert torch.equal(found.keys, x)
    assert torch.equal(found.values, x)


def test_a_loud_channel_spoils_only_quantisers_that_share_its_range():
    """Why KIVI quantises keys per channel."""
    x = gaussian()
    loud = x.clone()
    loud[..., 7] *= 20
    rest = torch.arange(64) != 7
    quiet, per_channel = (through(k, k, k_bits=2)[1].keys[..., rest] for k in (x, loud))
    assert torch.equal(quiet, per_channel)
    per_token = through(loud, loud, k_bits=2, k_axis="token")[1].keys[..., rest]
    assert nmse(per_token, x[..., rest]) > 3 * nmse(per_channel, x[..., rest])


def test_the_minimum_is_a_float():
    """An integer zero point would clamp: all values here are far from zero."""
    x = 1000 + gaussian()
    _, found = through(x, x, k_bits=4, v_bits=4)
    # float16 near 1000 has steps of 0.5, which the minimum must live with
    assert float((found.keys - x).abs().max()) < 1.0


@given(st.floats(-1e4, 1e4), st.integers(2, 8))
@settings(max_examples=30, deadline=None)
def test_constant_groups_come_back_as_the_constant(value, bits):
    x = torch.full((1, 1, 64, 32), value)
    _, found = through(x, x, k_bits=bits, v_bits=bits)
    torch.testing.assert_close(found.keys, x.half().float())


@given(st.integers(0, 10_000), st.integers(2, 8), st.sampled_from(["channel", "token"]), st.sampled_from([0, 32, 64]))
@settings(max_examples=30, deadline=None)
def test_no_value_moves_by_more_than_half_a_step(seed, bits, axis, group):
    x = gaussian(D=80, T=64, H=1, seed=seed) * 10 ** (seed % 5 - 2)
    _, found = through(x, x, k_bits=bits, k_axis=axis, k_group=group)
    _, scales, minima = affine.encode(x, bits, axis, group)
    # half the largest step, and what float16 does to the minimum and, times 2^bits, to the step
    rounding = float(minima.abs().max()) * 2**-11 + float(scales.max()) * 2 ** (bits - 11) + 2**-24 * 2**bits
    assert float((found.keys - x).abs().max()) <= float(scales.max()) / 2 + rounding


@pytest.mark.parametrize(
    ("options", "D", "bits"),
    [
        (dict(k_bits=2, v_bits=2), 64, 3.0),  # KIVI-2: 2 + 32/32
        (dict(k_bits=4, v_bits=4), 128, 5.0),
        (dict(k_bits=2, v_bits=2, k_group=64, v_group=64), 64, 2.5),
        (dict(k_bits=8, v_bits=8, k_axis="token", k_group=0, v_group=0), 128, 8.25),
        (dict(k_bits=6, v_bits=6), 64, 9.0),  # stored in 8
    ],
)
def test_bits_are_the_formula(options, D, bits):
    x = gaussian(D=D, T=128)
    kv, _ = through(x, x, **options)
    assert 8 * nbytes(kv) / (2 * x.numel()) == bits


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_an_overflowing_cache_is_refused_in_one_sentence(bad):
    x = gaussian(T=64)
    x[0, 0, 3, 3] = bad
    with pytest.raises(ModelError, match="layer 0: key_"):
        through(x, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(k_group=48), "expected 32 or 64, or 0"),
        (dict(v_bits=9), "less than or equal to 8"),
        (dict(k_axis="row"), "k_axis"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(MethodOptionError, match=message):
        make_method("affine", options)


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_no_number_moves_by_more_than_half_a_step(axis, bits):
    """Numbers far from zero, of any size, and a last group that is short."""
    method = make_method("affine", {"k_axis": axis, "v_axis": axis, "k_bits": bits, "v_bits": bits, "v_group": 0})
    x = gaussian(D=80) * torch.logspace(-4, 2, 80) + 30 * gaussian(D=80, T=1, seed=1)
    moved = half_steps(method, x)
    assert all(cases.max() <= 1 for cases in moved.values())
    # a bound that is never near says little
    assert all(cases.max() > 0.7 for cases in moved.values())


def test_truncating_instead_of_rounding_breaks_the_half_step_bound(monkeypatch):
    # a code rounded down is half a step too low on average
    monkeypatch.setattr(torch.Tensor, "round", torch.Tensor.floor)
    moved = half_steps(make_method("affine"), gaussian())
    assert all(cases.max() > 1 for cases in moved.values())


def half_steps(method, x):
    _, H, T, D = x.shape
    shape = LayerShape(kind=LayerKind.FULL, num_heads=H, num_kv_heads=H, head_dim=D, scale=D**-0.5)
    layer, positions = LayerCalibration(0, shape, None, {}), torch.arange(T)
    kv, _ = method.compress(x, x, layer, positions=positions)
    decoded = method.decompress(kv, layer, positions=positions)
    evidence = Evidence(method, layer, x[0], x[0], None, positions, kv, decoded)
    return {claim.quantity: measure(claim.quantity, evidence) for claim in method.claims(None, {})}
