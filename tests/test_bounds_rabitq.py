"""The per-pair certificate: the paper's estimate passes, broken ones fail, and what it says is right."""

import math
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kvtool.bounds import pairs, theory
from kvtool.bounds.judging import HeadResult, two_way_error
from kvtool.bounds.options import settings_from
from kvtool.bounds.pairs import Estimator, Factors, HeadPairs, Tally
from kvtool.bounds.rabitq import Settings, check_bound
from kvtool.calibration import CachePolicy, Calibration
from kvtool.capture import LayerSample
from kvtool.errors import CaptureError, InputError
from kvtool.methods import rabitq_code as code
from kvtool.methods.rabitq import RaBitQ
from kvtool.shapes import CacheShape, LayerKind, LayerShape

SMALL = Settings(rotations=16, keys=256, queries=32)


class FakeCapture:
    """One layer whose keys and queries share directions, as real ones do, so that cosines differ between pairs."""

    def __init__(self, dim: int = 64, *, heads: int = 4, kv_heads: int = 2, tokens: int = 1024) -> None:
        layer = LayerShape(kind=LayerKind.FULL, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, scale=dim**-0.5)
        self.shape, self.layers = CacheShape(layers=(layer,)), [0]
        g = torch.Generator().manual_seed(dim)
        spectrum = torch.arange(1, dim + 1).float() ** -0.7 * 4
        basis = torch.linalg.qr(torch.randn(kv_heads, dim, dim, generator=g)).Q
        self.keys = (torch.randn(kv_heads, tokens, dim, generator=g) * spectrum) @ basis.mT
        self.keys[:, :4] *= 6  # sinks
        self.keys[:, 100] *= 20  # a massive key
        spread = torch.randn(kv_heads, heads // kv_heads * tokens, dim, generator=g) * spectrum
        self.queries = (spread @ basis.mT).unflatten(1, (-1, tokens)).flatten(0, 1)
        self.values = torch.randn(kv_heads, tokens, dim, generator=g)

    def samples(self, layer: int, *, tokens: slice | None = None) -> Iterator[LayerSample]:
        at = torch.arange(self.keys.shape[1])
        yield LayerSample(0, 0, self.shape.layers[0], None, self.keys, self.values, at, self.queries, at)


def verify(capture: FakeCapture, settings: Settings = SMALL, estimate: Estimator | None = None) -> list[HeadResult]:
    method = RaBitQ(mode="topp")
    tensors = {
        f"layers.0.{k}": v
        for k, v in method.fit_layer(capture.shape.layers[0], None, list(capture.samples(0)), layer=0).items()
    }
    calibration = Calibration(method, capture.shape, tensors, CachePolicy(sinks=4))
    ((_, results),) = check_bound(calibration, capture, settings, estimate=estimate)  # type: ignore[arg-type]
    return results


@pytest.fixture(scope="module")
def honest() -> list[HeadResult]:
    return verify(FakeCapture())


def test_the_papers_estimate_holds_in_every_head(honest: list[HeadResult]) -> None:
    assert [result.failures for result in honest] == [(), ()]


def test_the_measured_rate_is_what_the_law_predicts_for_these_pairs(honest: list[HeadResult]) -> None:
    for result in honest:
        assert abs(result.bulk.rate - result.bulk.predicted) < 4 * result.bulk.standard_error
        # the pairs are not orthogonal, so it is less than the worst case
        assert result.bulk.predicted < theory.worst_violation(1.9, 64)
        assert result.bulk.lower < result.bulk.rate < result.bulk.limit


def test_variance_cosine_and_logit_noise_agree_with_the_law(honest: list[HeadResult]) -> None:
    for result in honest:
        assert abs(result.variance - 1) < 4 * result.variance_error
        assert result.cosine == pytest.approx(theory.expected_cosine(64), abs=0.002)
        assert result.logit_rms == pytest.approx(result.logit_law, rel=0.05)
        # the median of |error| / bound: .674 / 1.9 for a normal error, less as cosines are not zero
        assert 0.85 * 0.674 / 1.9 < result.tightness[0] < 0.674 / 1.9
        assert sorted(result.tightness) == list(result.tightness)
        assert 1.7 < result.epsilon < 1.91


def test_sinks_and_massive_keys_are_counted_apart(honest: list[HeadResult]) -> None:
    for result in honest:
        assert result.sinks is not None
        assert result.sinks.keys == 4
        # sinks are heavy as well, but first of all they are sinks
        assert result.massive is None or result.massive.keys >= 1
        assert result.bulk.keys + result.sinks.keys + (result.massive.keys if result.massive else 0) == 256
        assert result.bulk.pairs == result.bulk.keys * 64 * 16


def test_dependent_pairs_are_worth_less_than_their_number(honest: list[HeadResult]) -> None:
    for result in honest:
        assert 16 < result.bulk.effective < result.bulk.pairs


def test_attention_is_moved_less_by_more_bits() -> None:
    found = verify(FakeCapture(), Settings(bits=(1, 4), rotations=8, keys=128, queries=16))
    by_bits = {bits: [r for r in found if r.bits == bits] for bits in (1, 4)}
    for one, four in zip(by_bits[1], by_bits[4], strict=True):
        assert four.attention["weights_moved"] < one.attention["weights_moved"] / 3
        assert four.attention["output_error"] < one.attention["output_error"] / 3
        assert four.logit_rms < one.logit_rms / 5


@pytest.mark.parametrize("dim", [80, 96, 112, 128])
def test_other_head_dims_are_padded_and_hold(dim: int) -> None:
    # delta of the padded dimension; at 112 the code has 128 channels
    for result in verify(FakeCapture(dim)):
        assert result.failures == ()
        assert result.cosine == pytest.approx(theory.expected_cosine(code.padded(dim)), abs=0.002)


def test_a_four_bit_query_keeps_the_estimate_unbiased() -> None:
    (first, *_) = verify(FakeCapture(), Settings(rotations=16, keys=256, queries=32, query_bits=4))
    assert abs(first.bias) < 4 * first.bias_error
    # nearest rounding adds 2.3 % of variance at d = 64 (half of the 4.4 % of random rounding)
    assert first.variance == pytest.approx(1.023, abs=0.02)


# estimators that are wrong, each in a way that has been published or shipped


def naive(q: Tensor, o: Tensor, codes: Tensor, bits: int) -> Factors:
    """<obar, q>: not divided by <obar, o>."""
    u = code.grid(codes, bits)
    return Factors(q, u / u.norm(dim=-1, keepdim=True) - o)


def wrong_root(q: Tensor, o: Tensor, codes: Tensor, bits: int) -> Factors:
    """1/d where 1/sqrt(d) belongs."""
    scale = code.rescale(o, codes, bits, "unbiased")[:, None] / q.shape[1] ** 0.5
    return Factors(q, scale * code.grid(codes, bits) - o)


def no_root(q: Tensor, o: Tensor, codes: Tensor, bits: int) -> Factors:
    """No 1/sqrt(d) at all."""
    scale = code.rescale(o, codes, bits, "unbiased")[:, None] * q.shape[1] ** 0.5
    return Factors(q, scale * code.grid(codes, bits) - o)


def averaged_query(q: Tensor, o: Tensor, codes: Tensor, bits: int) -> Factors:
    """One query for all heads of the group: their mean."""
    mean = q.unflatten(0, (2, -1)).mean(0).repeat(2, 1)
    scale = code.rescale(o, codes, bits, "unbiased")[:, None]
    return Factors(torch.cat([mean, -q], 1), torch.cat([scale * code.grid(codes, bits), o], 1))


def shrunk(q: Tensor, o: Tensor, codes: Tensor, bits: int) -> Factors:
    """The least-squares scale: smaller errors, all towards zero."""
    return Factors(q, code.rescale(o, codes, bits, "least-squares")[:, None] * code.grid(codes, bits) - o)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (naive, "bias -0"),
        (wrong_root, "bias -0"),
        (no_root, "rate limit"),
        (averaged_query, "rate limit"),
        (shrunk, "bias -0"),
    ],
)
def test_broken_estimators_fail_in_every_head(broken: Estimator, reason: str) -> None:
    for result in verify(FakeCapture(), SMALL, broken):
        assert not result.holds
        assert reason in "; ".join(result.failures)


