"""RaBitQ's promises: unbiased, with the error law of the paper, exact in integers, for any head_dim."""

import math
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from kvtool import attention, packing
from kvtool.bounds import theory
from kvtool.errors import MethodOptionError, ModelError
from kvtool.methods import make_method, rabitq_query
from kvtool.methods import rabitq_code as code
from kvtool.methods.base import LayerCalibration, nbytes
from kvtool.methods.rabitq import RaBitQ
from kvtool.shapes import LayerKind, LayerShape, Rope


@lru_cache(maxsize=8)
def over_rotations(cosine: float, dim: int, count: int, seed: int, *, bits: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """For fresh Haar rotations: the estimate of ``cosine``, the naive <obar, q>, and <obar, o>; each [count].

    Rotating a fixed pair uniformly is the same as drawing a uniform pair at that cosine.
    """
    g = torch.Generator().manual_seed(seed)
    o = torch.randn(count, dim, generator=g)
    o /= o.norm(dim=-1, keepdim=True)
    e = torch.randn(count, dim, generator=g)
    e -= (e * o).sum(-1, keepdim=True) * o
    q = cosine * o + math.sqrt(1 - cosine**2) * e / e.norm(dim=-1, keepdim=True)
    codes = code.encode(o, bits)
    u = code.grid(codes, bits)
    naive = (u / u.norm(dim=-1, keepdim=True) * q).sum(-1)
    return code.rescale(o, codes, bits, "unbiased") * (u * q).sum(-1), naive, code.cosine(o, codes, bits)


N = 100_000  # standard error of a mean of cosines about .0002


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_the_mean_cosine_of_a_one_bit_code_is_the_papers(dim: int) -> None:
    _, _, cosines = over_rotations(0.0, dim, N // 2, seed=dim)
    error = float(cosines.std()) / (N // 2) ** 0.5
    assert abs(float(cosines.mean()) - theory.expected_cosine(dim)) < 4 * error


def test_expected_cosines_are_the_published_constants() -> None:
    found = [round(theory.expected_cosine(dim), 5) for dim in (32, 64, 96, 128, 256, 960)]
    assert found == [0.80414, 0.80101, 0.79997, 0.79944, 0.79866, 0.79809]


def test_the_spread_of_the_cosine_is_as_measured_elsewhere() -> None:
    _, _, cosines = over_rotations(0.0, 128, N, seed=1)
    assert float(cosines.std()) == pytest.approx(0.0186, rel=0.02)  # standard error of a deviation: 1/sqrt(2N) = .2 %


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("cosine", "deviation"), [(0.0, 0.0667), (0.5, 0.0578), (0.9, 0.0291)])
def test_the_estimate_is_unbiased_with_the_exact_variance(cosine: float, deviation: float, seed: int) -> None:
    found, _, _ = over_rotations(cosine, 128, N, seed=seed)
    assert abs(float(found.mean()) - cosine) < 3.5 * deviation / N**0.5
    assert float(found.std()) == pytest.approx(deviation, rel=0.01)


@pytest.mark.parametrize(("cosine", "bias"), [(0.5, -0.1005), (0.9, -0.1805)])
def test_the_naive_product_fails_the_same_test(cosine: float, bias: float) -> None:
    _, naive, _ = over_rotations(cosine, 128, N, seed=3)
    error = float(naive.std()) / N**0.5
    assert abs(float(naive.mean()) - cosine) > 100 * error
    assert float(naive.mean()) - cosine == pytest.approx(bias, abs=0.001)


@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("epsilon", [1.0, 1.5, 1.9, 2.5, 3.0])
def test_the_bound_covers_as_often_as_the_law_says(cosine: float, epsilon: float) -> None:
    found, _, cosines = over_rotations(cosine, 128, N, seed=7)
    bound = epsilon * (1 / cosines.square() - 1).sqrt() / 127**0.5
    covered = float(((found - cosine).abs() <= bound).float().mean())
    expected = 1 - float(theory.violation(epsilon, cosine, 128))
    error = math.sqrt(max(expected * (1 - expected), 1e-5) / N)
    assert abs(covered - expected) < 4 * error


def test_the_coverage_at_1_9_is_a_two_sided_94_percent() -> None:
    assert 1 - theory.worst_violation(1.9, 128) == pytest.approx(0.9429, abs=5e-5)
    assert theory.epsilon_for(theory.worst_violation(1.9, 64), 64) == pytest.approx(1.9)


@pytest.mark.parametrize(
    ("dim", "bits", "cosine", "mse", "variance"),
    [
        (64, 1, 0.8006, 0.3583, 0.565),
        (64, 2, 0.9414, 0.1136, 0.129),
        (64, 3, 0.9834, 0.0329, 0.0341),
        (64, 4, 0.9956, 0.0088, 0.0089),
        (64, 5, 0.99893, 0.00214, 0.00215),
        (64, 6, 0.99974, 0.00052, 0.00052),
        (64, 8, 0.99999, 3e-5, 3e-5),
        (128, 1, 0.7999, 0.3598, 0.565),
        (128, 2, 0.9406, 0.1153, 0.131),
        (128, 3, 0.9824, 0.0350, 0.0364),
        (128, 4, 0.9950, 0.0099, 0.0100),
        (128, 5, 0.99872, 0.00255, 0.00256),
        (128, 6, 0.99969, 0.00063, 0.00063),
        (128, 8, 0.99998, 4e-5, 4e-5),
    ],
)
def test_b_bit_codes_reach_the_measured_table(dim: int, bits: int, cosine: float, mse: float, variance: float) -> None:
    found, _, cosines = over_rotations(0.0, dim, 20_000, seed=bits, bits=bits)
    assert float(cosines.mean()) == pytest.approx(cosine, rel=0.002)
    # the scale is searched on a grid: within 2 % of the best to 4 bits, 6 % at 5, 25 % at 6, twice at 8, where the
    # error is that of float16 anyway; the table's own figures came from 1500 keys
    slack = {5: 0.06, 6: 0.25, 8: 1.2}.get(bits, 0.025)
    assert float((1 - cosines.square()).mean()) < mse * (1 + slack)
    # a variance from 20,000 cases has a standard error of 1 %
    assert float(found.var()) * dim < variance * (1.03 + slack)


def test_the_scale_search_is_near_the_exhaustive_one() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=g)
    for bits in (2, 3, 4):
        # every scale at which some coordinate crosses to the next level
        critical = (torch.arange(1, 2 ** (bits - 1)) / x.abs()[..., None]).flatten(1)
        best = torch.zeros(300)
        for column in critical.unbind(1):
            u = (x.abs() * column[:, None] * (1 + 1e-6)).floor().clamp(max=2 ** (bits - 1) - 1) + 0.5
            best = torch.maximum(best, (u * x.abs()).sum(-1) / u.norm(dim=-1) / x.norm(dim=-1))
        found = code.cosine(x, code.encode(x, bits), bits)
        assert float((1 - found.square()).mean() / (1 - best.square()).mean()) < 1.01


# the quantised query


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bit_planes_are_exact_in_integers(bits: int) -> None:
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (3, 70, 96), generator=g, dtype=torch.uint8)
    levels = torch.randint(0, 16, (3, 5, 96), generator=g, dtype=torch.uint8)
    found = rabitq_query.plane_products(levels, codes, query_bits=4, bits=bits)
    assert torch.equal(found, torch.einsum("hsp,htp->hst", levels.long(), codes.long()))


