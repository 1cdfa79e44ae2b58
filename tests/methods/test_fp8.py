"""fp8 has e4m3's relative error, whatever the size of the values."""

import pytest
import torch

from kvtool.capture.sample import LayerSample
from kvtool.errors import ModelError
from kvtool.methods import make_method
from kvtool.methods.base import LayerCalibration, nbytes
from kvtool.shapes import LayerKind, LayerShape

SHAPE = LayerShape(kind=LayerKind.FULL, num_heads=2, num_kv_heads=2, head_dim=64, scale=0.125)


def through(x, fitted_to=None):
    method = make_method("fp8", dict(scale="page" if fitted_to is None else "head"))
    samples = (
        [] if fitted_to is None else [LayerSample(0, 0, SHAPE, None, fitted_to[0], fitted_to[0], torch.arange(64))]
    )
    tensors = method.fit_layer(SHAPE, None, samples, layer=0)
    assert [spec.mismatch(tensors[name]) for name, spec in method.layer_schema(SHAPE).items()] == [None] * len(tensors)
    layer = LayerCalibration(0, SHAPE, None, tensors)
    positions = torch.arange(x.shape[2])
    kv, _ = method.compress(x, x, layer, positions=positions)
    return kv, method.decompress(kv, layer, positions=positions)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_relative_error_is_that_of_three_mantissa_bits(size):
    x = torch.randn(1, 2, 128, 64, generator=torch.Generator().manual_seed(0)) * size
    _, found = through(x)
    # normal numbers round by at most 2^-4; smaller ones by half the smallest subnormal, 2^-10 of the scale
    scale = x.abs().amax((2, 3), keepdim=True) / 448
    assert ((found.keys - x).abs() <= x.abs() / 16 + scale * 2**-10).all()
    error = float((found.values - x).square().sum() / x.square().sum())
    # uniform in a step of 1/8 to 1/16 of the value: 2^-6 / 12 times E[2^-2f] over the octave, between 1/4 and 1
    assert 2**-8 / 12 < error < 2**-6 / 12


def test_a_fitted_scale_saturates_instead_of_making_nan():
    x = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    _, found = through(100 * x, fitted_to=x)
    assert found.keys.isfinite().all()
    torch.testing.assert_close(found.keys.abs().amax((0, 2, 3)), x.abs().amax((0, 2, 3)))


def test_bytes_are_eight_bits_and_the_scales():
    x = torch.randn(1, 2, 128, 64)
    assert nbytes(through(x)[0]) == 2 * x.numel() + 2 * 2 * 2 * 4
    assert nbytes(through(x, fitted_to=x)[0]) == 2 * x.numel()


def test_zeros_stay_zeros():
    x = torch.zeros(1, 2, 64, 64)
    assert torch.equal(through(x)[1].keys, x)


def test_an_overflowing_cache_is_refused_in_one_sentence():
    with pytest.raises(ModelError, match="layer 0: keys: expected finite numbers"):
        through(torch.full((1, 2, 64, 64), float("inf")))
