"""RINA's codec: what the stages leave, what feedback buys, and that both stay bounded."""

import math
from dataclasses import replace

import pytest
import torch

from kvtool import packing
from kvtool.attention import attend, relative_error
from kvtool.capture import LayerSample
from kvtool.errors import MethodOptionError, ModelError
from kvtool.methods import affine, make_method
from kvtool.methods.base import LayerCalibration, nbytes
from kvtool.methods.rina import RINA
from kvtool.rina import code
from kvtool.rina.tiles import pursue, tiles, untile
from kvtool.shapes import CacheShape, LayerShape, TensorSpec
from kvtool.transform.code import BOOKS

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


def test_a_norm_has_three_bits_of_mantissa():
    norms = torch.logspace(-4, 4, 1001)
    decoded = code.decode_norm(code.encode_norm(norms))
    # 17 lies between 16 and 18
    assert (decoded / norms - 1).abs().max() <= 1 / 17 + 1e-6
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(code.encode_norm(code.decode_norm(codes)), codes)
    assert code.decode_norm(codes)[0] == 0
    # neither too small nor too large a one wraps around
    assert code.encode_norm(torch.tensor([1e-9, 1e9])).tolist() == [0, 255]


@pytest.mark.parametrize("subspace", [16, 32, 64])
def test_stages_leave_what_theory_says(subspace):
    shaped = stages(3, subspace)
    x = gaussian(1, 8192, 128, seed=5)
    left = [(x - code.encode(x, code.Stages(*(f[..., :j] for f in shaped))).decoded).square().mean() for j in (1, 2, 3)]
    # E r^2 - E (mean |r|)^2 = 1 - 2/pi - (1 - 2/pi)/s with exact halves; 4-bit halves, a sixth apart, add
    # (1/6)^2 / 12 of 2/pi: 0.0015
    exact = 1 - 2 / math.pi - (1 - 2 / math.pi) / subspace
    assert left[0] == pytest.approx(exact + 0.0015, abs=0.003)
    assert left[0] > left[1] > left[2]


def test_what_is_read_is_what_was_written():
    shaped = stages(2)
    x = gaussian(3, 1, 64, 128, seed=3)
    coded = code.encode(x, shaped)
    torch.testing.assert_close(code.decode(coded.bits, coded.half_codes, shaped), coded.decoded)
    codes = torch.randint(0, 16, (5, 128, 3, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(code.unpack_halves(code.pack_halves(codes), 3, 2), codes)


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


def test_the_levels_of_a_stage_are_the_best_for_its_split():
    shaped = stages(1, 16)
    x = gaussian(1, 4096, 128, seed=11)

    def left(mid, half):
        coded = code.encode(x, code.Stages(shaped.mids + mid, shaped.halves * half))
        return (x - coded.decoded).square().mean().item()

    best = left(0.0, 1.0)
    assert best < min(left(0.1, 1.0), left(-0.1, 1.0))
    own = x.unflatten(-1, (-1, 16)).abs().mean(-1, keepdim=True)
    exact = (x.unflatten(-1, (-1, 16)).abs() - own).square().mean().item()
    assert exact < best < exact + 0.003
    # conditional means: both neighbours of the level are worse
    for factor in (0.9, 1.1):
        assert (x.unflatten(-1, (-1, 16)).abs() - factor * own).square().mean().item() > exact


@pytest.mark.parametrize(("beta", "growth"), [(0.5, 1.18), (0.9, 1.73), (1.0, 1.98)])
def test_feedback_costs_each_token_what_was_measured(beta, growth):
    shaped, x = stages(1, 16), gaussian(1, 1024, 128, seed=8)
    norms = torch.ones(1, 1024)
    one, other = (
        (code.feedback(x, torch.tensor([b]), norms, shaped)[0] - x).square().mean().item() for b in (0.0, beta)
    )
    # .303 without; .358, .524 and .600 with it for two levels of one's own per token (docs/methods/rina.md); here
    # the middle of the levels is fitted, which leaves .34 and grows alike
    assert other / one == pytest.approx(growth, rel=0.1)


# as published


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, [0.3620, 0.1291, 0.0575, 0.0320, 0.0219, 0.0170]),
        (0.15, [0.3620, 0.1344, 0.0575, 0.0254, 0.0149, 0.0099]),
        (0.3, {5: 0.0135, 8: 0.0027}),
    ],
)
def test_the_published_pursuit_leaves_what_it_leaves(beta, expected):
    x = gaussian(1, 1, 4000, 1, 1, 1, 256, seed=12)
    signs, alphas = pursue(x, 8, beta)
    steps = signs * alphas.float()[..., None]
    expected = expected if isinstance(expected, dict) else dict(enumerate(expected, 1))
    for n, left in expected.items():
        found = (x - steps[:, :, :, :n].sum(3, keepdim=True)).square().mean().item()
        # two digits were kept of the last one; 1e6 numbers are good to .3 %
        assert found == pytest.approx(left, rel=0.02, abs=6e-5)
    if beta == 0.15:
        # the whitepaper's factor 1/N, which the code does not have
        assert (x - steps[:, :, :, :5].sum(3, keepdim=True) / 5).square().mean().item() == pytest.approx(
            0.663, rel=0.02
        )