@pytest.mark.parametrize("bits", [1, 3])
def test_the_query_identity_equals_the_float_product(bits: int) -> None:
    g = torch.Generator().manual_seed(9)
    codes = torch.randint(0, 2**bits, (40, 64), generator=g, dtype=torch.uint8)
    query = rabitq_query.quantise(torch.randn(7, 64, generator=g), 4)
    found = rabitq_query.inner_products(query, codes, query_bits=4, bits=bits)
    exact = query.dequantised().double() @ code.grid(codes, bits).double().T
    # sums of 64 float32 products of order 10
    assert torch.allclose(found.double(), exact, atol=1e-4)


@pytest.mark.parametrize(
    ("dim", "bits", "random", "nearest"), [(64, 4, 0.0197, 0.0141), (128, 4, 0.0156, 0.0110), (128, 2, 0.0781, 0.0555)]
)
def test_a_quantised_query_adds_the_measured_error(dim: int, bits: int, random: float, nearest: float) -> None:
    g = torch.Generator().manual_seed(dim)
    q = torch.randn(40_000, dim, generator=g)
    q /= q.norm(dim=-1, keepdim=True)
    o = torch.randn(40_000, dim, generator=g)
    codes = code.encode(o, 1)
    factor = 2 / dim**0.5 / code.cosine(o, codes, 1)
    for generator, expected in ((g, random), (None, nearest)):
        error = rabitq_query.quantise(q, bits, generator).dequantised() - q
        added = (error * code.grid(codes, 1)).sum(-1) * factor
        assert float(added.std()) == pytest.approx(expected, rel=0.03)
        assert abs(float(added.mean())) < 4 * expected / 40_000**0.5


