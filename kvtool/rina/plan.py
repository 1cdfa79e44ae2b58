"""Which stages, sub-spaces and extra keys of RINA cost at most so many bits, and leave the least error.

The error is that of Gaussian numbers after J stages over sub-spaces of s channels, keys and values added up. Keys that
get one more stage are the noisiest, so counting them as average ones is cautious.
"""

from functools import lru_cache
from itertools import product
from math import gcd
from typing import NamedTuple

from kvtool import packing
from kvtool.errors import MethodOptionError

SUBSPACES = (16, 32, 64)
STAGES = 4  # at most; -o k_stages goes further
EXTRA = 32

# mean squared error of N(0, 1) by subspace, after 1 to 5 stages with levels in 4 bits; tests/methods/test_rina.py
# measures it again
LEFT = {
    16: (0.3425, 0.1148, 0.0474, 0.0230, 0.0136),
    32: (0.3534, 0.1232, 0.0531, 0.0277, 0.0178),
    64: (0.3595, 0.1273, 0.0560, 0.0302, 0.0201),
}


class Plan(NamedTuple):
    """Options of RINA with the names they have there."""

    k_stages: int
    v_stages: int
    subspace: int
    extra: int


def bits(plan: Plan, head_dim: int) -> float:
    """Stored bits per value of the compressed tokens, keys and values together, everything counted."""
    spaces = head_dim // gcd(head_dim, plan.subspace)
    page = 8 * packing.page_bytes([1] * packing.groups(head_dim))  # bits of one stage of a page
    levels = 4 * packing.PAGE * spaces
    stages = (plan.k_stages + plan.v_stages) * (page + levels)
    norms = 2 * 8 * packing.PAGE
    extra = plan.extra * 8 * (1 + -(-head_dim // 8) + spaces)
    return (stages + norms + extra) / (2 * packing.PAGE * head_dim)


@lru_cache(maxsize=64)
def choose(target: float, head_dim: int) -> Plan:
    """The plan of at most ``target`` bits that leaves the least error; of equal ones the cheapest.

    Raises:
        MethodOptionError: nothing costs so little.
    """
    plans = [Plan(*one) for one in product(range(1, STAGES + 1), range(1, STAGES + 1), SUBSPACES, range(EXTRA + 1))]
    least = min(bits(plan, head_dim) for plan in plans)
    if least > target:
        raise MethodOptionError(
            f"rina target_bits={target:g}: expected at least {least:.4g} bits for heads of {head_dim} channels, "
            "one stage with its norms and levels; ask for more"
        )
    fitting = [plan for plan in plans if bits(plan, head_dim) <= target]
    return min(fitting, key=lambda plan: (predicted(plan), bits(plan, head_dim)))


def predicted(plan: Plan) -> float:
    """Mean squared error of Gaussian keys plus that of values."""
    after = LEFT[plan.subspace]
    share = plan.extra / packing.PAGE
    keys = (1 - share) * after[plan.k_stages - 1] + share * after[plan.k_stages]
    return keys + after[plan.v_stages - 1]
