"""Which levels a layer could have: what each pair of widths costs and leaves, and the three that serve a rate best."""

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvtool import centring, scores
from kvtool.allocation import allocate, lower_hull
from kvtool.packing import GROUP, PAGE
from kvtool.rdkv.fit import thin
from kvtool.rdkv.spending import in_order, page_sums
from kvtool.transform import code as chain
from kvtool.transform import fit as fitting
from kvtool.transform import ladder, waterfill
from kvtool.transform.fit import Statistics

if TYPE_CHECKING:
    from kvtool.transform.scenes import Scene

_TOTALS = (1, 2, 3, 4, 5, 6, 8, 10, 12)  # widths of a side, summed
_POINTS = 10  # of the hull that levels are chosen from


class Point(NamedTuple):
    """A level that might be: widths of keys and values, bits a token, distortion."""

    widths: tuple[tuple[int, ...], tuple[int, ...]]
    cost: float
    distortion: float


def points_of(scenes: "Sequence[Scene]", statistics: Statistics, plain: dict[str, Tensor]) -> tuple[list[Point], str]:
    """Pairs of widths on the lower hull, eviction not among them; and the kind of basis of the values."""
    kinds = {"transform": fitting.basis(statistics.values, statistics.outputs)}
    kinds["rotation"] = fitting.plain_basis(plain["value"])
    keys = _curve(scenes, statistics, "key", fitting.basis(statistics.keys, statistics.queries))
    curves = {kind: _curve(scenes, statistics, "value", basis) for kind, basis in kinds.items()}
    kind = min(curves, key=lambda kind: sum(p.distortion for p in curves[kind][: len(_TOTALS) // 2]))
    pairs = [
        Point((k.widths[0], v.widths[0]), k.cost + v.cost, k.distortion + v.distortion)
        for k in keys
        for v in curves[kind]
    ]
    hull = lower_hull(torch.tensor([[p.cost for p in pairs]]), torch.tensor([[p.distortion for p in pairs]]))
    found = [pairs[i] for i in hull.vertices(0)]
    costs = [cost for (cost,), _ in thin([((p.cost,), p.distortion) for p in found], _POINTS)]
    return [p for p in found if p.cost in costs], kind


def _curve(scenes: "Sequence[Scene]", statistics: Statistics, side: str, basis: tuple[Tensor, Tensor]) -> list[Point]:
    """What each total width of one side costs and leaves."""
    codes = [waterfill.spend(basis[1], total, ladder.STAGES) for total in _TOTALS]
    noise, weight = [0.0] * len(codes), 0.0
    for scene in scenes:
        sample, seen, first = scene.sample, scene.seen, slice(centring.SINKS, scene.cut)
        x = fitting.vectors(side, sample, statistics)[:, first]
        p = seen.weights[..., first].square()
        worths = p * scores.apart(seen.out, sample.values[:, first].float())
        weight += float(worths.sum())
        for i, own in enumerate(codes):
            code = fitting.make_code(*basis, own, x[:, ::4])
            rest = x - chain.features(chain.encode(x, code), code) @ chain.decoder(code)
            if side == "key":
                noise[i] += float((seen.queries @ rest.mT * sample.shape.scale).square_().mul_(worths).sum())
            else:
                noise[i] += float((p.sum(1) * rest.square().sum(-1)).sum())
    return [
        Point((own, ()), float(GROUP * sum(own) + waterfill.GAIN_BITS * len(own)), lost / weight)
        for own, lost in zip(codes, noise, strict=True)
    ]


def levels_at(
    worths: Sequence[Tensor], points: list[Point], price: float, costs: Sequence[float]
) -> list[tuple[int, ...]]:
    """The three of ``points`` that leave least at each of ``costs``, by the dual: max_l min (distortion + l cost)."""
    pages = [_pages(w, points, price) for w in worths]
    cost, distortion = pages[0][0][0], torch.cat([d for _, d in pages])  # [L], [pages, L]
    tokens = sum(w.numel() for w in worths)
    slopes = distortion.max() / cost.max() * torch.logspace(0.5, -9, 40)
    bound = distortion + slopes[:, None, None] * cost  # [slopes, pages, L]
    sets = list(combinations(range(len(points)), min(ladder.LEVELS - 1, len(points))))
    least = torch.stack([bound[..., [0, *(i + 1 for i in some)]].amin(-1).sum(-1) for some in sets])  # [sets, slopes]
    spent = torch.tensor([max(0.0, c - ladder.PLANES) * tokens for c in costs])
    dual = (least[..., None] - slopes[:, None] * spent).amax(1)  # [sets, costs]
    return [sets[i] for i in dual.argmin(0).tolist()]


def _pages(w: Tensor, points: list[Point], price: float) -> tuple[Tensor, Tensor]:
    """Cost and distortion [pages, levels], eviction first, of a prompt whose tokens are worth ``w`` [H, N]."""
    sums = page_sums(w.sort(-1, descending=True).values[None]).flatten()
    distortion = sums[:, None] * torch.tensor([price, *(p.distortion for p in points)])
    costs = torch.tensor([0.0, *(PAGE * p.cost + 8 for p in points)])
    return costs.expand(distortion.shape), distortion


def plan(w: Tensor, points: list[Point], price: float, cost: float) -> Tensor:
    """The level of each token, [H, N]."""
    costs, distortion = _pages(w, points, price)
    chosen = allocate(costs, distortion, max(0.0, cost - ladder.PLANES) * w.numel())
    return in_order(chosen.reshape(1, len(w), -1), w[None])[0]


def basis_of(side: str, statistics: Statistics, kind: str, plain: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """W and the variances of its coefficients, of a side whose basis is of ``kind``."""
    if side == "key":
        return fitting.basis(statistics.keys, statistics.queries)
    return (
        fitting.basis(statistics.values, statistics.outputs)
        if kind == "transform"
        else fitting.plain_basis(plain[side])
    )