# rotations


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("kind", ["fhtkac", "haar"])
def test_rotations_are_orthogonal_and_undone(kind: str, dim: int) -> None:
    g = torch.Generator().manual_seed(dim)
    rotation = code.draw_rotation(kind, 2, dim, g)  # type: ignore[arg-type]
    assert code.rotation_spec(kind, 2, dim).mismatch(rotation) is None  # type: ignore[arg-type]
    matrix = code.rotation_matrix(rotation)
    assert matrix.shape[-1] % 32 == 0
    assert torch.allclose(matrix @ matrix.mT, torch.eye(matrix.shape[-1]), atol=2e-5)
    x = torch.randn(1, 2, 5, dim, generator=g)
    assert torch.allclose(code.unrotate(code.rotate(x, matrix), matrix, dim), x, atol=1e-5)


@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128])
def test_fhtkac_codes_the_worst_vectors_as_well_as_random_ones(dim: int) -> None:
    # one channel, and a constant: the vectors a plain Hadamard transform turns into a spike
    g = torch.Generator().manual_seed(0)
    matrix = code.rotation_matrix(code.draw_rotation("fhtkac", 200, dim, g))
    for x in (torch.eye(dim)[3], torch.ones(dim)):
        rotated = code.rotate(x.expand(200, 1, dim), matrix)
        cosines = code.cosine(rotated, code.encode(rotated, 1), 1)
        # standard deviation .026 over 200 rotations: .002 for the mean; four rounds are not Haar, hence .02
        assert float(cosines.mean()) == pytest.approx(theory.expected_cosine(code.padded(dim)), abs=0.02)


# the method


def layer(method: RaBitQ, *, heads: int = 4, kv_heads: int = 2, dim: int = 64, seed: int = 0) -> LayerCalibration:
    """A calibration with fitted-looking centres."""
    shape = LayerShape(kind=LayerKind.FULL, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, scale=dim**-0.5)
    rope = Rope(inv_freq=tuple(10_000.0 ** (-2 * i / dim) for i in range(dim // 2)))
    g = torch.Generator().manual_seed(seed)
    tensors = {
        name: (
            torch.randn(spec.shape, generator=g)
            if name.endswith("mean")
            else code.draw_rotation(method.rotation, kv_heads, dim, g)
        )
        for name, spec in method.layer_schema(shape).items()
    }
    return LayerCalibration(0, shape, rope, tensors)


def data(dim: int, T: int, *, kv_heads: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, kv_heads, T, dim, generator=g),
        torch.randn(2, kv_heads, T, dim, generator=g),
        torch.arange(4, 4 + T),
    )


@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 256])
def test_error_falls_with_bits_for_any_head_dim(dim: int) -> None:
    keys, values, positions = data(dim, 64)
    last = math.inf
    for bits in (1, 2, 3, 4, 8):
        method = RaBitQ(k_bits=bits, v_bits=bits, mean="none")
        calibration = layer(method, dim=dim)
        kv, _ = method.compress(keys, values, calibration, positions=positions)
        found = method.decompress(kv, calibration, positions=positions)
        error = float(attention.relative_error(found.values, values)) ** 2
        assert error < last / 2
        last = error
        # bits of the page and one float16 a token, over the channels that exist
        stored = (bits * code.padded(dim) + 16) / dim
        assert 8 * nbytes(kv) / (2 * keys.numel()) == pytest.approx(stored)
    assert last < 1e-4


@pytest.mark.parametrize("mean", ["none", "channel", "rotated"])
def test_eight_bits_give_back_attention_to_a_thousandth(mean: str) -> None:
    keys, values, positions = data(64, 128)
    method = make_method("rabitq", {"k_bits": 8, "v_bits": 8, "mean": mean})
    calibration = layer(method)  # type: ignore[arg-type]
    kv, _ = method.compress(keys, values, calibration, positions=positions)
    queries = torch.randn(2, 4, 3, 64)
    found = method.attend(queries, kv, calibration, positions=positions, scale=0.125)
    exact = attention.attend(queries, keys, values, scale=0.125)
    assert float(attention.relative_error(found.out, exact.out)) < 0.02
    assert torch.allclose(found.lse, exact.lse, atol=0.02)


