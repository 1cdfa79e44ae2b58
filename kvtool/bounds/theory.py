"""The exact law of RaBitQ's error, from https://arxiv.org/abs/2405.12497, lemma B.3 and theorem 3.2.

For unit o, q with cosine c, a code at cosine a = <obar, o>, and a uniform rotation of R^D,

    estimate - c = sqrt(1 - c^2) * sqrt(1 - a^2) / a * X,     X one coordinate of a uniform unit vector in R^(D-1),

X independent of a. The paper's bound, epsilon * sqrt(1 - a^2) / a / sqrt(D - 1), is therefore exceeded with probability
P(|X| > epsilon / sqrt((D - 1) (1 - c^2))): a two-sided interval, at most that at c = 0 and less for any other pair.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]


def violation(epsilon: float, cosine: Array | float, dim: int) -> Array:
    """P(error > bound) for pairs at ``cosine``, in R^``dim``."""
    # X^2 ~ Beta(1/2, (D - 2)/2); at |c| = 1 there is no error
    room = np.maximum((dim - 1) * (1 - np.square(np.asarray(cosine, dtype=np.float64))), 1e-12)
    return np.asarray(special.betaincc(0.5, (dim - 2) / 2, np.minimum(1.0, epsilon**2 / room)))


def worst_violation(epsilon: float, dim: int) -> float:
    """The largest probability over all pairs: that of orthogonal ones."""
    return float(violation(epsilon, 0.0, dim))


def epsilon_for(delta: float, dim: int) -> float:
    """The epsilon whose worst probability of violation is ``delta``."""
    return math.sqrt((dim - 1) * float(special.betainccinv(0.5, (dim - 2) / 2, delta)))


def expected_cosine(dim: int) -> float:
    """E<obar, o> of 1-bit codes."""
    log_ratio = math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2)
    return math.sqrt(dim / math.pi) * 2 / (dim - 1) * math.exp(log_ratio)