@pytest.mark.parametrize(("broken", "bias"), [(naive, -0.2), (wrong_root, -0.875), (shrunk, -0.36)])
def test_the_bias_of_a_shrinking_estimator_is_measured(broken: Estimator, bias: float) -> None:
    # 1 - E<obar, o>, 1 - 1/sqrt(d), 1 - E<obar, o>^2
    for result in verify(FakeCapture(), SMALL, broken):
        assert result.bias == pytest.approx(bias, abs=0.02)
        assert abs(result.bias) > 20 * result.bias_error


def test_a_delta_below_the_truth_fails() -> None:
    for result in verify(FakeCapture(), Settings(rotations=16, keys=256, queries=32, delta=0.04)):
        assert "rate limit" in result.failures[0]


def test_the_error_of_a_rate_counts_rotations_and_keys() -> None:
    # a rate that depends on the rotation alone: keys add nothing
    g = torch.Generator().manual_seed(0)
    by_rotation = torch.rand(32, 1, generator=g).expand(32, 1000).double()
    assert two_way_error(by_rotation) == pytest.approx(float(by_rotation[:, 0].std()) / 32**0.5)
    by_key = torch.rand(1, 1000, generator=g).expand(32, 1000).double()
    assert two_way_error(by_key) == pytest.approx(float(by_key[0].std()) / 1000**0.5)
    alone = torch.rand(200, 300, generator=g).double()
    assert two_way_error(alone) == pytest.approx(float(alone.std()) / 60_000**0.5, rel=0.15)