@pytest.mark.parametrize("mode", ["codes", "topp"])
def test_two_calls_equal_one(mode: str) -> None:
    method = make_method("rabitq", {"mode": mode})
    calibration = layer(method)  # type: ignore[arg-type]
    keys, values, positions = data(64, 256)
    whole, _ = method.compress(keys, values, calibration, positions=positions)
    first, carry = method.compress(keys[:, :, :128], values[:, :, :128], calibration, positions=positions[:128])
    second, _ = method.compress(
        keys[:, :, 128:], values[:, :, 128:], calibration, positions=positions[128:], carry=carry
    )
    for one, a, b in zip(whole, first, second, strict=True):
        assert torch.equal(one, torch.cat([a, b], 2))


def test_a_calibration_centres_pre_rope_keys_and_queries() -> None:
    from kvtool.capture import LayerSample

    method = RaBitQ(mode="topp")
    like = layer(method)
    assert like.rope is not None
    g = torch.Generator().manual_seed(4)
    mu = torch.randn(2, 1, 64, generator=g)
    positions = torch.arange(600)
    keys = like.rope.rotate(mu + 0.01 * torch.randn(2, 600, 64, generator=g), positions)
    queries = 3.0 + torch.randn(4, 600, 64, generator=g)
    sample = LayerSample(0, 0, like.shape, like.rope, keys, keys, positions, queries, positions)
    tensors = method.fit_layer(like.shape, like.rope, [sample], layer=0)
    assert torch.allclose(tensors["key_mean"], mu[:, 0], atol=0.005)
    assert torch.allclose(tensors["query_mean"], torch.full((4, 64), 3.0), atol=0.2)
    assert {n: s.mismatch(tensors[n]) for n, s in method.layer_schema(like.shape).items()} == dict.fromkeys(tensors)


def test_the_sketch_is_unbiased_for_every_query_head() -> None:
    # over rotations; groups of 4 query heads with different queries
    keys, values, positions = data(64, 64, kv_heads=1)
    queries = torch.randn(2, 4, 2, 64, generator=torch.Generator().manual_seed(3)) + 0.5
    exact = attention.logits(queries, keys, scale=0.125)
    method = RaBitQ(mode="topp", rotation="haar")
    errors = []
    for seed in range(300):
        calibration = layer(method, kv_heads=1, seed=seed)
        kv, _ = method.compress(keys, values, calibration, positions=positions)
        errors.append(method.estimate(queries, kv, calibration, positions=positions, scale=0.125) - exact)  # type: ignore[arg-type]
    mean, deviation = torch.stack(errors).mean(0), torch.stack(errors).std(0)
    z = mean / deviation * 300**0.5
    # 1024 pairs: standard normal but for the rounding of float16 terms
    assert float(z.abs().max()) < 4.8
    assert float(z.mean().abs()) < 0.3


def test_sketched_attention_keeps_the_mass_asked_for_and_the_exact_cache() -> None:
    keys, values, positions = data(64, 512)
    queries = 3 * torch.randn(2, 4, 8, 64, generator=torch.Generator().manual_seed(3))
    method = RaBitQ(mode="topp", p=0.9, mean="none")
    calibration = layer(method)
    kv, _ = method.compress(keys.bfloat16(), values.bfloat16(), calibration, positions=positions)
    exact = attention.attend(queries, keys.bfloat16(), values.bfloat16(), scale=0.125)
    found = method.attend(queries, kv, calibration, positions=positions, scale=0.125)
    share = (found.lse - exact.lse).exp()
    assert float(share.mean()) >= 0.9
    assert float((share < 0.89).float().mean()) < 0.01
    assert float(share.mean()) < 0.97  # and not by reading everything
    assert torch.equal(method.decompress(kv, calibration, positions=positions).keys, keys.bfloat16().float())
    # 16 bits, and a sketch of (64 + 16 + 2 * 16) bits a key over 128 numbers
    assert 8 * nbytes(kv) / (2 * keys.numel()) == 16 + (64 + 16 + 32) / 128


