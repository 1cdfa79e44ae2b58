"""Bit allocation: spend a budget of bytes where it lowers distortion most.

Every item (a page of tokens, a channel group, a layer) offers L options with a cost and a distortion; option 0 is the
cheapest. Minimise the summed distortion under a summed cost. This is reverse water-filling on measured curves instead
of 2^(-2b): on the lower convex hull of each item, take all steps whose drop of distortion per byte exceeds one common
lambda (Shoham and Gersho 1988), then fill what is left of the budget with the next best steps.
"""

import torch
from torch import Tensor

_SAMPLE = 4096  # steps that the end of the budget is guessed from


def allocate(cost: Tensor, distortion: Tensor, budget: float) -> Tensor:
    """The option of each item, int64 [N], for ``cost`` and ``distortion`` [N, L]; never over ``budget``.

    Optimal whenever the budget is met by a whole number of hull steps; otherwise within one step of it.

    Raises:
        ValueError: even option 0 of every item costs more than the budget.
    """
    hull = lower_hull(cost, distortion)
    at = hull.options[:, 0].clone()
    left = float(budget) - float(cost.gather(1, at[:, None]).sum(dtype=torch.float64))
    if left < 0:
        raise ValueError(f"the cheapest options cost {float(budget) - left:.0f}, the budget is {budget:.0f}")
    taken = _steps_within(hull, left)
    steps = torch.arange(hull.cost.shape[1], device=taken.device)
    left -= float(torch.where(steps < taken[:, None], hull.cost, 0).sum(dtype=torch.float64))
    taken = _fill(hull, taken, left)
    return hull.options.gather(1, taken[:, None]).squeeze(1)


class Hull:
    """Lower convex hulls of N items as steps: options [N, S+1], and cost, slope [N, S] of each step, slopes falling.

    An item with fewer steps is padded with steps of slope 0, which are never taken.
    """

    def __init__(self, options: Tensor, cost: Tensor, slope: Tensor) -> None:
        self.options, self.cost, self.slope = options, cost, slope


def lower_hull(cost: Tensor, distortion: Tensor) -> Hull:
    """The lower convex hull of each item's (cost, distortion) points, from its cheapest (then best) option on."""
    cost, distortion = cost.float(), distortion.float()
    N, L = cost.shape
    # the cheapest option; among equals the least distorted
    cheapest = cost == cost.amin(1, keepdim=True)
    at = distortion.masked_fill(~cheapest, torch.inf).argmin(1, keepdim=True)
    options: list[Tensor] = [at]
    costs: list[Tensor] = []
    slopes: list[Tensor] = []
    for _ in range(L - 1):
        rise = cost - cost.gather(1, at)
        drop = distortion.gather(1, at) - distortion
        gain = torch.where(rise > 0, drop / rise, -1.0)
        slope, best = gain.max(1, keepdim=True)
        moves = slope > 0
        best = torch.where(moves, best, at)
        if not moves.any():
            break
        costs.append(torch.where(moves, rise.gather(1, best), 0.0))
        slopes.append(torch.where(moves, slope, 0.0).minimum(slopes[-1] if slopes else slope))
        options.append(best)
        at = best
    if not costs:
        return Hull(torch.cat(options, 1), cost.new_zeros(N, 0), cost.new_zeros(N, 0))
    return Hull(torch.cat(options, 1), torch.cat(costs, 1), torch.cat(slopes, 1))


def _steps_within(hull: Hull, budget: float) -> Tensor:
    """The number of steps of each item above the lowest common slope whose steps all fit."""
    slope, cost = hull.slope.flatten(), hull.cost.flatten()
    real = slope > 0
    slope, cost, left, lowest = slope[real], cost[real], budget, torch.inf
    # each round settles which side of a middle slope the answer lies on and forgets the other side's steps
    ahead = True
    while len(slope):
        middle = _guess(slope, cost, left, ahead)
        ahead = not ahead
        above = slope > middle
        if not above.any():  # one slope is left: all of it or nothing
            lowest = 0.0 if float(cost.sum(dtype=torch.float64)) <= left else lowest
            break
        steep = cost[above]
        spent = float(steep.sum(dtype=torch.float64))
        if spent <= left:
            left, lowest = left - spent, float(middle)
            below = ~above
            slope, cost = slope[below], cost[below]
        else:
            slope, cost = slope[above], steep
    return (hull.slope > lowest).sum(1)


def _guess(slope: Tensor, cost: Tensor, budget: float, ahead: bool) -> Tensor:
    """A slope a little beyond where the budget ends, by a sample: two such guesses leave a few of a hundred steps."""
    every = 1 + len(slope) // _SAMPLE
    some, order = slope[::every].sort(descending=True)
    spent = cost[::every][order].cumsum(0, dtype=torch.float64) * every
    at = int((spent <= budget).sum()) + (len(some) // 32 if ahead else -len(some) // 32)
    middle = some[max(0, min(at, len(some) - 1))]
    # the steepest slope would leave nothing above it
    return torch.where(middle == slope.max(), slope.min(), middle)


def _fill(hull: Hull, taken: Tensor, left: float) -> Tensor:
    """Spend what is left on the next steps in order of slope, each as long as it fits."""
    S = hull.cost.shape[1]
    taken = taken.clone()
    while S:
        following = taken.clamp(max=S - 1)[:, None]
        slope = hull.slope.gather(1, following).squeeze(1).masked_fill(taken >= S, 0.0)
        cost = hull.cost.gather(1, following).squeeze(1)
        able = (slope > 0) & (cost <= left)
        if not able.any():
            break
        items = able.nonzero().squeeze(1)
        items = items[slope[items].argsort(descending=True)]
        fits = cost[items].cumsum(0, dtype=torch.float64) <= left
        if not fits[0]:
            break
        chosen = items[: int(fits.cumprod(0).sum())]
        taken[chosen] += 1
        left -= float(cost[chosen].sum(dtype=torch.float64))
    return taken


def exact(cost: Tensor, distortion: Tensor, budget: int) -> Tensor:
    """The optimum by dynamic programming over integer costs, int64 [N]: the reference for small instances.

    Raises:
        ValueError: even the cheapest options cost more than the budget.
    """
    N, L = cost.shape
    best = torch.full((budget + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0
    choices = torch.zeros(N, budget + 1, dtype=torch.int64)
    for i in range(N):
        reached = torch.full((L, budget + 1), torch.inf, dtype=torch.float64)
        for option in range(L):
            c = int(cost[i, option])
            if c <= budget:
                reached[option, c:] = best[: budget + 1 - c] + float(distortion[i, option])
        best, choices[i] = reached.min(0)
    if not best.isfinite().any():
        raise ValueError(f"the cheapest options cost more than the budget of {budget}")
    spent, options = int(best.argmin()), torch.zeros(N, dtype=torch.int64)
    for i in reversed(range(N)):
        options[i] = choices[i, spent]
        spent -= int(cost[i, options[i]])
    return options


def water_fill(variance: Tensor, distortion: float) -> tuple[float, Tensor]:
    """Shannon's reverse water-filling for Gaussian components: the level theta and the rates in bits, float64 [N].

    D_i = min(theta, g_i) with sum D_i = ``distortion``; R_i = max(0, 1/2 log2(g_i / theta)).
    """
    g = variance.double()
    low, high = 0.0, float(g.max())
    for _ in range(200):
        theta = (low + high) / 2
        low, high = (low, theta) if float(g.clamp(max=theta).sum()) > distortion else (theta, high)
    return high, (g / high).log2().div(2).clamp(min=0)
