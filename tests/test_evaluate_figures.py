"""The figures of an evaluation mean what their names say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from kvtool.errors import InputError
from kvtool.evaluate.gates import METRICS, parse_gates
from kvtool.evaluate.intervals import clopper_pearson
from kvtool.evaluate.kld import TokenScores, compare, drift, estimate, join
from kvtool.evaluate.rows import mark_pareto


def by_definition(full, found):
    log_p, log_q = full.double().log_softmax(-1), found.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).nan_to_num(nan=0.0).sum(-1)


@pytest.mark.parametrize("noise", [1e-3, 0.1, 1.0, 30.0])
def test_divergence_is_the_definition(noise):
    generator = torch.Generator().manual_seed(0)
    full = 3 * torch.randn(70, 1000, generator=generator)
    found = full + noise * torch.randn(70, 1000, generator=generator)
    kld = compare(full, found, torch.zeros(70, dtype=torch.long)).kld
    # a few terms of the size of the noise, each rounded to float32 (6e-8), nearly cancel
    torch.testing.assert_close(kld, by_definition(full, found), rtol=2e-6, atol=5e-7 * min(noise, 1))


def test_divergence_of_a_distribution_from_itself_is_exactly_zero():
    logits = torch.randn(5, 50)
    scores = compare(logits, logits.clone(), torch.arange(5))
    assert not scores.kld.any()
    assert not scores.dp.any()
    assert scores.same_top.all()


def test_forbidden_and_runaway_tokens_do_not_break_the_divergence():
    full = torch.tensor([[0.0, 1.0, -math.inf], [0.0, 1.0, -200.0]])
    found = torch.tensor([[0.5, 1.0, -math.inf], [0.0, 1.0, 200.0]])
    kld = compare(full, found, torch.zeros(2, dtype=torch.long)).kld
    torch.testing.assert_close(kld, by_definition(full, found))
    assert kld[1] > 190


def test_a_distribution_that_is_not_a_number_stays_so():
    full = torch.randn(1, 9)
    assert compare(full, torch.full((1, 9), math.nan), torch.zeros(1, dtype=torch.long)).kld.isnan().all()


def test_token_scores_against_a_case_done_by_hand():
    full = torch.tensor([[math.log(0.5), math.log(0.25), math.log(0.25)]])
    found = torch.tensor([[math.log(0.25), math.log(0.5), math.log(0.25)]])
    scores = compare(full, found, torch.tensor([0]))
    assert scores.kld.item() == pytest.approx(0.25 * math.log(2), abs=1e-7)
    assert scores.nll_full.item() == pytest.approx(math.log(2), abs=1e-6)
    assert scores.nll.item() == pytest.approx(math.log(4), abs=1e-6)
    assert scores.dp.item() == pytest.approx(-0.25, abs=1e-6)
    assert scores.same_top.item() == 0


def test_errors_are_over_segments_not_tokens():
    per_token = torch.tensor([[1.0] * 100, [3.0] * 100, [5.0] * 100])
    found = estimate(per_token)
    assert found.mean == 3
    assert found.error == pytest.approx(2 / math.sqrt(3))
    assert math.isnan(estimate(per_token[:1]).error)


def test_drift_sums_up_segments():
    def scores(kld, nll):
        S = len(kld)
        return TokenScores(
            torch.tensor(kld), torch.full((S,), nll), torch.ones(S), torch.full((S,), -0.1), torch.ones(S)
        )

    kld = [float(i) for i in range(1, 101)]
    found = drift([scores(kld, 1.2), scores(kld, 1.4)], first_position=2048)
    assert found.ppl_full == pytest.approx(math.e)
    assert found.ppl_ratio.mean == pytest.approx(math.exp(0.3))
    # the error of a ratio is the ratio times the error of its logarithm: 0.1 here
    assert found.ppl_ratio.error == pytest.approx(math.exp(0.3) * 0.1, rel=1e-5)
    assert (found.kld_median, found.kld_p99, found.kld_p999, found.kld_max) == (50, 99, 100, 100)
    assert found.rms_dp == pytest.approx(0.1)
    assert [(a, b) for a, b, _ in found.positions] == [(2048, 2073), (2073, 2098), (2098, 2123), (2123, 2148)]
    assert found.positions[0][2].mean == 13


def test_chunks_join_to_the_whole():
    full, found, targets = torch.randn(40, 20), torch.randn(40, 20), torch.randint(0, 20, (40,))
    whole = compare(full, found, targets)
    joined = join([compare(full[a:b], found[a:b], targets[a:b]) for a, b in [(0, 1), (1, 33), (33, 40)]])
    for mine, theirs in zip(whole, joined, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def test_interval_of_perfect_recall():
    low, high = clopper_pearson(22, 22)
    assert low == pytest.approx(0.025 ** (1 / 22))
    assert high == 1
    assert clopper_pearson(0, 5) == (0, pytest.approx(1 - 0.025 ** (1 / 5)))


@settings(deadline=None, max_examples=30)
@given(share=st.floats(0.01, 0.99), trials=st.integers(1, 60))
def test_interval_covers_the_truth_as_often_as_it_says(share, trials):
    intervals = [clopper_pearson(hits, trials) for hits in range(trials + 1)]
    covered = sum(binom.pmf(hits, trials, share) for hits, (low, high) in enumerate(intervals) if low <= share <= high)
    # exact intervals are conservative: never below, up to the summation's rounding
    assert covered >= 0.95 - 1e-9


def test_a_gate_fails_what_it_names():
    (gate,) = parse_gates(["kld > 0.05"])
    assert gate.failure({"name": "a", "kld": 0.04}) is None
    assert gate.failure({"name": "a", "kld": 0.05}) is None
    assert gate.failure({"name": "a", "kld": 0.051}) == "a: kld = 0.051, and 'kld>0.05' must not hold"


@pytest.mark.parametrize("row", [{"name": "a"}, {"name": "a", "passkey": None}, {"name": "a", "passkey": math.nan}])
def test_a_gate_does_not_pass_what_was_not_measured(row):
    (gate,) = parse_gates(["passkey<0.9"])
    assert "was not measured" in gate.failure(row)


def test_several_gates_in_one_option():
    assert [str(gate) for gate in parse_gates(["kld>=1e-2,bits>3", "passkey<0.95"])] == [
        "kld>=0.01",
        "bits>3",
        "passkey<0.95",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kld", "expected a metric, a relation and a number"),
        ("kld>", "expected a metric, a relation and a number"),
        ("kld>1.2.3", "expected a metric, a relation and a number"),
        ("klt>1", "no metric 'klt'; did you mean 'kld'?"),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused(text, message):
    with pytest.raises(InputError, match="--fail-if") as error:
        parse_gates([text])
    assert message in str(error.value)


def test_every_metric_of_the_gates_is_documented():
    assert all(METRICS.values())


def test_pareto_front():
    rows = [
        {"name": "cheap", "bits": 2.0, "kld": 0.1, "passkey": 0.5},
        {"name": "evicting", "bits": 2.0, "kld": 0.05, "passkey": 0.0},
        {"name": "good", "bits": 3.0, "kld": 0.01, "passkey": 1.0},
        {"name": "worse", "bits": 3.5, "kld": 0.01, "passkey": 1.0},
        {"name": "broken", "bits": 3.5, "kld": None, "passkey": 1.0},
    ]
    mark_pareto(rows)
    assert [row["name"] for row in rows if row["pareto"]] == ["cheap", "evicting", "good", "broken"]
    assert rows[3]["dominated_by"] == "good"
