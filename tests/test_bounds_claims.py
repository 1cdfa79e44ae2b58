"""verify-bound's first promise: a claim that is false on held-out tokens is found out, a true one is not."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

from kvtool.bounds import MEASURES, check_claims
from kvtool.bounds.statistics import clopper_pearson, effective_cases
from kvtool.calibration import CachePolicy, Calibration
from kvtool.capture import LayerSample
from kvtool.errors import CaptureError
from kvtool.methods.base import Carry, Claim, Decompressed, LayerCalibration, Method
from kvtool.shapes import CacheShape, LayerKind, LayerShape

D, NOISE = 16, 0.1  # the noisy method has a key NMSE of NOISE^2 by construction


class NoisyKV(NamedTuple):
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Noisy(Method):
    """Adds noise of a known relative size to keys and keeps values."""

    name: ClassVar[str] = "noisy"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    said: tuple[Claim, ...] = ()

    def compress(
        self,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        queries: Any = None,
        carry: Carry = None,
    ) -> tuple[NoisyKV, Carry]:
        noise = torch.randn(keys.shape, generator=torch.Generator().manual_seed(5))
        noise *= NOISE * keys.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        return NoisyKV(keys + noise, values), None

    def decompress(self, kv: NoisyKV, layer: LayerCalibration, *, positions: Tensor) -> Decompressed:
        return Decompressed(kv.keys, kv.values)

    def claims(self, shape: CacheShape, tensors: Mapping[str, Tensor]) -> Sequence[Claim]:
        return self.said


class FakeCapture:
    """One sample of Gaussian tokens for each of two layers."""

    def __init__(self, tokens: int = 2560, *, queries: bool = True) -> None:
        layer = LayerShape(kind=LayerKind.FULL, num_heads=4, num_kv_heads=2, head_dim=D, scale=D**-0.5)
        self.shape, self.layers, self.tokens, self.queries = CacheShape(layers=(layer, layer)), [0, 1], tokens, queries

    def samples(self, layer: int, *, tokens: slice | None = None) -> Iterator[LayerSample]:
        g = torch.Generator().manual_seed(layer)
        T = self.tokens
        yield LayerSample(
            layer=layer,
            sample=0,
            shape=self.shape.layers[layer],
            rope=None,
            keys=torch.randn(2, T, D, generator=g),
            values=torch.randn(2, T, D, generator=g),
            positions=torch.arange(T),
            queries=torch.randn(4, T, D, generator=g) if self.queries else None,
            query_positions=torch.arange(T),
        )


def check(*claims: Claim, capture: FakeCapture | None = None) -> list[bool]:
    capture = capture or FakeCapture()
    results = check_claims(Calibration(Noisy(claims), capture.shape), capture)  # type: ignore[arg-type]
    return [result.holds for result in results]


def test_true_claims_hold_in_every_layer() -> None:
    claims = [
        Claim("key_nmse", NOISE**2 * 1.001, "always", "construction"),
        Claim("value_nmse", 0.0, "always", "construction"),
        # isotropic noise: E (q.e)^2 / (|q| |k|)^2 = NOISE^2 / D
        Claim("inner_product_nmse", NOISE**2 / D * 1.05, "expected", "construction"),
        Claim("inner_product_bias", 0.01, "expected", "construction"),
        Claim("bits_per_value", 32.0, "always", "construction"),
    ]
    assert check(*claims) == [True] * 10


@pytest.mark.parametrize(
    ("quantity", "limit", "kind"),
    [
        ("key_nmse", NOISE**2 * 0.99, "always"),
        ("key_nmse", NOISE**2 * 0.99, "expected"),
        ("inner_product_nmse", NOISE**2 / D * 0.8, "expected"),
        ("output_error", 1e-3, "expected"),
        ("logit_mse", 1e-4, "expected"),
        ("bits_per_value", 31.0, "always"),
    ],
)
def test_false_claims_fail_in_every_layer(quantity: str, limit: float, kind: Any) -> None:
    assert check(Claim(quantity, limit, kind, "construction")) == [False, False]


def test_a_claim_about_one_layer_is_measured_in_that_layer_only() -> None:
    capture = FakeCapture()
    said = (Claim("key_nmse", 1.0, "always", "construction", layer=1),)
    (result,) = check_claims(Calibration(Noisy(said), capture.shape), capture)  # type: ignore[arg-type]
    assert result.layer == 1


def test_layers_kept_exact_are_not_measured() -> None:
    capture = FakeCapture()
    said = (Claim("key_nmse", 1.0, "always", "construction"),)
    calibration = Calibration(Noisy(said), capture.shape, policy=CachePolicy(exact_layers=(0,)))
    assert [r.layer for r in check_claims(calibration, capture)] == [1]  # type: ignore[arg-type]


def test_a_claim_about_logits_needs_queries() -> None:
    with pytest.raises(CaptureError, match="--queries all"):
        check(Claim("logit_mse", 1.0, "expected", "construction"), capture=FakeCapture(queries=False))


def test_a_capture_without_a_held_out_page_is_refused() -> None:
    with pytest.raises(CaptureError, match="longer context"):
        check(Claim("key_nmse", 1.0, "always", "construction"), capture=FakeCapture(tokens=200))


def test_every_measure_reports_each_head() -> None:
    capture = FakeCapture()
    from kvtool.bounds.claims import evidence

    calibration = Calibration(Noisy(()), capture.shape)
    one = evidence(calibration, next(capture.samples(0)), calibration.layer(0))
    assert {measure(one).shape[0] for measure in MEASURES.values()} == {2}


def test_clopper_pearson_is_the_exact_binomial_limit() -> None:
    # against the definition: at the upper limit, so few hits happen with probability 1 - confidence
    from scipy import stats

    upper = clopper_pearson(0.05, 200, 0.99)
    assert stats.binom.cdf(10, 200, upper) == pytest.approx(0.01, rel=1e-6)
    lower = clopper_pearson(0.05, 200, 0.99, upper=False)
    assert stats.binom.sf(9, 200, lower) == pytest.approx(0.01, rel=1e-6)
    assert clopper_pearson(0.0, 100, 0.99) == pytest.approx(1 - 0.01 ** (1 / 100))  # the rule of three's parent
    assert clopper_pearson(1.0, 100, 0.99) == 1.0


def test_effective_cases_of_independent_ones_is_their_number() -> None:
    assert effective_cases(0.1, (0.1 * 0.9 / 500) ** 0.5, 10_000) == pytest.approx(500)
