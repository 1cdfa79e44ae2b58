"""RINA's codec: what the stages leave, what feedback buys, and that both stay bounded."""

import math
from dataclasses import replace

import pytest
import torch

from kvtool import packing
from kvtool.attention import attend, relative_error
from kvtool.capture import LayerSample
from kvtool.methods import rina_code as code
from kvtool.methods.base import LayerCalibration, nbytes
from kvtool.methods.rina import RINA
from kvtool.shapes import LayerShape

SHAPE = LayerShape(kind="full", num_heads=6, num_kv_heads=2, head_dim=64, scale=1 / 8)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stages(count, subspace=32, dim=128):
    return code.fit_stages(gaussian(1, 4096, dim), subspace, count)


def calibrated(method, keys=None):
    keys = gaussian(2, 1028, 64) if keys is None else keys
    sample = LayerSample(
        0, 0, SHAPE, None, keys, gaussian(2, 1028, 64, seed=1), torch.arange(1028),
        gaussian(6, 1028, 64, seed=2), torch.arange(1028),
    )  # fmt: skip
    return LayerCalibration(0, SHAPE, None, method.fit_layer(SHAPE, None, [sample], layer=0)), sample


def test_a_norm_is_coded_to_a_sixteenth_of_an_octave():
    norms = torch.logspace(-4, 4, 1001)
    decoded = code.decode_norm(code.encode_norm(norms))
    # half a step of 1/8 octave
    assert (decoded / norms).log2().abs().max() <= 1 / 16 + 1e-6
    assert code.decode_norm(code.encode_norm(torch.zeros(3))).eq(0).all()


@pytest.mark.parametrize("subspace", [16, 32, 64])
def test_stages_leave_what_theory_says(subspace):
    shaped = stages(3, subspace)
    x = gaussian(1, 8192, 128, seed=5)
    left = [(x - code.encode(x, code.Stages(*(f[..., :j] for f in shaped))).decoded).square().mean() for j in (1, 2, 3)]
    # E r^2 - E (mean |r|)^2 = 1 - 2/pi - (1 - 2/pi)/s with exact halves; 4-bit halves, 1/8 octave apart, add
    # (ln 2 / 4)^2 / 12 of 2/pi: 0.0016
    exact = 1 - 2 / math.pi - (1 - 2 / math.pi) / subspace
    assert left[0] == pytest.approx(exact + 0.0016, abs=0.003)
    assert left[0] > left[1] > left[2]


def test_what_is_read_is_what_was_written():
    shaped = stages(2)
    x = gaussian(3, 1, 64, 128, seed=3)
    coded = code.encode(x, shaped)
    torch.testing.assert_close(code.decode(coded.bits, coded.half_codes, shaped), coded.decoded)
    codes = torch.randint(0, 16, (5, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(code.unpack_nibbles(code.pack_nibbles(codes)), codes)


def test_without_feedback_tokens_are_coded_alone():
    shaped, x = stages(1), gaussian(1, 64, 128, seed=4)
    norms = torch.ones(1, 64)
    decoded, coded = code.feedback(x, torch.zeros(1), norms, shaped)
    alone = code.encode(x, shaped)
    assert torch.equal(coded.bits, alone.bits)
    assert torch.equal(decoded, alone.decoded)


def test_feedback_makes_the_error_of_a_mean_fall_faster():
    shaped, x = stages(1, 16), gaussian(1, 2048, 128, seed=6)

    def mean_error(beta, n):
        decoded, _ = code.feedback(x, torch.tensor([beta]), torch.ones(1, 2048), shaped)
        return (decoded - x).unflatten(1, (-1, n)).mean(2).square().mean().item()

    def slope(beta):
        return math.log(mean_error(beta, 256) / mean_error(beta, 16)) / math.log(16) / 2

    # independent errors average out like 1/sqrt(n), errors that are fed back like 1/n
    assert slope(0.0) == pytest.approx(-0.5, abs=0.1)
    assert slope(1.0) == pytest.approx(-1.0, abs=0.15)


def test_the_error_state_is_bounded_whatever_comes():
    shaped = stages(1, 32, 64)
    x = torch.cat([gaussian(1, 500, 64, seed=7), 50 * torch.ones(1, 1500, 64)], 1)
    decoded, _ = code.feedback(x, torch.ones(1), torch.ones(1, 2000), shaped)
    assert decoded.isfinite().all()
    assert (decoded.abs() <= 3 * (1 + shaped.halves.max() * 4)).all()


def test_one_stage_costs_an_eighth_of_a_bit_for_norms_and_one_for_levels():
    layer, sample = calibrated(RINA())
    chosen = slice(4, 4 + 1024)
    kv, _ = RINA().compress(
        sample.keys[None, :, chosen], sample.values[None, :, chosen], layer, positions=sample.positions[chosen]
    )
    assert 8 * nbytes(kv) / (2 * 2 * 1024 * 64) == 1 + 8 / 64 + 2 * 4 / 64


@pytest.mark.parametrize("extra", [0, 5, 32])
def test_more_stages_and_extra_tokens_reduce_the_error(extra):
    few, many = RINA(extra=extra), RINA(extra=extra, k_stages=3, v_stages=3)
    errors = []
    for method in (few, many):
        layer, sample = calibrated(method)
        keys, values = sample.keys[None, :, 4:], sample.values[None, :, 4:]
        queries = 2 * sample.queries[None, :, -16:]
        positions = sample.positions[4:]
        kv, _ = method.compress(keys, values, layer, positions=positions)
        out = method.attend(queries, kv, layer, positions=positions, scale=1 / 8).out
        errors.append(relative_error(out, attend(queries, keys, values, scale=1 / 8).out).item())
    # one stage leaves .35 of the energy, three .05; with 32 extra, half of the keys start from two
    assert errors[1] < 0.6 * errors[0]


def test_extra_stages_go_to_the_noisiest_keys():
    keys = gaussian(2, 1028, 64)
    keys[:, 100::64] *= 8
    method = RINA(extra=1, mean="none")
    layer, sample = calibrated(method, keys)
    kv, _ = method.compress(sample.keys[None, :, 4:], sample.values[None, :, 4:], layer, positions=sample.positions[4:])
    # token 100 + 64 i stands at 32 of page 1 + i
    assert (kv.extra_index[:, :, 1:] == 32).all()
    plain = replace(method, extra=0)
    layer_plain, _ = calibrated(plain, keys)
    error = []
    for m, at in ((method, layer), (plain, layer_plain)):
        positions = sample.positions[4:]
        kv, _ = m.compress(sample.keys[None, :, 4:], sample.values[None, :, 4:], at, positions=positions)
        error.append((m.decompress(kv, at, positions=positions).keys[0, :, 96::64] - sample.keys[:, 100::64]).norm())
    assert error[0] < 0.75 * error[1]


def test_pages_are_one_bit_pages():
    method = RINA(k_stages=2)
    layer, sample = calibrated(method)
    kv, _ = method.compress(
        sample.keys[None, :, 4:68], sample.values[None, :, 4:68], layer, positions=sample.positions[4:68]
    )
    assert kv.key_pages.shape == (1, 2, 1, 2 * packing.page_bytes([1, 1]))