def published(stages=5, D=128):
    method = RINA(variant="published", k_stages=stages, v_stages=stages)
    shape = LayerShape(kind="full", num_heads=2, num_kv_heads=2, head_dim=D, scale=D**-0.5)
    return method, LayerCalibration(0, shape, None, method.fit_layer(shape, None, [], layer=0))


@pytest.mark.parametrize(("stages", "D"), [(1, 128), (5, 64), (6, 256)])
def test_its_one_bit_is_one_and_a_sixteenth_per_stage(stages, D):
    method, layer = published(stages, D)
    x = gaussian(1, 2, 128, D, seed=13)
    kv, _ = method.compress(x, x, layer, positions=torch.arange(128))
    assert 8 * nbytes(kv) / (2 * x.numel()) == 1.0625 * stages


def test_its_five_stages_lose_to_four_bit_min_max_at_a_lower_rate():
    method, layer = published(5)
    x = gaussian(1, 2, 640, 128, seed=14)
    kv, _ = method.compress(x, x, layer, positions=torch.arange(640))
    restored = method.decompress(kv, layer, positions=torch.arange(640))
    codes = affine.encode(x, 4, "token", 32)
    uniform = (affine.decode(*codes, "token", 32) - x).square().mean().item()
    for found in (restored.keys, restored.values):
        left = (found - x).square().mean().item()
        assert left == pytest.approx(0.0149, rel=0.03)
        # .0065 at 5.0 stored bits against .0149 at 5.31: the claim that it beats 4-bit uniform is false
        assert left > 2 * uniform
    assert method.attend(x, kv, layer, positions=torch.arange(640), scale=0.1).out.isfinite().all()


@pytest.mark.parametrize("D", [64, 80, 24])
def test_tiles_are_cut_and_put_together(D):
    x = gaussian(2, 3, 128, D, seed=15)
    cut = tiles(x)
    assert torch.equal(untile(cut)[:, :, 0], x)
    # the first tile is the first 16 tokens of the first channels
    w = min(D, 16) if D % 16 == 0 else 8
    assert torch.equal(cut[0, 0, 0, 0, 0, 0], x[0, 0, :16, :w].flatten())


def test_published_keys_that_are_not_finite_are_refused():
    method, layer = published()
    x = gaussian(1, 2, 64, 128)
    x[0, 0, 3, 5] = float("nan")
    with pytest.raises(ModelError, match="expected finite numbers"):
        method.compress(x, x, layer, positions=torch.arange(64))


# a target


class Steep:
    """A capture of two layers whose queries, keys and values lie mostly in a few directions."""

    def __init__(self, D=64, tokens=640, layers=(1.0, 8.0)):
        shape = LayerShape(kind="full", num_heads=4, num_kv_heads=2, head_dim=D, scale=D**-0.5)
        self.shape = CacheShape(layers=(shape,) * len(layers))
        self.layers = list(range(len(layers)))
        self.sizes, self.tokens, self.steep = layers, tokens, torch.exp(-torch.arange(D) / (D / 5))

    def samples(self, layer, *, tokens=None):
        D = len(self.steep)
        generator = torch.Generator().manual_seed(layer)
        keys, values = torch.randn(2, 2, self.tokens, D, generator=generator) * self.steep
        queries = 3 * torch.randn(4, self.tokens, D, generator=generator)
        at = torch.arange(self.tokens)
        yield LayerSample(
            layer, 0, self.shape.layers[layer], None, keys, self.sizes[layer] * values, at, queries, at,
            stream=torch.ones(self.tokens),
        )  # fmt: skip


