"""Promises of rdkv's claims: they hold on text like the fitted one, and wrong tables or codes are found out."""

from dataclasses import replace

import pytest
import torch

from kvtool.bounds import check_claims
from kvtool.calibration import Calibration
from kvtool.capture.sample import LayerSample
from kvtool.errors import CaptureError
from kvtool.methods.rdkv import RDKV
from kvtool.race import uniform
from kvtool.rdkv import pages
from kvtool.rdkv.fit import fit
from kvtool.shapes import CacheShape, LayerKind, LayerShape

LAYER = LayerShape(kind=LayerKind.FULL, num_heads=4, num_kv_heads=2, head_dim=64, scale=0.125)
METHOD = RDKV(budget="20%", pool=1)


def sample(T, seed=0):
    """Keys with a mean and uneven channels; every text has the same distribution."""
    g, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(7)
    uneven = torch.logspace(0.3, -1, 64)[torch.randperm(64, generator=fixed)]
    keys = torch.randn(2, T, 64, generator=g) * uneven + torch.randn(2, 1, 64, generator=fixed)
    values, queries = torch.randn(2, T, 64, generator=g), 1.5 * torch.randn(4, T, 64, generator=g)
    return LayerSample(0, 0, LAYER, None, keys, values, torch.arange(T), queries, torch.arange(T))


class OneLayer:
    """What fit and verify-bound read of a capture."""

    def __init__(self, *texts):
        self.shape, self.layers, self.texts = CacheShape(layers=(LAYER,)), [0], texts

    def samples(self, layer, *, tokens=None):
        return list(self.texts)


@pytest.fixture(scope="module")
def fitted():
    capture = OneLayer(sample(1536))
    tensors = fit(METHOD, capture)
    # independent tokens: evicting one costs what it costs alone
    return Calibration(METHOD, capture.shape, tensors | {"layers.0.eviction": torch.tensor(1.0)})


def verdicts(calibration, unseen=None):
    capture = OneLayer(unseen) if unseen else OneLayer(*(sample(1536, seed=seed) for seed in (1, 2, 3, 4)))
    return {result.quantity: result for result in check_claims(calibration, capture)}


def broken(calibration, **tensors):
    return replace(calibration, tensors=calibration.tensors | {f"layers.0.{k}": v for k, v in tensors.items()})


def test_the_budget_and_the_predicted_distortion_are_claimed_and_hold_on_unseen_text(fitted):
    found = verdicts(fitted)
    assert found.keys() == {"bits_per_value", "level_distortion", "output_distortion"}
    assert found["bits_per_value"].limit == pytest.approx(3.2)
    assert all(result.holds for result in found.values())
    # the same distribution: ratios near 1. 96 queries of each of 4 texts, with heavy-tailed weights, leave a third
    assert 0.7 < found["level_distortion"].measured < 1.4


@pytest.mark.parametrize("quantity", ["level_distortion", "output_distortion"])
def test_tables_that_promise_a_quarter_of_the_distortion_fail(fitted, quantity):
    assert not verdicts(broken(fitted, distortion=fitted.tensors["layers.0.distortion"] / 4))[quantity].holds


def test_corrupted_codes_fail(fitted, monkeypatch):
    real = pages.pack

    def corrupted(*arguments):
        kv = real(*arguments)
        return kv._replace(key_codes=kv.key_codes ^ 0b10010010)

    monkeypatch.setattr("kvtool.methods.rdkv.pack", corrupted)
    found = verdicts(fitted)
    assert found["bits_per_value"].holds
    assert not found["level_distortion"].holds


def test_a_uniform_pair_has_no_tables_and_claims_its_budget(fitted):
    pair = uniform(fitted.layer(0), 2, 2)
    claims = METHOD.claims(fitted.shape, {f"layers.0.{k}": v for k, v in pair.tensors.items()})
    assert [claim.quantity for claim in claims] == ["bits_per_value"]


def test_a_layer_weighed_by_mass_predicts_no_error_of_the_output(fitted):
    claims = METHOD.claims(fitted.shape, broken(fitted, family=torch.tensor(1, dtype=torch.uint8)).tensors)
    assert [claim.quantity for claim in claims] == ["bits_per_value", "level_distortion"]


def test_everything_in_16_bits_is_predicted_to_be_exact(fitted):
    found = verdicts(broken(fitted, fraction=torch.tensor(1.1)))
    assert found["level_distortion"].measured == found["output_distortion"].measured == 0


def test_queries_the_method_was_shown_do_not_judge_it(fitted):
    one = sample(1536)
    few = replace(one, queries=one.queries[:, -32:], query_positions=one.positions[-32:])
    with pytest.raises(CaptureError, match="queries it was not shown.*--queries all"):
        verdicts(fitted, few)
