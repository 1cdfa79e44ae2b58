"""Promises of the bit allocator: optimal where Lagrangian relaxation is, never over budget, and fast."""

import time
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kvtool.allocation import allocate, exact, lower_hull, water_fill


@st.composite
def instances(draw):
    """Small integer-cost instances; convex or not, with ties."""
    N, L = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    cost = torch.randint(0, 9, (N, L), generator=g)
    distortion = torch.randint(0, 1000, (N, L), generator=g).double() / 16  # sums are exact in float32
    return cost, distortion


def vertices(cost, distortion):
    hull = lower_hull(cost, distortion)
    return [(distortion[n], hull.vertices(n)) for n in range(len(cost))]


def spend(table, options):
    return float(table.gather(1, options[:, None]).sum())


@given(instances(), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_equals_dynamic_programming_at_every_hull_vertex(instance, where):
    """A budget that some common slope spends to the byte leaves no duality gap: the answers must be equal."""
    cost, distortion = instance
    hull = lower_hull(cost, distortion)
    slopes = hull.slope[hull.slope > 0].unique()
    slope = float(slopes[int(where * (len(slopes) - 1))]) if len(slopes) else 0.0
    base = float(hull.base.sum())
    # strictly above: items with equal slopes move together, so the vertex is that of the Lagrangian
    budget = int(base + float(hull.cost[hull.slope > slope].sum()))
    found = allocate(cost, distortion, budget)
    assert spend(cost, found) <= budget
    assert spend(distortion, found) == spend(distortion, exact(cost, distortion, budget))


@given(instances(), st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_never_over_budget_and_within_one_step_of_the_optimum(instance, budget):
    cost, distortion = instance
    cheapest = int(cost.amin(1).sum())
    if budget < cheapest:
        with pytest.raises(ValueError, match="cheapest options cost"):
            allocate(cost, distortion, budget)
        return
    found = allocate(cost, distortion, budget)
    assert spend(cost, found) <= budget
    best = spend(distortion, exact(cost, distortion, budget))
    largest = max((float(d[a] - d[b]) for d, v in vertices(cost, distortion) for a, b in pairwise(v)), default=0.0)
    # weak duality: stopping before one step that no longer fits loses at most that step
    assert best <= spend(distortion, found) <= best + largest + 1e-3


@given(st.integers(0, 2**31), st.floats(0.05, 1))
@settings(max_examples=50, deadline=None)
def test_more_weight_never_gets_a_lower_level(seed, share):
    """One ladder scaled by the weight of the item, costs equal: the level is monotone in the weight."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, generator=g).exp().sort().values
    eps, cost = torch.tensor([1.0, 0.31, 0.014, 5e-5]), torch.tensor([0.0, 2, 4, 8])
    levels = allocate(cost.expand(40, 4), weight[:, None] * eps, share * 320)
    # the greedy remainder may lift one item past a heavier neighbour whose step did not fit
    assert (levels.diff() < 0).sum() <= 1


def test_thresholds_are_those_of_the_published_value_table():
    """0->2 .34357, 2->4 .14944, 4->8 .003484, 8->16 6.07e-6 per bit, for eps .31287 .013986 4.855e-5."""
    eps = torch.tensor([[1, 0.31287, 0.013986, 4.855e-5, 0]])
    hull = lower_hull(torch.tensor([[0.0, 2, 4, 8, 16]]), eps)
    expected = torch.tensor([[0.343565, 0.149442, 0.0034844, 6.0688e-6]])
    assert torch.allclose(hull.slope.T, expected, rtol=1e-4)  # the table has five digits
    assert hull.vertices(0) == [0, 1, 2, 3, 4]


def test_options_above_the_hull_are_never_taken():
    cost, distortion = torch.tensor([[0.0, 1, 2, 3]]), torch.tensor([[10.0, 9.9, 2, 1]])
    for budget in (0, 1, 2, 3):
        assert allocate(cost, distortion, budget).item() == {0: 0, 1: 0, 2: 2, 3: 3}[budget]


def test_reverse_water_filling_example():
    """Components 4, 1, .25, .0625 at distortion .5: theta .145833, rates 2.3888 1.3888 .3888 0."""
    theta, rates = water_fill(torch.tensor([4, 1, 0.25, 0.0625]), 0.5)
    assert theta == pytest.approx(0.145833, abs=1e-6)
    assert rates.tolist() == pytest.approx([2.3888, 1.3888, 0.3888, 0], abs=1e-4)


def test_gaussian_curves_give_the_rates_of_water_filling():
    """On D(b) = g 2^-2b with a fine grid of b the allocator is reverse water-filling."""
    g = torch.tensor([4, 1, 0.25, 0.0625])
    _, rates = water_fill(g, 0.5)
    bits = torch.arange(0, 4.001, 0.01)
    options = allocate(bits.expand(4, -1), g[:, None] * 4.0**-bits, float(rates.sum()) + 0.005)
    assert torch.allclose(bits[options].double(), rates, atol=0.02)  # two grid steps


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.alone
def test_a_million_items_in_under_a_second(one_thread):
    g = torch.Generator().manual_seed(0)
    weight = (2 * torch.randn(1_000_000, generator=g)).exp()
    eps = torch.tensor([1, 0.31, 0.046, 0.014, 5e-5])
    cost, distortion = torch.tensor([0.0, 2, 3, 4, 8]).expand(1_000_000, 5), weight[:, None] * eps
    seconds = []
    for _ in range(5):
        # of one thread's processor time the best: other work on the machine is not the allocator's
        start = time.process_time()
        levels = allocate(cost, distortion, 2_000_000)
        seconds.append(time.process_time() - start)
        if seconds[-1] < 1:
            break
    assert spend(cost, levels) == 2_000_000
    assert min(seconds) < 1


def test_a_budget_that_rounds_up_to_the_next_step_ends(one_thread):
    """float64 budgets lie between float32 costs: a step dearer by less than that rounding is left out."""
    cost = torch.tensor([[0.0, 16777216.0]])
    assert allocate(cost, torch.tensor([[1.0, 0.0]]), 16777215.9999).tolist() == [0]
    assert allocate(cost, torch.tensor([[1.0, 0.0]]), 16777216.0).tolist() == [1]


def test_a_better_option_of_the_same_cost_is_taken_without_a_budget():
    cost, distortion = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[1.0, 5, 3, 4]])
    assert allocate(cost, distortion, 0).tolist() == [2]
    assert allocate(cost, distortion, 1).tolist() == [0]
