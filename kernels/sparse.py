"""Top-p attention over an exact cache by its sketch: the seven launches of a step, and what they leave behind.

    prepare        queries: rotate, quantise                             kernels/sketch.py
    score          sketch -> estimates, their moments
    weigh          estimates -> bins of the likely logit                 kernels/nucleus.py
    rescore        candidates: list, exact logits, bins of these         kernels/gather.py
    rescore        what else it takes
    read           what is kept: values, (out, lse) of each split
    merge          the splits                                            kernels/merge.py

Nothing is read back by the host, so a step can be captured in a graph. Scratch is proportional to queries and tokens:
2 bytes of estimate, 4 of logit and 4/group of index per query and token, of which logits and indices are touched where
candidates are.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kvtool import packing
from kvtool.attention import Attended
from kvtool.kernels import gather, nucleus, sketch
from kvtool.kernels.affine import identity
from kvtool.kernels.launch import (
    Launch,
    check_counts,
    check_pages,
    check_queries,
    check_stored,
    default_launch,
    full,
    merged,
    nvidia,
    processors,
    refuse,
    square_map,
    tiles_of,
)
from kvtool.kernels.packed import LOG2E, bias_rows

TILE = 64  # rows gathered at a time
SAMPLED = 1 << 15  # tokens from which on every fourth is counted


class Sketched(NamedTuple):
    """An exact cache and its sketch; as ``rabitq.SketchKV``. keys, values: [B, H, T, D] of one dtype."""

    keys: Tensor
    values: Tensor
    code_pages: Tensor
    code_scales: Tensor
    query_terms: Tensor


@dataclass(frozen=True)
class Reader:
    """What a layer's sketch means, and how much is to be read.

    key_map: float32 [H, D, P], the rotation. query_mean: float32 [HQ, D] or None. spread: variance of an estimate in
    units of log2, over |q - c_q|^2 times the square of the token's scale. share: what candidates hold, of the estimate.
    """

    key_map: Tensor
    query_mean: Tensor | None
    query_bits: int
    spread: float
    p: float
    share: float


class Trace(NamedTuple):
    """What a step looked at and decided, on the device; the numbers of the last call, for tests and accounts.

    lists: int32 [programs, splits, room], tokens; number: int32 [2, programs, splits], listed first and in all.
    logits: float32 [programs, splits, rows, room], in units of log2. cuts: float32 [programs, rows, 4].
    estimates: float16 [programs, rows, T] in page order.
    """

    lists: Tensor
    number: Tensor
    logits: Tensor
    cuts: Tensor
    estimates: Tensor

    def selection(self, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
        """Kept and rescored tokens as masks [B, H, used rows, T], for a batch of B, H, used rows and T = ``shape``."""
        B, H, used, T = shape
        programs, splits, rows, _ = self.logits.shape
        blocks = programs // (B * H)
        kept, seen = (torch.zeros(programs, rows, T, dtype=torch.bool) for _ in range(2))
        lists, logits, cuts, number = (x.cpu() for x in (self.lists, self.logits, self.cuts, self.number[1]))
        for i in range(programs):
            for j in range(splits):
                tokens = lists[i, j, : number[i, j]].long()
                for r in range(min(rows, used - i % blocks * rows)):
                    depth = (cuts[i, r, 3] - logits[i, j, r, : len(tokens)]) * nucleus.EXACT_RATE.value
                    place = depth.clamp(0, nucleus.EXACT_BINS.value - 1).int()
                    kept[i, r, tokens[place <= cuts[i, r, 2]]] = True
                    seen[i, r, tokens] = True
        return tuple(x.reshape(B, H, blocks * rows, T)[:, :, :used] for x in (kept, seen))


def attend_sparse(
    queries: Tensor,
    kv: Sketched,
    reader: Reader,
    *,
    scale: float,
    softcap: float | None = None,
    pages: Tensor | None = None,
    bias: Tensor | None = None,
    bias_unit: Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[Attended, Trace]:
    """Attention of ``queries`` [B, HQ, S, D] over the tokens that hold a share p of each query's softmax.

    pages: int32 [B] on the device, pages in use; default: all. bias: [B, HQ, S, T], added to the estimates, times
    ``bias_unit`` [B, HQ, S].

    Raises:
        BackendError: a shape, dtype or device the kernels do not serve.
    """
    check(queries, kv, reader, pages, bias)
    device = queries.device
    launch = launch or default_launch(device, gluon=False)
    B, HQ, S, D = queries.shape
    H, N = kv.code_pages.shape[1:3]
    T, P = N * packing.PAGE, reader.key_map.shape[-1]
    used, rows, blocks, programs, dims = tiles_of(queries, H)
    live = min(rows, used)
    wave = processors(device)
    pages = full(B, N, device) if pages is None else pages

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    score_splits = max(1, min(4 * wave // programs, triton.cdiv(N, launch.warps)))
    width = triton.next_power_of_2(live)
    block = 1024 if width <= 4 else 512
    every = 4 if T >= SAMPLED else 1
    count_splits = max(1, min(4 * wave // programs, triton.cdiv(T, block)))
    per_split = triton.cdiv(triton.cdiv(T, block), max(1, 4 * wave // programs))
    splits, room = triton.cdiv(T, block * per_split), block * per_split
    common = {**dims, "PDL": launch.pdl}
    pdl = launch.dependent
    factor, cap = scale * LOG2E, (softcap or 0.0) * LOG2E

    query = new(programs, P // packing.GROUP, 2 * rows, packing.GROUP, dtype=torch.int8)
    facts = new(programs, rows, sketch.FACTS.value)
    counts = new(programs, rows, nucleus.BINS.value, dtype=torch.int32)
    mean = facts if reader.query_mean is None else reader.query_mean
    square = square_map(D, P)
    sketch.prepare[(programs, rows)](
        queries, mean, reader.key_map, query, facts, counts, used, *queries.stride()[:3], factor,
        reader.spread * factor**2, S=S, D=D, P=P, DIMS=square["DIMS"], CHANNELS=square["CHANNELS"],
        BITS=reader.query_bits, BINS=nucleus.BINS.value, CENTRED=reader.query_mean is not None,
        num_warps=square["num_warps"], **common, **pdl,
    )  # fmt: skip

    estimates = new(programs, rows, T, dtype=torch.float16)
    sums = new(programs, score_splits, rows, sketch.SUMS.value)
    words = kv.code_pages.view(torch.int32)
    biases, units = facts, facts
    if bias is not None:
        biases, units = bias_rows(bias.expand(B, HQ, S, -1), bias_unit, H, blocks * rows)
    scale_strides = kv.code_scales.stride()[:3]
    sketch.score[(programs, score_splits)](
        query, facts, words, kv.code_scales, kv.query_terms, biases, units, pages, estimates, sums, score_splits, used,
        *words.stride()[:3], *scale_strides, *kv.query_terms.stride()[:3], T, factor, cap, S=S,
        GROUPS=P // packing.GROUP, BIASED=bias is not None, CENTRED=reader.query_mean is not None,
        CAPPED=softcap is not None, STAGES=3, WARPS=launch.warps, ASM=nvidia(device), num_warps=launch.warps,
        **common, **pdl,
    )  # fmt: skip

    deep = new(programs, count_splits, rows)
    places = new(programs, triton.cdiv(width, 4), T, dtype=torch.int32)
    score_width, count_width = triton.next_power_of_2(score_splits), triton.next_power_of_2(count_splits)
    nucleus.weigh[(programs, count_splits)](
        estimates, kv.code_scales, facts, sums, pages, places, counts, deep, count_splits, score_splits, used,
        *scale_strides, T, SCORE_SPLITS=score_width, USED=width, BLOCK=block, EVERY=every, num_warps=4, **common, **pdl,
    )  # fmt: skip

    lists = new(programs, splits, room, dtype=torch.int32)
    logits = new(programs, splits, rows, room)
    number = new(2, programs, splits, dtype=torch.int32)
    weight = new(2, programs, splits, rows, gather.WEIGHTS.value)
    cuts = new(programs, rows, gather.CUTS.value)
    options = {
        "SCORE_SPLITS": score_width, "SPLITS": triton.next_power_of_2(splits), "USED": width,
        "TILE": TILE, "D": D, "DIMS": triton.next_power_of_2(D), "num_warps": 4,
    } | common | pdl  # fmt: skip
    # the interpreter multiplies bfloat16 as if it were integers
    unable = device.type == "cpu" and kv.keys.dtype == torch.bfloat16
    for again in (False, True):
        gather.rescore[(programs, splits)](
            queries, kv.keys, places, sums, pages, counts, deep, lists, logits, number, weight, cuts, splits,
            score_splits, count_splits, used, *queries.stride()[:3], *kv.keys.stride()[:3], T, room, factor, cap,
            reader.share, AGAIN=again, COUNT_SPLITS=count_width, S=S, BLOCK=block, EVERY=every,
            CAPPED=softcap is not None, WIDE=queries.dtype != kv.keys.dtype or unable, **options,
        )  # fmt: skip

    out, lse = new(programs, splits, rows, D), new(programs, splits, rows)
    gather.read[(programs, splits)](
        kv.values, sums, pages, counts, lists, logits, number, weight, cuts, out, lse, splits, score_splits, used,
        *kv.values.stride()[:3], room, reader.p, WIDE=unable, **options,
    )  # fmt: skip
    attended = merged(out, lse, identity(D, D, device), (B, HQ, S, D), dims, launch.pdl)
    return attended, Trace(lists, number, logits, cuts, estimates)


def traffic(kv: Sketched, kept: Tensor, seen: Tensor) -> dict[str, int]:
    """Bytes that a step has to read of the cache, given what :meth:`Trace.selection` says was kept and rescored."""
    row = kv.keys.shape[-1] * kv.keys.element_size()
    return {
        "sketch": sum(x.numel() * x.element_size() for x in (kv.code_pages, kv.code_scales, kv.query_terms)),
        "keys": int(seen.any(2).sum()) * row,
        "values": int(kept.any(2).sum()) * row,
    }


def check(
    queries: Tensor, kv: Sketched, reader: Reader, pages: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """Refuse what the kernels do not serve.

    Raises:
        BackendError: in one sentence.
    """
    H, N = kv.code_pages.shape[1:3]
    B, HQ, _, D = queries.shape
    check_queries(queries, H)
    check_counts({"code_pages": kv.code_pages, "code_scales": kv.code_scales}, None, pages, B)
    check_stored("code_pages", kv.code_pages, queries, H, torch.uint8, 8 * reader.key_map.shape[-1])
    check_pages("code_pages", kv.code_pages)
    check_stored("code_scales", kv.code_scales, queries, H, torch.float16, packing.PAGE)
    terms = (B, H, N * packing.PAGE, HQ // H if reader.query_mean is not None else kv.query_terms.shape[-1])
    if kv.query_terms.dtype != torch.float16 or tuple(kv.query_terms.shape) != terms:
        found = f"{kv.query_terms.dtype} {list(kv.query_terms.shape)}"
        refuse("query_terms", f"torch.float16 {list(terms)}", found)
    for name, stored in (("code_scales", kv.code_scales), ("query_terms", kv.query_terms)):
        if stored.stride(-1) != 1:
            refuse(name, "contiguous rows", f"strides {stored.stride()}")
    if bias is not None and bias.shape[-1] != N * packing.PAGE:
        refuse("positions, or bias", f"{N * packing.PAGE}, of all pages", bias.shape[-1])
    for name, tensor in (("keys", kv.keys), ("values", kv.values)):
        if tuple(tensor.shape) != (B, H, N * packing.PAGE, D) or tensor.stride(-1) != 1:
            refuse(name, f"contiguous rows, {[B, H, N * packing.PAGE, D]}", f"{list(tensor.shape)}, {tensor.stride()}")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16) or tensor.dtype != kv.keys.dtype:
            refuse(name, "float32, float16 or bfloat16, keys and values alike", tensor.dtype)
    devices = {str(x.device) for x in (queries, *kv, reader.key_map)}
    if len(devices) > 1:
        refuse("tensors", "one device", " and ".join(sorted(devices)))
