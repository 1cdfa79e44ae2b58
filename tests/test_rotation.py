"""Rotations keep lengths and spread every vector, the worst ones included."""

import math

import pytest
import torch

from kvtool import codebooks, rotation

DIMS = [32, 64, 80, 96, 100, 112, 128, 256]


def make(kind, dim, heads=3, seed=0):
    return rotation.draw(kind, heads, dim, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["hadamard", "haar"])
@pytest.mark.parametrize("dim", [1, 2, 3, 7, *DIMS])
def test_matrix_is_orthogonal(kind, dim):
    pi = rotation.matrix(make(kind, dim))
    # float32 products of up to 256 terms of size 1/16
    torch.testing.assert_close(pi @ pi.mT, torch.eye(dim).expand(3, dim, dim), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["hadamard", "haar"])
def test_stored_form_is_what_the_schema_says_and_heads_differ(kind):
    for dim in DIMS:
        drawn = make(kind, dim)
        assert rotation.spec(kind, 3, dim).mismatch(drawn) is None
        assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("kind", ["hadamard", "haar"])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_unrotate_undoes_rotate(kind, dim):
    x = torch.randn(2, 3, 63, dim, generator=torch.Generator().manual_seed(1))
    drawn = make(kind, dim)
    torch.testing.assert_close(rotation.unrotate(rotation.rotate(x, drawn), drawn), x, atol=1e-5, rtol=1e-5)


def test_haar_is_uniform_not_merely_orthogonal():
    """Without the sign fix of QR the first entry would always be negative; its square has mean 1/d."""
    drawn = make("haar", 8, heads=4000)
    first = drawn[:, 0, 0]
    # standard error of the mean is 1/sqrt(8 * 4000) = 0.0056; of the mean square 0.0026 (variance 2(d-1)/(d^2 (d+2)))
    assert abs(float(first.mean())) < 4 * 0.0056
    assert abs(float(first.square().mean()) - 1 / 8) < 4 * 0.0026


def worst_cases(dim):
    alternating = torch.ones(dim)
    alternating[1::2] = -1
    cases = {"constant": torch.ones(dim), "alternating": alternating}
    return cases | {f"e_{i}": torch.eye(dim)[i] for i in {0, dim // 2, dim - 1}}


@pytest.mark.parametrize("kind", ["hadamard", "haar"])
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128])
def test_worst_inputs_are_quantised_as_well_as_random_ones(kind, dim):
    """One round of Hadamard leaves e_1 at 2.2 times the error at 2 bits: all its coordinates have one size."""
    heads = 400 if kind == "hadamard" else 100
    pi = rotation.matrix(make(kind, dim, heads))
    book = codebooks.sphere_codebook(dim, 2)
    for name, x in worst_cases(dim).items():
        y = pi @ (x / x.norm()) * math.sqrt(dim)  # [heads, dim]
        codes = codebooks.nearest(y, book.levels, book.step)
        error = float((y - book.levels.float()[codes.int()] * book.step).square().mean())
        # errors of single vectors spread by about 20 %, so these means by 1 to 2 %
        assert error == pytest.approx(book.mse, rel=0.05), name
