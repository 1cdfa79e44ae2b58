"""Budgets in the units people think in, all turned into one: a share of 16 bits for every value that is compressed.

Metadata is inside the budget: gains, the level of each token and the padding of pages are paid from it.
"""

import math

from kvtool.errors import MethodOptionError
from kvtool.policy import CachePolicy
from kvtool.shapes import CacheShape
from kvtool.units import format_tokens, parse_tokens

# three bits a token and head say its level, whatever is kept
_LEVEL_BYTES = 3 / 8


def parse_share(text: str) -> float:
    """``12.5%`` or ``0.125`` as 0.125.

    Raises:
        ValueError: not a number, or not in (0, 1].
    """
    number = text.strip().removesuffix("%")
    try:
        share = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise ValueError("expected a share of the 16-bit cache above 0 % and up to 100 %, such as 12.5% or 0.125")
    return share


def budget_fraction(
    shape: CacheShape,
    *,
    budget: str | None,
    bits: float | None,
    bytes_per_token: float | None,
    max_gib: float | None,
    at_context: str | None,
) -> float:
    """The share of 16 bits per compressed value that the one budget which is given leaves.

    Raises:
        MethodOptionError: the budget is more than 16 bits a value, or less than the metadata alone.
    """
    layers = [shape.layers[i] for i in shape.compressible]
    full = sum(4 * layer.num_kv_heads * layer.head_dim for layer in layers)  # bytes of a token in 16 bits
    if bits is not None:
        share, what = bits / 16, f"bits {bits:g}"
    elif bytes_per_token is not None:
        share, what = bytes_per_token / full, f"bytes_per_token {bytes_per_token:g}"
    elif max_gib is not None:
        assert at_context is not None
        policy, tokens = CachePolicy(), parse_tokens(at_context)
        exact = min(tokens, policy.sinks + policy.window)
        share = max(0.0, max_gib * 2**30 - exact * full) / (max(1, tokens - exact) * full)
        what = f"max_gib {max_gib:g} at_context {format_tokens(tokens)}"
    else:
        share, what = parse_share(budget or "12.5%"), f"budget {budget}"
    if share > 1:
        raise MethodOptionError(
            f"rdkv {what}: {100 * share:.0f} % of the {full} bytes a token takes in 16 bits, nothing to compress; "
            "ask for at most 100 %, or serve without kvtool"
        )
    least = sum(layer.num_kv_heads * _LEVEL_BYTES for layer in layers) / full
    if share <= least:
        raise MethodOptionError(
            f"rdkv {what}: {100 * share:.3g} % of 16 bits does not pay for the metadata, {100 * least:.2g} %; "
            "ask for more"
        )
    return share