def test_no_violation_is_no_proof_of_none() -> None:
    (result, _) = verify(FakeCapture(), Settings(rotations=16, keys=256, queries=32, epsilon=8))
    assert result.bulk.violations == 0
    # as many cases as rotations times keys, not pairs
    assert result.bulk.limit == pytest.approx(1 - 0.01 ** (1 / (16 * result.bulk.keys)), rel=1e-6)


@pytest.mark.alone
def test_twenty_million_pairs_a_second_on_two_cores() -> None:
    """Rotation, code, estimate and statistics at head_dim 64; processor time of one thread, so load does not matter."""
    g = torch.Generator().manual_seed(0)
    pair = HeadPairs(
        torch.randn(2048, 64, generator=g),
        torch.zeros(2048, dtype=torch.long),
        torch.randn(384, 64, generator=g),
        0.125,
    )
    fixed, tally, threads = pairs.fix(pair), Tally(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.process_time()
        for _ in range(10):
            rotation = pairs.fresh_rotations(1, 64, g)[0]
            pairs.rotate_once(tally, pair, fixed, rotation, 1, 1.9, pairs.estimator)
        speed = 10 * 2048 * 384 / (time.process_time() - started)
    finally:
        torch.set_num_threads(threads)
    assert speed > 10e6


def test_memory_does_not_grow_with_the_keys() -> None:
    # the matrix of errors is the only thing as large as the pairs, and it is cut at 2 million
    assert max(span.stop - span.start for span in pairs._spans(1_000_000, 512)) * 512 <= 1 << 21


# bad input


def test_a_capture_without_queries_is_refused() -> None:
    capture = FakeCapture()
    sample = next(capture.samples(0))
    bare = LayerSample(0, 0, sample.shape, None, sample.keys, sample.values, sample.positions)
    method = RaBitQ(mode="topp", query_mean=False, mean="none")
    layer = Calibration(method, capture.shape, {}).layer(0)
    with pytest.raises(CaptureError, match="--queries all"):
        next(pairs.choose_pairs(bare, method, layer, keys=64, queries=8, sinks=4, massive=3))


def test_a_nan_key_is_named_with_its_head() -> None:
    capture = FakeCapture()
    capture.keys[1, 3, 5] = math.nan
    with pytest.raises(CaptureError, match="key head 1"):
        verify(capture)


def test_a_key_on_its_centre_is_left_out() -> None:
    capture = FakeCapture()
    capture.keys[:, 4:] = capture.keys[:, 4:5]  # all equal, so all on their mean but for rounding
    capture.keys[:, :4] = 0
    method = RaBitQ(mode="topp", mean="none", query_mean=False)
    layer = Calibration(method, capture.shape, {}).layer(0)
    found = next(pairs.choose_pairs(next(capture.samples(0)), method, layer, keys=64, queries=8, sinks=4, massive=3))
    assert len(found.keys) == 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "0"}, "--bits 0"),
        ({"bits": "9"}, "--bits 9"),
        ({"bits": "one"}, "--bits one"),
        ({"epsilon": 0.0}, "--epsilon 0.0"),
        ({"epsilon": 17.0}, "--epsilon 17.0"),
        ({"rotations": 1}, "--rotations 1"),
        ({"delta": 0.0}, "--delta 0.0"),
    ],
)
def test_settings_out_of_range_are_one_sentence(options: dict[str, object], message: str) -> None:
    values = {"bits": None, **options}
    with pytest.raises(InputError, match=message):
        settings_from(RaBitQ(), **values)  # type: ignore[arg-type]
