"""Lloyd-Max codebooks: the scalar quantiser of least mean squared error for a known density (Max 1960, Lloyd 1982).

Every density is that of a coordinate with unit variance, symmetric, given as weighted points on x > 0: a fine grid for
N(0,1) and for the sphere, a histogram for captured data. A coordinate of a uniform unit vector in R^d, times sqrt(d),
has density proportional to (1 - x^2/d)^((d-3)/2), which tends to N(0,1).

Kernels keep levels in bytes, so the levels in an artifact are small integers: a level stands for step * integer. Those
of 4 bits are odd, 2u - 127 with u in 0..127, because a kernel looks up the unsigned u. At 8 bits the code is the level:
uniform, code - 127.5, as float16.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtool.shapes import TensorSpec

Array = NDArray[np.floating]


class Density(NamedTuple):
    """The density of |x|: weighted points, ascending, weights summing to 1."""

    points: Array
    weights: Array


class Codebook(NamedTuple):
    """Levels on an integer grid.

    levels: int8 [2^bits] (float16 at 8 bits), ascending; code i stands for step * levels[i].
    mse: expected squared error on the density it was made for, in units of the coordinate's variance.
    """

    levels: Tensor
    step: float
    mse: float


def gaussian() -> Density:
    """|N(0,1)|."""
    points = _midpoints(12.0)
    return _normalised(points, np.exp(-(points**2) / 2))


def sphere(dim: int) -> Density:
    """sqrt(dim) times |coordinate| of a uniform unit vector in R^dim, dim >= 2."""
    points = _midpoints(min(dim**0.5, 12.0))
    return _normalised(points, np.exp((dim - 3) / 2 * np.log1p(-(points**2) / dim)))


def histogram(counts: Array, width: float) -> Density:
    """Captured |x|: ``counts[i]`` of them in [i*width, (i+1)*width)."""
    return _normalised((np.arange(len(counts)) + 0.5) * width, counts)


def _midpoints(upper: float, count: int = 1 << 19) -> Array:
    return (np.arange(count) + 0.5) * (upper / count)


def _normalised(points: Array, weights: Array) -> Density:
    return Density(points, (weights / weights.sum()).astype(np.float64))


def lloyd_max(density: Density, bits: int) -> Array:
    """The positive half of the 2^bits optimal levels, ascending: each is the mean of its cell."""
    count = 1 << (bits - 1)
    inner = (density.points[1:] + density.points[:-1]) / 2
    edges = np.concatenate([[0.0], inner, [2 * density.points[-1] - inner[-1]]])
    mass = np.concatenate([[0.0], np.cumsum(density.weights)])
    moment = np.concatenate([[0.0], np.cumsum(density.weights * density.points)])
    # Panter and Dite: at high rate the levels are spread like the cube root of the density
    spread = np.cumsum(np.cbrt(density.weights))
    levels = np.interp((np.arange(count) + 0.5) / count * spread[-1], spread, density.points)
    for _ in range(20_000):
        cells = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, edges[-1:]])
        # interpolated: a boundary that can only sit on grid points stalls before the optimum
        inside = np.diff(np.interp(cells, edges, mass))
        means = np.divide(np.diff(np.interp(cells, edges, moment)), inside, out=levels.copy(), where=inside > 0)
        change = np.abs(means - levels).max()
        levels = means
        if change < 1e-9:
            break
    return levels


def distortion(density: Density, levels: Array) -> float:
    """Mean squared error of the nearest of ``levels`` (positive half, mirrored)."""
    return _distortion(density, _moments(density), levels)


def _moments(density: Density) -> Array:
    """Sums of weight, weight * x and weight * x^2 over the first n points, [3, points + 1]."""
    powers = density.weights * density.points ** np.arange(3)[:, None]
    return np.pad(powers.cumsum(1), ((0, 0), (1, 0)))


def _distortion(density: Density, moments: Array, levels: Array) -> float:
    # by cells, not by points: grids are searched for the least of a hundred of these
    cuts = np.searchsorted(density.points, (levels[1:] + levels[:-1]) / 2, side="right")
    mass, first, second = np.diff(moments[:, np.concatenate([[0], cuts, [len(density.points)]])])
    return float((second - 2 * levels * first + levels**2 * mass).sum())


def on_grid(density: Density, levels: Array) -> tuple[NDArray[np.int8], float]:
    """Integer codes and the step that bring ``levels`` (positive half) nearest on the kernels' grid.

    Tried: every largest code from 64 to 127; kept: the least distortion.
    """
    if len(levels) == 1:
        return np.array([1], np.int8), float(levels[0])
    odd = len(levels) == 8
    best = (np.inf, np.array([], np.int8), 0.0)
    moments = _moments(density)
    for top in range(65, 128, 2 if odd else 1):
        step = levels[-1] / top
        codes = 2 * np.floor(levels / step / 2) + 1 if odd else np.rint(levels / step)
        error = _distortion(density, moments, codes * step)
        best = min(best, (error, codes.astype(np.int8), float(step)), key=lambda b: b[0])
    return best[1], best[2]


def codebook(density: Density, bits: int) -> Codebook:
    """The codebook of 2^bits levels on the grid: Lloyd-Max to 4 bits, uniform at 8."""
    if bits == 8:
        return _uniform(density)
    codes, step = on_grid(density, lloyd_max(density, bits))
    levels = np.concatenate([-codes[::-1], codes])
    return Codebook(torch.from_numpy(levels), step, distortion(density, codes * step))


def _uniform(density: Density) -> Codebook:
    half = np.arange(128) + 0.5
    steps = np.geomspace(1 / 128, 12 / 128, 100)
    moments = _moments(density)
    step = float(min(steps, key=lambda step: _distortion(density, moments, half * step)))
    return Codebook(torch.arange(256).half() - 127.5, step, distortion(density, half * step))


@lru_cache(maxsize=64)
def sphere_codebook(dim: int, bits: int) -> Codebook:
    """The data-free codebook for unit vectors in R^dim, in units of 1/sqrt(dim)."""
    return codebook(sphere(dim), bits)


def spec(bits: int) -> TensorSpec:
    """What the artifact stores as the levels of 2^bits codes."""
    return TensorSpec("float16" if bits == 8 else "int8", (2**bits,))


def nearest(x: Tensor, levels: Tensor, step: Tensor | float) -> Tensor:
    """Codes uint8 of the level nearest to each entry of ``x``: how many of the boundaries lie below it."""
    x = x / step
    if len(levels) == 256:  # code - 127.5: the boundaries are the whole numbers
        return x.ceil_().add_(127).clamp_(0, 255).to(torch.uint8)
    table = levels.float()
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    # a bisection that cannot be vectorised is slower than fifteen comparisons that are
    for boundary in (table[1:] + table[:-1]) / 2:
        codes += x > boundary
    return codes


def look_up(levels: Tensor, codes: Tensor) -> Tensor:
    """``levels`` [n] at ``codes`` uint8 [...], float32; a selection of rows is four times as fast as indexing."""
    return levels.float().index_select(0, codes.int().flatten()).view(codes.shape)
