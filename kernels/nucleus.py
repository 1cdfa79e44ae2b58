"""Which tokens hold a share p of the softmax, by counting in bins of the logit instead of sorting: kvtool/sparse.py.

Logits are in units of log2, and everything of a row is relative to its ``top``, the largest upper estimate. A token is
a candidate if it lies in one of the first bins of its likely logit, and is kept if it lies in one of the first bins of
its exact one. Where a guarantee hangs on what is left out, that is weighed by the upper edges of its bins, and what
lies deeper than the bins by its own mass: the rules are those of ``sparse.select``, or stricter.

    row     | 64 bins of half a unit: all tokens, by likely logit | 128 bins of a quarter: candidates, by exact logit |

Counting is most of the work of a bin. In a long cache every fourth token is counted: it only proposes what to list, for
the rest is weighed anew over all tokens, and p still is p if the proposal left out up to twice as much as it meant to.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvtool.kernels.sketch import FACTS, FLOOR, HALF_LN2, SUMS

LIKELY_BINS, LIKELY_RATE = tl.constexpr(64), tl.constexpr(2.0)  # bins, and bins per unit
EXACT_BINS, EXACT_RATE = tl.constexpr(128), tl.constexpr(4.0)
BINS = tl.constexpr(192)


@triton.jit(do_not_specialize=["splits", "score_splits"])
def weigh(
    ESTIMATES,  # float16 [programs, ROWS, T], in page order
    CODE_SCALES,
    FACTS_IN,  # float32 [programs, ROWS, FACTS]
    SUMS_IN,  # float32 [programs, score_splits, ROWS, SUMS]
    PAGES,  # int32 [B], pages in use
    PLACES,  # int32 [programs, WORDS, T], the bins of four rows a word, in page order
    COUNTS,  # int32 [programs, ROWS, BINS], cleared before
    DEEP,  # float32 [programs, splits, ROWS], mass of the last bin
    splits,
    score_splits,
    used_rows,
    scale_b,
    scale_h,
    scale_p,
    T,
    SCORE_SPLITS: tl.constexpr,  # rounded up to a power of two
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    USED: tl.constexpr,  # rows in use, rounded up to a power of two
    BLOCK: tl.constexpr,  # tokens at a time
    EVERY: tl.constexpr,  # 1 or 4: of so many tokens one is counted
    PDL: tl.constexpr,
):
    """One program: the bins of a share of the tokens, for all rows."""
    program, split = tl.program_id(0), tl.program_id(1)
    b = (program // BLOCKS // H).to(tl.int64)
    h = (program // BLOCKS % H).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tokens = tl.load(PAGES + b) * 64
    WORDS: tl.constexpr = (USED + 3) // 4
    facts, counts, deep = (), (), ()
    for i in tl.static_range(USED):
        mean, variance, top = moments(SUMS_IN, program, i + tl.arange(0, 1), score_splits, tokens, SCORE_SPLITS, ROWS)
        noise = tl.load(FACTS_IN + (program * ROWS + i) * FACTS + 3)
        facts = facts + ((mean, 1 / variance, top, noise),)
        counts = counts + (tl.zeros([LIKELY_BINS], tl.int32),)
        deep = deep + (tl.zeros([BLOCK], tl.float32),)
    estimates = ESTIMATES + program.to(tl.int64) * ROWS * T
    places = PLACES + program.to(tl.int64) * WORDS * T
    scales = CODE_SCALES + b * scale_b + h * scale_h
    for block in tl.range(split, tl.cdiv(tokens, BLOCK), splits, num_stages=3):
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < tokens
        k = tl.load(scales + (at // 64).to(tl.int64) * scale_p + at % 64, mask=inside, other=0.0).to(tl.float32)
        k = k * k
        new_counts, new_deep = (), ()
        word = tl.zeros([BLOCK], tl.int32)
        for i in tl.static_range(USED):
            live = inside & ((program % BLOCKS) * ROWS + i < used_rows)
            y = tl.load(estimates + i * T.to(tl.int64) + at, mask=live, other=0.0).to(tl.float32)
            depth = facts[i][2] - likely(y, k * facts[i][3], facts[i][0], facts[i][1])
            place = tl.where(live, bin_of(depth, LIKELY_RATE, LIKELY_BINS), LIKELY_BINS - 1)
            weight = tl.where((place == LIKELY_BINS - 1) & live, tl.exp2(-depth), 0.0)
            new_deep = new_deep + (deep[i] + weight,)
            counted = place
            if EVERY == 4:
                counted, _ = tl.split(place.reshape(BLOCK // 2, 2))
                counted, _ = tl.split(counted.reshape(BLOCK // 4, 2))
            new_counts = new_counts + (counts[i] + tl.histogram(counted, LIKELY_BINS),)
            word = word | (place << (8 * (i % 4)))
            if i % 4 == 3 or i == USED - 1:
                tl.store(places + (i // 4) * T.to(tl.int64) + at, word, mask=inside)
                word = tl.zeros([BLOCK], tl.int32)
        counts, deep = new_counts, new_deep
    for i in tl.static_range(USED):
        to = COUNTS + (program * ROWS + i) * BINS + tl.arange(0, LIKELY_BINS)
        tl.atomic_add(to, counts[i], mask=counts[i] > 0, sem="relaxed")
        tl.store(DEEP + (program * splits + split) * ROWS + i, tl.sum(deep[i], 0))


@triton.jit
def moments(SUMS_IN, program, rows, splits, tokens, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """Mean, variance and top of the estimates of ``rows`` [R]."""
    s = tl.arange(0, SPLITS)
    at = SUMS_IN + ((program * splits + s)[None, :] * ROWS + rows[:, None]) * SUMS
    seen = (s < splits)[None, :] & (rows < ROWS)[:, None]
    count = tl.maximum(tokens, 1).to(tl.float32)
    mean = tl.sum(tl.load(at, mask=seen, other=0.0), 1) / count
    square = tl.sum(tl.load(at + 1, mask=seen, other=0.0), 1) / count
    top = tl.max(tl.load(at + 2, mask=seen, other=FLOOR), 1)
    return mean, tl.maximum(square - mean * mean, 1e-30), top


@triton.jit
def likely(y, variance, mean, inverse):
    """An upper estimate of log2 E[2^logit] given estimates ``y`` of ``variance``, as ``sparse.likely_logits``.

    mean, inverse: of all estimates, their mean and one over their variance.
    """
    rho = tl.maximum(1 - variance * inverse, 0.0)
    raised = y + HALF_LN2 * variance
    return tl.maximum(mean + rho * (raised - mean), raised)


@triton.jit
def bin_of(depth, RATE: tl.constexpr, COUNT: tl.constexpr):
    """The bin of logits that lie ``depth`` below the top; the first and the last are open."""
    return tl.minimum(tl.maximum(depth * RATE, 0.0), COUNT - 1.0).to(tl.int32)


@triton.jit
def candidate_bins(counts, deep, live, share):
    """The last bin of candidates of rows [R], which hold ``share`` of what is likely; -1 for rows not ``live``."""
    j = tl.arange(0, LIKELY_BINS)[None, :]
    # by the middle of a bin: what this leaves out is weighed afterwards
    mass = tl.where(j < LIKELY_BINS - 1, counts * tl.exp2(-(j + 0.5) / LIKELY_RATE), deep[:, None])
    allowed = tl.where(share < 1, (1 - share) * tl.sum(mass, 1), -1.0)
    heavy = tl.cumsum(mass, 1, reverse=True) > allowed[:, None]
    return tl.where(live, tl.sum(heavy.to(tl.int32), 1) - 1, -1)


@triton.jit
def admitted_bins(counts, deep, allowed):
    """The last bin of rows [R] that it takes for the rest to weigh at most ``allowed`` [R]."""
    j = tl.arange(0, LIKELY_BINS)[None, :]
    # the first bin has no upper edge, and is never part of the rest
    mass = tl.where(j < LIKELY_BINS - 1, counts * tl.exp2(-j / LIKELY_RATE), deep[:, None])
    heavy = tl.cumsum(mass, 1, reverse=True) > allowed[:, None]
    return tl.maximum(tl.sum(heavy.to(tl.int32), 1) - 1, 0)


@triton.jit
def likely_counts(
    COUNTS, DEEP, program, rows, live, splits, SPLITS: tl.constexpr, ROWS: tl.constexpr, EVERY: tl.constexpr
):
    """Tokens in each bin of ``rows`` [R, LIKELY_BINS], float32, and the mass of the last one, [R]."""
    j, s = tl.arange(0, LIKELY_BINS), tl.arange(0, SPLITS)
    at = COUNTS + (program * ROWS + rows)[:, None] * BINS + j[None, :]
    counts = tl.load(at, mask=live[:, None] & (j >= 0)[None, :], other=0)
    at = DEEP + (program * splits + s)[None, :] * ROWS + rows[:, None]
    deep = tl.sum(tl.load(at, mask=live[:, None] & (s < splits)[None, :], other=0.0), 1)
    return counts.to(tl.float32) * EVERY, deep


@triton.jit
def upper_mass(place):
    """The mass of the upper edge of a bin of likely logits, 2^(-place/2); 6 % more for odd ones."""
    return (0x3F800000 - (place << 22)).to(tl.float32, bitcast=True)


@triton.jit
def kept_bins(COUNTS, program, rows, live, found, deep, rest, p, ROWS: tl.constexpr):
    """The last bin of exact logits of ``rows`` [R] that is kept, so that at least ``p`` of found + 2 rest is.

    found, deep: mass of the candidates, and of those in the last bin. rest: of what is no candidate, at most.
    """
    j = tl.arange(0, EXACT_BINS)
    at = COUNTS + (program * ROWS + rows)[:, None] * BINS + LIKELY_BINS + j[None, :]
    counts = tl.load(at, mask=live[:, None] & (j >= 0)[None, :], other=0).to(tl.float32)
    mass = counts * tl.exp2(-j / EXACT_RATE)[None, :]
    mass = tl.where(j[None, :] < EXACT_BINS - 1, mass, deep[:, None])
    # the first bin has no upper edge: it always stays
    mass = tl.where(j[None, :] == 0, found[:, None], mass)
    budget = tl.where(p < 1, found - p * (found + 2 * rest), -1.0)
    heavy = tl.cumsum(mass, 1, reverse=True) > budget[:, None]
    return tl.where(found > 0, tl.maximum(tl.sum(heavy.to(tl.int32), 1) - 1, 0), EXACT_BINS - 1)