def test_p_of_one_reads_everything() -> None:
    keys, values, positions = data(64, 128)
    method = RaBitQ(mode="topp", p=1.0)
    calibration = layer(method)
    kv, _ = method.compress(keys, values, calibration, positions=positions)
    queries = torch.randn(2, 4, 1, 64)
    found = method.attend(queries, kv, calibration, positions=positions, scale=0.125)
    assert torch.allclose(found.out, attention.attend(queries, keys, values, scale=0.125).out, atol=1e-6)


def test_a_zero_key_is_stored_as_zero() -> None:
    keys, values, positions = data(64, 64)
    keys[:, :, 5], values[:, :, 6] = 0, 0
    method = RaBitQ(mean="none")
    calibration = layer(method)
    kv, _ = method.compress(keys, values, calibration, positions=positions)
    found = method.decompress(kv, calibration, positions=positions)
    assert not found.keys[:, :, 5].any()
    assert not found.values[:, :, 6].any()


def test_a_nan_key_is_refused() -> None:
    keys, values, positions = data(64, 64)
    keys[0, 0, 9, 3] = torch.nan
    with pytest.raises(ModelError, match="NaN"):
        RaBitQ(mean="none").compress(keys, values, layer(RaBitQ(mean="none")), positions=positions)


@pytest.mark.parametrize(
    "options", [{"k_bits": 0}, {"v_bits": 9}, {"p": 0.0}, {"p": 1.5}, {"mode": "top"}, {"query_bits": 9}]
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(MethodOptionError):
        make_method("rabitq", options)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_factors_and_errors_agree_with_an_independent_implementation(bits: int) -> None:
    """PyPI qntz, in Rust, with its own rotation: equal factors for equal codes, and the same law of the error."""
    qntz = pytest.importorskip("qntz", reason="comes with the dev extra")
    dim, count = 64, 800
    g = torch.Generator().manual_seed(0)
    r, q = torch.randn(count, dim, generator=g), torch.randn(count, dim, generator=g)
    theirs, errors = [], []
    for i in range(count):
        # a fresh rotation for every pair
        quantizer = qntz.RaBitQQuantizer(dim, seed=i, total_bits=bits)
        code_i = quantizer.quantize(r[i].numpy())
        u = code.grid(torch.tensor([code_i.codes], dtype=torch.uint8), bits)[0]
        theirs.append(code_i.delta * float(u.norm() / r[i].norm()))
        distance = quantizer.approximate_l2_sqr(q[i].numpy(), code_i)
        product = (float(r[i].square().sum() + q[i].square().sum()) - distance) / 2
        errors.append((product - float(r[i] @ q[i])) / float(r[i].norm() * q[i].norm()))
        if i < 20 and bits == 1:
            # delta is the least-squares scale, f_rescale -2 times the unbiased one: their product is -2 (||r||/||u||)^2
            both = code_i.delta * code_i.f_rescale
            assert both == pytest.approx(-2 * float(r[i].square().sum() / u.square().sum()), rel=1e-4)
    mine = code.encode(r, bits)
    if bits == 1:
        # <obar, o> over random rotations and over random vectors is the same law; standard error .0009 each
        assert sum(theirs) / count == pytest.approx(float(code.cosine(r, mine, 1).mean()), abs=0.004)
    else:
        lost = 1 - float(torch.tensor(theirs).square().mean())
        assert 1 - float(code.cosine(r, mine, bits).square().mean()) < 1.02 * lost
    estimate = code.rescale(r, mine, bits, "unbiased") * (code.grid(mine, bits) * q).sum(-1)
    own = ((estimate - (r * q).sum(-1)) / r.norm(dim=-1) / q.norm(dim=-1)).std()
    # two deviations from 800 cases: 2.5 % each; at 2 and 4 bits theirs takes one scale for all vectors
    ratio = float(torch.tensor(errors).std() / own)
    assert 0.88 < ratio < (1.12 if bits == 1 else 1.3)


def test_pages_are_the_common_layout() -> None:
    keys, values, positions = data(64, 64)
    method = RaBitQ(k_bits=5, v_bits=2)
    kv, _ = method.compress(keys, values, layer(method), positions=positions)
    assert kv.key_pages.shape[-1] == packing.page_bytes([8, 8])  # type: ignore[union-attr]
    assert kv.value_pages.shape[-1] == packing.page_bytes([2, 2])  # type: ignore[union-attr]