def placed(target, D=64, **options):
    capture = Steep(D, **options)
    method = RINA(target_bits=target)
    tensors = method.fit(capture)
    assert {
        name: TensorSpec(spec.dtype, tuple(tensors[name].shape)) for name, spec in method.schema(capture.shape).items()
    } == method.schema(capture.shape)
    layers = [
        LayerCalibration(
            i,
            capture.shape.layers[i],
            None,
            {f: tensors[f"layers.{i}.{f}"] for f in method.layer_schema(capture.shape.layers[i])},
        )
        for i in capture.layers
    ]
    return method, capture, layers


def coded(method, capture, layer):
    sample = next(capture.samples(layer.index))
    positions = sample.positions[:640]
    kv, _ = method.compress(sample.keys[None, :, :640], sample.values[None, :, :640], layer, positions=positions)
    return sample, kv, {"positions": positions, "scale": layer.shape.scale}


@pytest.mark.parametrize(("target", "D"), [(1.25, 64), (2.0, 64), (1.25, 80), (2.0, 128)])
def test_true_bits_are_at_most_the_target_and_near_it(target, D):
    method, capture, layers = placed(target, D)
    stored = [8 * nbytes(coded(method, capture, layer)[1]) / (2 * 2 * 640 * D) for layer in layers]
    # one stage more or less of one side of one layer is 36 bits of 4 D
    assert target - 36 / (4 * D) - 0.1 < sum(stored) / len(stored) <= target
    # the layer whose output is eight times as large in the stream is given more
    assert stored[1] > stored[0]


def test_a_stage_has_one_bit_or_two():
    _, _, layers = placed(2.0)
    for layer in layers:
        for side in ("key", "value"):
            assert 1 <= int(layer[f"{side}_widths"].max()) <= 2


def test_two_bits_of_a_stage_are_two_stages_of_one_level():
    """The best four levels are sums of two one-bit stages, so no second level is stored for them."""
    (inner, outer), _, _ = BOOKS[2]
    half = (outer + inner) / 2, (outer - inner) / 2
    sums = sorted(a * half[0] + b * half[1] for a in (-1, 1) for b in (-1, 1))
    assert sums == [-outer, -inner, inner, outer]
    # and for eight levels that is no longer so: where stages of three bits would begin to be something else
    levels = BOOKS[3][0]
    assert levels[3] - levels[2] != levels[1] - levels[0]


def test_placed_stages_leave_less_than_as_many_bits_in_a_random_rotation():
    method, capture, layers = placed(1.25)
    layer = layers[1]
    sample, kv, asked = coded(method, capture, layer)
    queries = sample.queries[None, :, -64:]
    exact = attend(queries, sample.keys[None], sample.values[None], scale=asked["scale"]).out
    found = relative_error(method.attend(queries, kv, layer, **asked).out, exact)
    rotated = RINA()
    plain = LayerCalibration(1, layer.shape, None, rotated.fit_layer(layer.shape, None, [sample], layer=1))
    kv, _ = rotated.compress(sample.keys[None], sample.values[None], plain, positions=sample.positions)
    # both store 1.25 bits; of a steep spectrum half of the directions can be left out
    assert found < 0.7 * relative_error(rotated.attend(queries, kv, plain, **asked).out, exact)


def test_pages_unlike_the_text_fitted_to_are_noted():
    method, capture, layers = placed(1.25)
    sample, kv, _ = coded(method, capture, layers[1])
    assert method.notes(kv) == {"of pages outside what was calibrated": 0.0}
    kv, _ = method.compress(1e3 * sample.keys[None], sample.values[None], layers[1], positions=sample.positions)
    assert method.notes(kv) == {"of pages outside what was calibrated": 0.5}  # all of the keys, none of the values
    assert method.decompress(kv, layers[1], positions=sample.positions).keys.isfinite().all()


def test_a_target_that_contradicts_is_a_sentence():
    with pytest.raises(MethodOptionError, match="^--method: rina: target_bits chooses v_stages, extra; give one"):
        make_method("rina", {"target_bits": "2", "extra": "3", "v_stages": "2"})
    with pytest.raises(MethodOptionError, match="give variant published its stages"):
        make_method("rina", {"target_bits": "2", "variant": "published"})
