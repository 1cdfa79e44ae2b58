"""Which tier a block belongs to: sizes within a budget, and the rules of placement."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.tiered import places
from kvtool.tiered.places import FRESH, Damage


@settings(max_examples=50, deadline=None)
@given(
    shares=st.lists(st.integers(0, 100), min_size=4, max_size=4).filter(any),
    units=st.integers(1, 400),
    more=st.integers(0, 8),
)
def test_sizes_add_up_grow_and_never_cost_more_than_their_shares(shares, units, more):
    shares = torch.tensor(shares) / sum(shares)
    bits = torch.tensor([16.1, 8.6, 3.4, 2.4], dtype=torch.float64)
    counts = places.capacities(shares, units)
    assert sum(counts) == units
    assert min(counts) >= 0
    # up to the thousandth that choose() leaves free
    assert float(torch.tensor(counts).double() @ bits) <= units * float(shares.double() @ bits) + 1e-3 * 16
    later = torch.tensor(places.capacities(shares, units + more)).cumsum(0)
    grown = later - torch.tensor(counts).cumsum(0)
    # a border never moves back, and never past the new units
    assert ((grown >= 0) & (grown <= more)).all()


@settings(max_examples=60, deadline=None)
@given(units=st.integers(4, 60), fresh=st.integers(0, 8), seed=st.integers(0, 2**20))
def test_placement_obeys_its_rules(units, fresh, seed):
    g = torch.Generator().manual_seed(seed)
    shares = torch.rand(4, generator=g)
    shares /= shares.sum()
    B, counts = 3, places.capacities(shares, units)
    each = torch.repeat_interleave(torch.arange(4), torch.tensor(counts)).to(torch.uint8)
    old = torch.stack([each[torch.randperm(units, generator=g)] for _ in range(B)])
    old = torch.nn.functional.pad(old, (0, fresh), value=FRESH)
    ranked = torch.rand(B, units + fresh, generator=g) ** 3
    held, pinned = (torch.rand(B, units + fresh, generator=g) < p for p in (0.5, 0.3))
    thresholds, wanted = torch.tensor([2.0, 1.0, 0.5]), places.capacities(shares, units + fresh)
    new = places.place(old, ranked, held, pinned, wanted, thresholds, 2.0)
    assert all(torch.bincount(row.long(), minlength=4).tolist() == wanted for row in new)
    was = old != FRESH
    rose = was & (new < old)
    assert (held | ~rose).all()
    relative = ranked / ranked.mean(1, keepdim=True)
    assert (relative[rose] >= thresholds[new[rose].long()]).all()
    assert not (rose & pinned).any()
    # nobody who may go up is left outside by somebody who stays at less than half the priority
    for b in range(B):
        for t in range(3):
            inside = (new[b] == t) & (old[b] <= t) & ~pinned[b]
            able = was[b] & (new[b] > t) & (old[b] > t) & held[b] & ~pinned[b] & (relative[b] >= thresholds[t])
            if inside.any() and able.any():
                assert ranked[b][able].max() <= 2.0 * ranked[b][inside].min() * (1 + 1e-4)


def harms(U, factors=(0.0, 0.001, 1.0, 4.0), decay=0.9):
    weight = decay ** torch.arange(U)
    return Damage(torch.tensor(factors)[:, None] * weight, weight / weight.mean())


@pytest.mark.parametrize("budget", [2.4, 2.9, 3.4, 4.0, 8.0, 16.1])
@pytest.mark.parametrize("decay", [0.3, 0.9, 1.0])
def test_sizes_are_the_best_of_all_that_fit(budget, decay):
    bits, damage = (16.1, 8.6, 3.4, 2.4), harms(40, decay=decay)
    shares = places.choose([damage], bits, budget)

    def cost(s):
        return sum(x * b for x, b in zip(s, bits, strict=True))

    def harm(s):
        ends = torch.tensor([0, *places.capacities(torch.as_tensor(s), 40)]).cumsum(0).tolist()
        return sum(float(damage.harm[t, a:b].sum()) for t, (a, b) in enumerate(pairwise(ends)))

    assert cost(shares.tolist()) <= budget + 1e-6
    assert float(shares.min()) >= 0
    rivals = [(h / 20, w / 20, c / 20, 1 - (h + w + c) / 20) for h in range(21) for w in range(21 - h)
              for c in range(21 - h - w)]  # fmt: skip
    best = min(harm(s) for s in rivals if cost(s) <= max(budget - 2e-3, 2.4))
    # its grid is finer than these rivals; a thousandth of cold stays free
    assert harm(shares) <= best * 1.01 + 1e-9
