"""Codebooks are Lloyd-Max, to the digits that are published, and lose next to nothing on the kernels' grid."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from kvtool import codebooks

# Max 1960, table I, for N(0,1): error and positive levels
GAUSSIAN = {
    1: (0.363380, [0.79788]),
    2: (0.117482, [0.45278, 1.51042]),
    3: (0.034548, [0.24509, 0.75601, 1.34391, 2.15195]),
    4: (0.009501, [0.12840, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259]),
}
# for sqrt(d) times a coordinate of a uniform unit vector, double precision: d, bits, error, last level
SPHERE = [
    (32, 2, 0.111600, 1.48956),
    (32, 3, 0.032261, 2.07193),
    (32, 4, 0.008774, 2.56498),
    (64, 1, 0.358387, 0.80101),
    (64, 2, 0.114526, 1.49997),
    (64, 3, 0.033391, 2.11131),
    (64, 4, 0.009132, 2.64637),
    (96, 2, 0.115508, 1.50345),
    (96, 3, 0.033773, 2.12472),
    (96, 4, 0.009253, 2.67456),
    (128, 1, 0.360889, 0.79944),
    (128, 2, 0.116000, 1.50519),
    (128, 3, 0.033966, 2.13147),
    (128, 4, 0.009315, 2.68886),
    (256, 2, 0.116740, 1.50780),
    (256, 3, 0.034256, 2.14167),
    (256, 4, 0.009408, 2.71057),
]


@pytest.mark.parametrize("bits", GAUSSIAN)
def test_gaussian_levels_are_those_of_max(bits):
    error, levels = GAUSSIAN[bits]
    found = codebooks.lloyd_max(codebooks.gaussian(), bits)
    assert found == pytest.approx(levels, abs=1e-4)
    assert codebooks.distortion(codebooks.gaussian(), found) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(("dim", "bits", "error", "last"), SPHERE)
def test_sphere_levels_are_exact(dim, bits, error, last):
    found = codebooks.lloyd_max(codebooks.sphere(dim), bits)
    assert found[-1] == pytest.approx(last, abs=1e-4)
    assert codebooks.distortion(codebooks.sphere(dim), found) == pytest.approx(error, rel=2e-4)


@pytest.mark.parametrize("dim", [3, 32, 80, 128])
def test_every_level_is_the_mean_of_its_cell_by_independent_integrals(dim):
    levels = codebooks.lloyd_max(codebooks.sphere(dim), 3) / math.sqrt(dim)
    edges = [0.0, *((levels[1:] + levels[:-1]) / 2), 1.0]

    def density(x):
        return (1 - x * x) ** ((dim - 3) / 2)

    for low, high, level in zip(edges, edges[1:], levels, strict=False):
        moment = integrate.quad(lambda x: x * density(x), low, high)[0]
        mass = integrate.quad(density, low, high)[0]
        assert moment / mass == pytest.approx(level, abs=1e-5)


def test_sphere_density_is_a_beta_law():
    """x^2 of a unit vector's coordinate is Beta(1/2, (d-1)/2)."""
    points, weights = codebooks.sphere(48)
    for x in (0.3, 1.0, 2.5):
        found = weights[points <= x].sum()
        assert found == pytest.approx(special.betainc(0.5, 47 / 2, x * x / 48), abs=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_any_number_of_bits_has_levels_that_cost_a_quarter_each(bits):
    density = codebooks.gaussian()
    levels = codebooks.lloyd_max(density, bits)
    assert len(levels) == 2 ** (bits - 1)
    assert (np.diff(levels) > 0).all()
    # theorem 1 of arXiv 2504.19874 from above, Shannon from below
    assert 4.0**-bits < codebooks.distortion(density, levels) < math.sqrt(3) * math.pi / 2 * 4.0**-bits


def test_a_histogram_is_fitted_like_its_density():
    samples = np.abs(stats.laplace.rvs(scale=1 / math.sqrt(2), size=400_000, random_state=0))
    counts = np.bincount((samples * 256).astype(int)).astype(float)
    found = codebooks.lloyd_max(codebooks.histogram(counts, 1 / 256), 2)
    # Lloyd-Max for a Laplacian of variance 1, 2 bits (Adams and Giesler 1978); 400k samples give three digits
    assert found == pytest.approx([0.4198, 1.8340], abs=0.015)


@pytest.mark.parametrize("dim", [32, 48, 64, 96, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_grid_costs_less_than_half_a_per_cent(dim, bits):
    density = codebooks.sphere(dim)
    free = codebooks.distortion(density, codebooks.lloyd_max(density, bits))
    book = codebooks.sphere_codebook(dim, bits)
    assert free * (1 - 1e-6) <= book.mse < free * 1.005
    assert codebooks.spec(bits).mismatch(book.levels) is None
    assert torch.equal(book.levels, -book.levels.flip(0))
    assert (book.levels[1:].int() > book.levels[:-1].int()).all()
    if bits == 4:
        assert (book.levels.int() % 2 == 1).all()  # 2u - 127


def test_eight_bits_are_uniform():
    book = codebooks.sphere_codebook(64, 8)
    assert codebooks.spec(8).mismatch(book.levels) is None
    assert torch.equal(book.levels.float(), torch.arange(256) - 127.5)
    # step^2 / 12 and a little overload
    assert book.step**2 / 12 < book.mse < 1.2 * book.step**2 / 12
    assert book.mse < 1e-4


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_nearest_is_nearest(bits):
    book = codebooks.sphere_codebook(64, bits)
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 2
    levels = book.levels.float() * book.step
    distances = (x[:, None] - levels).abs()
    chosen = distances.gather(1, codebooks.nearest(x, book.levels, book.step).long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.min(1).values, atol=1e-6, rtol=0)
