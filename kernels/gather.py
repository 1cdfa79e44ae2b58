"""Exact attention over a few tokens found by index: candidates' keys first, then the values of what is kept.

A program is ROWS queries of a KV head and a share of its tokens, block by block in turn, so that neighbours, which tend
to be read together, are spread over programs. It lists what any of its queries needs, reads each such row once, and
every query weighs its own set. A key that one query of a group had read is exact for all of them.

``rescore`` runs twice. First it lists the candidates, and finds their exact logits. Now their mass is known, which
noise had made look larger: then it lists what else it takes for the rest to be light enough, often twice as many.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvtool.kernels.nucleus import (
    BINS,
    EXACT_BINS,
    EXACT_RATE,
    LIKELY_BINS,
    admitted_bins,
    bin_of,
    candidate_bins,
    kept_bins,
    likely_counts,
    moments,
    upper_mass,
)
from kvtool.kernels.sketch import FLOOR

WEIGHTS = tl.constexpr(4)  # of a row's share: mass of what is listed, of the rest, of the last exact bin; largest logit
CUTS = tl.constexpr(4)  # of a row: last bins of candidates, of those admitted later and of kept; top


@triton.jit(do_not_specialize=["splits", "score_splits", "count_splits"])
def rescore(
    QUERIES,  # [B, HQ, S, D]
    KEYS,  # [B, H, T, D]
    PLACES,  # as nucleus.weigh leaves them
    SUMS_IN,
    PAGES,
    COUNTS,
    DEEP,  # float32 [programs, count_splits, ROWS]
    LISTS,  # int32 [programs, splits, room], tokens
    LOGITS,  # float32 [programs, splits, ROWS, room], of the tokens listed
    NUMBER,  # int32 [2, programs, splits], listed after the first and after the second time
    WEIGHT,  # float32 [2, programs, splits, ROWS, WEIGHTS], likewise
    CUT,  # float32 [programs, ROWS, CUTS]
    splits,
    score_splits,
    count_splits,
    used_rows,
    query_b,
    query_h,
    query_s,
    key_b,
    key_h,
    key_t,
    T,
    room,
    factor,  # softmax scale * log2 e
    softcap,
    share,
    AGAIN: tl.constexpr,  # whether this is the second time
    SPLITS: tl.constexpr,
    SCORE_SPLITS: tl.constexpr,
    COUNT_SPLITS: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    USED: tl.constexpr,  # rows in use, rounded up to a power of two
    BLOCK: tl.constexpr,  # tokens looked at at a time
    EVERY: tl.constexpr,  # of so many tokens one was counted
    TILE: tl.constexpr,  # keys read at a time
    D: tl.constexpr,
    DIMS: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,  # whether queries and keys have to be multiplied in float32
    PDL: tl.constexpr,
):
    """Lists tokens and computes their exact logits."""
    program, split = tl.program_id(0), tl.program_id(1)
    b = (program // BLOCKS // H).to(tl.int64)
    h = (program // BLOCKS % H).to(tl.int64)
    r = tl.arange(0, USED)
    live = ((program % BLOCKS) * ROWS + r) < used_rows
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tokens = tl.load(PAGES + b) * 64
    _, _, top = moments(SUMS_IN, program, r, score_splits, tokens, SCORE_SPLITS, ROWS)
    counts, lowest = likely_counts(COUNTS, DEEP, program, r, live, count_splits, COUNT_SPLITS, ROWS, EVERY)
    last = candidate_bins(counts, lowest, live, share)
    before = tl.full([USED], -1, tl.int32)
    found, deep = tl.zeros([USED], tl.float32), tl.zeros([USED], tl.float32)
    largest = tl.full([USED], FLOOR, tl.float32)
    blocks = tl.cdiv(tokens, BLOCK)
    share_at = program * splits + split
    programs = tl.num_programs(0)
    n = 0
    known = tl.zeros([USED], tl.float32)
    if AGAIN:
        before = last
        weights = WEIGHT + (share_at * ROWS + r) * WEIGHTS
        found, deep = tl.load(weights), tl.load(weights + 2)
        largest = tl.load(weights + 3)
        n = tl.load(NUMBER + share_at)
        heavy, rest, _, _ = weights_of(WEIGHT, program, r, live, splits, SPLITS, ROWS)
        allowed = heavy * (1 - share) / share
        lacking = live & (rest > allowed)
        last = tl.where(lacking, admitted_bins(counts, lowest, allowed), -1)
        if tl.max(lacking.to(tl.int32), 0) == 0:
            blocks = 0
            known = tl.load(weights + 1)
        if split == 0:
            to = CUT + (program * ROWS + r) * CUTS
            tl.store(to, before.to(tl.float32), mask=live)
            tl.store(to + 1, last.to(tl.float32), mask=live)
            tl.store(to + 3, top, mask=live)
    # of the deepest bin the mass is known, all of it counts as the first program's
    deepest = tl.where((split == 0) & (tl.maximum(before, last) < LIKELY_BINS - 1), lowest, 0.0)
    list_at = LISTS + share_at.to(tl.int64) * room
    start = n
    places = PLACES + program.to(tl.int64) * ((USED + 3) // 4) * T
    rest = ()
    befores, lasts = (), ()
    for i in tl.static_range(USED):
        rest = rest + (tl.zeros([BLOCK], tl.float32),)
        befores = befores + (tl.sum(tl.where(r == i, before, 0), 0),)
        lasts = lasts + (tl.sum(tl.where(r == i, tl.maximum(before, last), 0), 0),)
    for block in tl.range(split, blocks, splits, num_stages=3):
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < tokens
        # bins from a token to the last one wanted, and to what is listed: the compiler is better at numbers than truths
        behind = tl.full([BLOCK], LIKELY_BINS, tl.int32)
        ahead = tl.zeros([BLOCK], tl.int32)
        words = ()
        for i in tl.static_range((USED + 3) // 4):
            words = words + (tl.load(places + i * T.to(tl.int64) + at, mask=inside, other=0),)
        for i in tl.static_range(USED):
            place = (words[i // 4] >> (8 * (i % 4))) & 255
            behind = tl.minimum(behind, place - lasts[i])
            if AGAIN:
                ahead = tl.maximum(ahead, befores[i] + 1 - place)
        behind = tl.where(inside, behind, -LIKELY_BINS)
        left = behind > 0
        new_rest = ()
        for i in tl.static_range(USED):
            place = (words[i // 4] >> (8 * (i % 4))) & 255
            new_rest = new_rest + (rest[i] + tl.where(left & (place < LIKELY_BINS - 1), upper_mass(place), 0.0),)
        rest = new_rest
        n = _append(list_at, n, at, (behind <= 0) & (behind > -LIKELY_BINS) & (ahead == 0))
    for i in tl.static_range(USED):
        known += tl.where(r == i, tl.sum(rest[i], 0), 0.0)
    known += tl.where(blocks > 0, deepest, 0.0)
    tl.debug_barrier()

    rows, d, t = tl.arange(0, 16), tl.arange(0, DIMS), tl.arange(0, TILE)
    row = (program % BLOCKS) * ROWS + rows
    query = QUERIES + b * query_b + (h * (used_rows // S) + row // S) * query_h + (row % S) * query_s
    there = ((row < used_rows) & (rows < ROWS))[:, None] & (d < D)[None, :]
    q = tl.load(query[:, None] + d[None, :], mask=there, other=0.0)
    q = q.to(tl.float32) if WIDE else q
    logits = LOGITS + share_at.to(tl.int64) * ROWS * room
    for i in tl.range(start, n, TILE, num_stages=3):
        token = tl.load(list_at + i + t, mask=i + t < n, other=0).to(tl.int64)
        k = KEYS + b * key_b + h * key_h + token[:, None] * key_t + d[None, :]
        k = tl.load(k, mask=(i + t < n)[:, None] & (d < D)[None, :], other=0.0)
        x = _products(q, k, factor, softcap, CAPPED, WIDE)
        tl.store(
            logits + rows[:, None] * room + (i + t)[None, :], x, mask=(rows < USED)[:, None] & (i + t < n)[None, :]
        )
    tl.debug_barrier()

    hits = tl.zeros([USED * EXACT_BINS], tl.int32)
    w = tl.arange(0, 256)
    for i in tl.range(start, n, 256):
        inside = live[:, None] & (i + w < n)[None, :]
        x = tl.load(logits + r[:, None] * room + (i + w)[None, :], mask=inside, other=FLOOR)
        place = bin_of(top[:, None] - x, EXACT_RATE, EXACT_BINS)
        mass = tl.exp2(x - top[:, None])
        found += tl.sum(mass, 1)
        deep += tl.sum(tl.where(place == EXACT_BINS - 1, mass, 0.0), 1)
        largest = tl.maximum(largest, tl.max(x, 1))
        # what lies outside is counted in the last bin, whose count nobody reads
        hits += tl.histogram((place + r[:, None] * EXACT_BINS).reshape(USED * 256), USED * EXACT_BINS)
    bins = tl.arange(0, USED * EXACT_BINS)
    to = COUNTS + (program * ROWS + bins // EXACT_BINS) * BINS + LIKELY_BINS + bins % EXACT_BINS
    tl.atomic_add(to, hits, mask=hits > 0, sem="relaxed")
    share_at += programs * splits if AGAIN else 0
    to = WEIGHT + (share_at * ROWS + r) * WEIGHTS
    tl.store(to, found)
    tl.store(to + 1, known)
    tl.store(to + 2, deep)
    tl.store(to + 3, largest)
    tl.store(NUMBER + share_at, n)


@triton.jit(do_not_specialize=["splits", "score_splits"])
def read(
    VALUES,  # [B, H, T, D]
    SUMS_IN,
    PAGES,
    COUNTS,
    LISTS,  # as :func:`rescore` leaves them
    LOGITS,
    NUMBER,
    WEIGHT,
    CUT,
    OUT,  # float32 [programs, splits, ROWS, D]
    LSE,  # float32 [programs, splits, ROWS], log2
    splits,
    score_splits,
    used_rows,
    value_b,
    value_h,
    value_t,
    room,
    p,
    SPLITS: tl.constexpr,
    SCORE_SPLITS: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    USED: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,  # whether weights and values have to be multiplied in float32
    PDL: tl.constexpr,
):
    """Attention over the kept tokens of one program's share, normalised, with its log-sum-exp."""
    program, split = tl.program_id(0), tl.program_id(1)
    b = (program // BLOCKS // H).to(tl.int64)
    h = (program // BLOCKS % H).to(tl.int64)
    r = tl.arange(0, 16)
    live = (((program % BLOCKS) * ROWS + r) < used_rows) & (r < USED)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    _, _, top = moments(SUMS_IN, program, r, score_splits, tl.load(PAGES + b) * 64, SCORE_SPLITS, ROWS)
    programs = tl.num_programs(0)
    second = WEIGHT + programs * splits * ROWS * WEIGHTS
    found, rest, deep, m = weights_of(second, program, r, live, splits, SPLITS, ROWS)
    kept = kept_bins(COUNTS, program, r, live, found, deep, rest, p, ROWS)
    share_at = program * splits + split
    n = tl.load(NUMBER + programs * splits + share_at)
    list_at = LISTS + share_at.to(tl.int64) * room
    logits = LOGITS + share_at.to(tl.int64) * ROWS * room
    d, t = tl.arange(0, DIMS), tl.arange(0, TILE)
    l = tl.zeros([16], tl.float32)
    out = tl.zeros([16, DIMS], tl.float32)
    for i in tl.range(0, n, TILE, num_stages=3):
        inside = live[:, None] & (i + t < n)[None, :]
        x = tl.load(logits + r[:, None] * room + (i + t)[None, :], mask=inside, other=FLOOR)
        stays = inside & (bin_of(top[:, None] - x, EXACT_RATE, EXACT_BINS) <= kept[:, None])
        weights = tl.where(stays, tl.exp2(x - m[:, None]), 0.0)
        needed = tl.max(stays.to(tl.int32), 0) > 0
        token = tl.load(list_at + i + t, mask=i + t < n, other=0).to(tl.int64)
        v = VALUES + b * value_b + h * value_h + token[:, None] * value_t + d[None, :]
        v = tl.load(v, mask=needed[:, None] & (d < D)[None, :], other=0.0)
        l += tl.sum(weights, 1)
        out = _weighted(weights, v.to(tl.float32) if WIDE else v, out)
    out = out * tl.where(l > 0, 1.0 / l, 0.0)[:, None]
    base = share_at.to(tl.int64) * ROWS + r
    tl.store(OUT + base[:, None] * D + d[None, :], out, mask=(r < ROWS)[:, None] & (d < D)[None, :])
    tl.store(LSE + base, tl.where(l > 0, m + tl.log2(l), FLOOR), mask=r < ROWS)
    if split == 0:
        tl.store(CUT + (program * ROWS + r) * CUTS + 2, kept.to(tl.float32), mask=live)


@triton.jit
def weights_of(WEIGHT, program, r, live, splits, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """Of rows ``r``: mass of what is listed, of the rest and of the last exact bin, and the largest exact logit."""
    s = tl.arange(0, SPLITS)
    at = WEIGHT + ((program * splits + s)[None, :] * ROWS + r[:, None]) * WEIGHTS
    there = live[:, None] & (s < splits)[None, :]
    found = tl.sum(tl.load(at, mask=there, other=0.0), 1)
    rest = tl.sum(tl.load(at + 1, mask=there, other=0.0), 1)
    deep = tl.sum(tl.load(at + 2, mask=there, other=0.0), 1)
    return found, rest, deep, tl.max(tl.load(at + 3, mask=there, other=FLOOR), 1)


@triton.jit
def _append(list_at, n, at, chosen):
    """Writes the tokens at places ``at`` that are ``chosen`` behind the ``n`` listed so far; returns how many are."""
    # a page's places are [q][u][r] for token 8u + 2q + r
    token = at // 64 * 64 + (at % 16 // 2) * 8 + (at % 64 // 16) * 2 + at % 2
    one = chosen.to(tl.int32)
    tl.store(list_at + n + tl.cumsum(one, 0) - 1, token, mask=chosen)
    return n + tl.sum(one, 0)


@triton.jit
def _products(q, k, factor, softcap, CAPPED: tl.constexpr, WIDE: tl.constexpr):
    """Exact logits [16, TILE] of ``q`` and the rows ``k``, in units of log2."""
    # products of two 16-bit floats are exact in float32
    x = tl.dot(q, tl.trans(k.to(tl.float32) if WIDE else k), input_precision="ieee") * factor
    if CAPPED:
        x = softcap * (1 - 2 / (tl.exp2(x * (2.8853900817779268 / softcap)) + 1))
    return x


@triton.jit
def _weighted(weights, v, out):
    """``out`` + ``weights`` @ ``v``; weights in two parts, one alone would be off by 1e-3."""
    if v.dtype == tl.float32:
        return tl.dot(weights, v, out, input_precision="ieee")
    else:
        high = weights.to(v.dtype)
        out = tl.dot(high, v, out)
        return tl.dot((weights - high.to(tl.float32)).to(v.dtype), v, out)
