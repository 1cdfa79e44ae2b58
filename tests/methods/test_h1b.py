"""H1B: the arcsine law, bits counted like bits, and a temperature that helps."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvtool.attention import attend, relative_error
from kvtool.bounds.measures import Evidence, measure
from kvtool.capture import LayerSample
from kvtool.methods.base import LayerCalibration, nbytes
from kvtool.methods.h1b import H1B
from kvtool.shapes import LayerShape


def layer_of(method, D=128, heads=1):
    shape = LayerShape(kind="full", num_heads=heads, num_kv_heads=heads, head_dim=D, scale=D**-0.5)
    generator = torch.Generator().manual_seed(3)
    keys, values, queries = (torch.randn(heads, 260, D, generator=generator) for _ in range(3))
    sample = LayerSample(0, 0, shape, None, keys, values, torch.arange(260), 3 * queries, torch.arange(260))
    return LayerCalibration(0, shape, None, method.fit_layer(shape, None, [sample], layer=0)), sample


def pairs(cosine, count, D):
    generator = torch.Generator().manual_seed(7)
    q = torch.nn.functional.normalize(torch.randn(count, D, generator=generator), dim=-1)
    other = torch.randn(count, D, generator=generator)
    other = torch.nn.functional.normalize(other - (other * q).sum(-1, keepdim=True) * q, dim=-1)
    return q, cosine * q + math.sqrt(1 - cosine**2) * other


@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("sketch_bits", [1, 4])
def test_agreement_follows_the_arcsine_law(cosine, sketch_bits):
    method = H1B(sketch_bits=sketch_bits, mean="none")
    layer, _ = layer_of(method)
    q, k = pairs(cosine, 20_000, 128)
    a = (
        1 - 2 * (method.sketch(q[None, None], layer) != method.sketch(k[None, None], layer)).float().mean(-1)
    ).flatten()
    # mean 1 - 2 theta/pi; the draw of 20,000 pairs shares one projection, whose rows are orthogonal
    expected = 1 - 2 * math.acos(cosine) / math.pi
    assert a.mean().item() == pytest.approx(expected, abs=4 * a.std().item() / math.sqrt(20_000) + 0.004)
    independent = math.sqrt((1 - expected**2) / (128 * sketch_bits))
    # orthogonal rows agree less by chance than independent ones
    assert 0.7 * independent < a.std().item() < 1.02 * independent


def test_counting_bits_equals_the_float_product():
    method = H1B(sketch_bits=2)
    generator = torch.Generator().manual_seed(1)
    bits_q, bits_k = (
        torch.randint(0, 2, (1, 2, *n, 96), generator=generator, dtype=torch.uint8) for n in ((3, 5), (64,))
    )
    a = method.agreement(bits_q, bits_k)
    packed_q, packed_k = (np.packbits(x.numpy(), axis=-1) for x in (bits_q, bits_k))
    ham = np.bitwise_count(packed_q[:, :, :, :, None] ^ packed_k[:, :, None, None]).sum(-1)
    assert torch.equal(a, torch.from_numpy(96 - 2 * ham.astype(np.float32)) / 96)


def test_values_have_the_error_of_four_bit_min_max():
    method = H1B()
    layer, _ = layer_of(method)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(1, 1, 6400, 128, generator=generator)
    kv, _ = method.compress(x, x, layer, positions=torch.arange(6400))
    values = method.decompress(kv, layer, positions=torch.arange(6400)).values
    # 0.01015 for 128 Gaussian values in one range, methods page of affine
    assert ((values - x).square().sum() / x.square().sum()).item() == pytest.approx(0.01015, rel=0.03)


@pytest.mark.parametrize(("sketch_bits", "expected"), [(1, (1 + 16 / 128 + 4 + 32 / 128) / 2), (8, (8.125 + 4.25) / 2)])
def test_bits_are_those_of_sketch_norm_and_values(sketch_bits, expected):
    method = H1B(sketch_bits=sketch_bits)
    layer, _ = layer_of(method)
    x = torch.ones(1, 1, 128, 128)
    kv, _ = method.compress(x, x, layer, positions=torch.arange(128))
    assert 8 * nbytes(kv) / (2 * 128 * 128) == expected


def test_more_sketch_bits_come_nearer_and_the_published_score_does_not():
    errors = {}
    for name, method in {
        "published": H1B(score="published"), "1": H1B(), "8": H1B(sketch_bits=8),
    }.items():  # fmt: skip
        layer, sample = layer_of(method, heads=2)
        keys, values, queries = sample.keys[None, :, 4:], sample.values[None, :, 4:], sample.queries[None]
        kv, _ = method.compress(keys, values, layer, positions=sample.positions[4:])
        out = method.attend(queries, kv, layer, positions=sample.positions[4:], scale=128**-0.5).out
        errors[name] = relative_error(out, attend(queries, keys, values, scale=128**-0.5).out).item()
    assert errors["8"] < errors["1"] < errors["published"]


def test_the_arcsine_claim_holds_and_equal_rows_break_it():
    method = H1B(mean="none")
    layer, sample = layer_of(method)
    (claim,) = method.claims(None, {})

    def measured(layer):
        keys, values = sample.keys[None, :, :256], sample.values[None, :, :256]
        kv, _ = method.compress(keys, values, layer, positions=torch.arange(256))
        decoded = method.decompress(kv, layer, positions=torch.arange(256))
        evidence = Evidence(method, layer, keys[0], values[0], sample.queries, torch.arange(256), kv, decoded)
        return float(measure(claim.quantity, evidence).mean())

    assert 0.4 < measured(layer) < claim.limit
    # four rows of every five are copies: a fifth as many tosses, five times the variance
    copied = layer["projection"][:, torch.arange(128) // 5 * 5]
    assert measured(replace(layer, tensors={**layer.tensors, "projection": copied})) > 2 * claim.limit
