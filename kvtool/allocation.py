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
    left = float(budget) - float(hull.base.sum(dtype=torch.float64))
    if left < 0:
        raise ValueError(f"the cheapest options cost {float(budget) - left:.0f}, the budget is {budget:.0f}")
    within = hull.slope > _common_slope(hull, left)
    left -= float((hull.cost * within).sum(dtype=torch.float64))
    taken = _fill(hull, within.sum(0), left)
    return hull.options.gather(0, taken[None]).squeeze(0)


class Hull:
    """Lower convex hulls of N items with L options, as the segments between options next to each other in cost.

    Options come first, items last: million-long rows compare far sooner than a million short ones.
    Segments of equal slope that follow each other are one step of the hull: the options between them lie above it.
    ``options`` int64 [L, N] in order of cost; ``base`` [N], the cost of the cheapest; ``cost`` and ``slope`` [L-1, N]
    of the segments, slopes falling: inf where a better option costs the same, 0 where nothing is gained any more.
    """

    def __init__(self, options: Tensor, base: Tensor, cost: Tensor, slope: Tensor) -> None:
        self.options, self.base, self.cost, self.slope = options, base, cost, slope

    def vertices(self, item: int) -> list[int]:
        """The options of ``item`` that lie on its hull, the cheapest first."""
        options, slope = self.options[:, item].tolist(), [torch.inf, *self.slope[:, item].tolist(), 0.0]
        return [options[i] for i in range(len(options)) if slope[i] > max(slope[i + 1], 0.0)]


def lower_hull(cost: Tensor, distortion: Tensor) -> Hull:
    """The lower convex hull of each item's (cost, distortion) points [N, L], from its cheapest option on."""
    cost, distortion = cost.float().T.contiguous(), distortion.float().T.contiguous()
    L = len(cost)
    options = torch.arange(L, device=cost.device)[:, None].expand(cost.shape)
    if (cost.diff(dim=0) < 0).any():
        cost, options = cost.sort(dim=0, stable=True)
        distortion = distortion.gather(0, options)
    # between options k and k+1 the hull falls by min over i <= k of max over j > k of the slope from i to j
    slope = torch.full_like(cost[1:], torch.inf)
    for i in range(L - 1):
        steepest = torch.zeros_like(cost[0])
        for j in range(L - 1, i, -1):
            fall = (distortion[i] - distortion[j]) / (cost[j] - cost[i])
            # 0 / 0 is an option twice: no step; a maximum with NaN would be NaN
            steepest = steepest.fmax(fall)
            slope[j - 1] = slope[j - 1].minimum(steepest)
    return Hull(options, cost[0], cost.diff(dim=0), slope)


def _common_slope(hull: Hull, budget: float) -> Tensor | float:
    """The lowest slope such that all segments of greater slope fit the budget together."""
    slope, cost, left = hull.slope.flatten(), hull.cost.flatten(), budget
    lowest: Tensor | float = torch.finfo(slope.dtype).max  # what costs nothing is always taken
    while len(slope):
        least, most = slope.aminmax()
        if least == most:  # all of them or none
            fits = float(cost.sum(dtype=torch.float64)) <= left
            return torch.nextafter(least, torch.zeros_like(least)) if fits and least > 0 else lowest
        low, high = _bracket(slope, cost, left)
        low = least if low == most else low
        above, below = slope > high, slope <= low
        spent = float((cost * above).sum(dtype=torch.float64))
        if spent > left:
            kept = above
        else:
            rest = float((cost * ~below).sum(dtype=torch.float64))
            fits = rest <= left
            lowest, left = (low, left - rest) if fits else (high, left - spent)
            kept = below if fits else ~(above | below)
        slope, cost = slope[kept], cost[kept]
    return lowest


def _bracket(slope: Tensor, cost: Tensor, budget: float) -> tuple[Tensor, Tensor]:
    """A slope a little below and one a little above where the budget ends, by a sample."""
    every = 1 + len(slope) // _SAMPLE
    some, order = slope[::every].sort(descending=True)
    spent = cost[::every][order].cumsum(0, dtype=torch.float64) * every
    last, margin = len(some) - 1, len(some) // 32
    at = min(int((spent <= budget).sum()), last)
    return some[min(at + margin, last)], some[max(0, at - margin)]


def _fill(hull: Hull, taken: Tensor, left: float) -> Tensor:
    """Spend what is left on the next steps in order of slope, each as long as it fits; ``taken`` segments [N]."""
    S, most = len(hull.cost), _SAMPLE
    if not S:
        return taken
    # a step is all segments of its slope: their count and cost, from each segment on
    joined = (hull.slope[1:] == hull.slope[:-1]) & (hull.slope[1:] > 0)
    cost, count = hull.cost.clone(), torch.ones_like(hull.options[1:])
    for k in range(S - 2, -1, -1):
        cost[k] += cost[k + 1] * joined[k]
        count[k] += count[k + 1] * joined[k]
    while True:
        following = taken.clamp(max=S - 1)[None]
        slope, price = hull.slope.gather(0, following)[0], cost.gather(0, following)[0]
        # float64, as the sum below: rounded to float32 a step a little too dear would seem to fit for ever
        able = ((slope > 0) & (taken < S) & (price.double() <= left)).nonzero().squeeze(1)
        if not len(able):
            return taken
        # the steepest of them, more of them each time: sorting all for the few that fit would take longest
        items = able[slope[able].topk(min(most, len(able))).indices]
        most *= 4
        fits = price[items].cumsum(0, dtype=torch.float64) <= left
        chosen = items[: int(fits.cumprod(0).sum())]
        taken[chosen] += count.gather(0, following)[0, chosen]
        left -= float(price[chosen].sum(dtype=torch.float64))


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
