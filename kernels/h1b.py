"""h1b on the kernels: the query is sketched, the sketches' agreement becomes a logit, the mean a bias of the logits."""

import torch
from torch import Tensor

from kvtool import packing
from kvtool.attention import Attended
from kvtool.kernels import decode_affine, decode_h1b
from kvtool.kernels.affine import code_tables, identity
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
    refuse,
    square_map,
    tiles_of,
)
from kvtool.kernels.mean import mean_bias
from kvtool.kernels.packed import LOG2E, bias_rows
from kvtool.kernels.query import sketch
from kvtool.methods.base import LayerCalibration
from kvtool.methods.h1b import H1B, H1BKV

HELD = 16  # groups of sketched channels whose queries stay in registers


def refuses(method: H1B, *, gluon: bool = False) -> str | None:
    """Why there is no kernel; None if there is one."""
    return "h1b maps agreements to cosines, which only the triton back end does" if gluon else None


def attend(
    method: H1B,
    queries: Tensor,
    kv: H1BKV,
    layer: LayerCalibration,
    *,
    positions: Tensor,
    scale: float,
    softcap: float | None = None,
    gluon: bool = False,
    pages: Tensor | None = None,
    launch: Launch | None = None,
) -> Attended:
    """As ``H1B.attend``; ``pages`` [B] are in use, ``launch`` cuts it up otherwise."""
    B, HQ, S, D = queries.shape
    H, N = kv.key_pages.shape[1:3]
    check(method, queries, kv, layer, positions, pages)
    device = queries.device
    launch = launch or default_launch(device, gluon=False)
    cosine = method.score == "cosine"
    bits = method.sketch_bits * D
    groups, value_groups = packing.groups(bits), packing.groups(D)
    tiles = tiles_of(queries, H)
    used, rows, blocks, programs, dims = tiles
    # programs of a multiprocessor at once: not measured, from what the compiler reports
    resident, limit = (3, {"maxnreg": 168}) if rows == 8 and groups + value_groups <= 8 else (2, {})
    splits = launch.splits_of(tiles, N, resident, device)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    flag = {"PDL": launch.pdl}
    query = new(programs, groups, rows, 32, dtype=torch.int8)
    query_scale = new(programs, rows)
    sketch[(programs, rows)](
        queries,
        layer["projection"],
        layer["temperature"] if cosine else query_scale,
        query,
        query_scale,
        used,
        *queries.stride()[:3],
        scale * LOG2E if cosine else LOG2E,
        S=S,
        BITS=bits,
        COSINE=cosine,
        **dims,
        **square_map(D, 32 * value_groups),
        **flag,
        # a captured step's tail.py reads the queries early: they must be complete before anything here begins
        **(launch.dependent if pages is None else {}),
    )
    # as published the agreement alone is the logit
    biased = cosine and method.mean != "none"
    bias = unit = query_scale
    if biased:
        rope = layer.rope if method.mean == "rotated" else None
        bias, unit = bias_rows(*mean_bias(queries, layer["key_mean"], rope, positions, scale), H, blocks * rows)
    out, lse = new(programs, splits, rows, 32 * value_groups), new(programs, splits, rows)
    words = kv.key_pages.view(torch.int32), kv.value_pages.view(torch.int32)
    width = method.v_bits
    decode_h1b.decode[(programs, splits)](
        query,
        query_scale,
        *words,
        kv.key_norms,
        kv.value_scales,
        kv.value_minima,
        code_tables(device),
        full(B, N, device) if pages is None else pages,
        bias,
        unit,
        out,
        lse,
        splits,
        *(stride for tensor in (*words, kv.key_norms, kv.value_scales) for stride in tensor.stride()[:3]),
        bias.shape[-1],
        (softcap or 0.0) * LOG2E,
        KEY_GROUPS=groups,
        VALUE_GROUPS=value_groups,
        BITS=bits,
        VALUE_WIDTH=width,
        VALUE_UNIT=decode_affine.UNIT[width],
        VALUE_ZERO=decode_affine.ZERO[width],
        COSINE=cosine,
        HELD=groups <= HELD,
        BIASED=biased,
        CAPPED=softcap is not None,
        STAGES=launch.stages or 3,
        WARPS=launch.warps,
        ASM=nvidia(device),
        num_warps=launch.warps,
        **(limit if nvidia(device) else {}),
        **dims,
        **flag,
        **launch.dependent,
    )
    return merged(out, lse, identity(32 * value_groups, D, device), (B, HQ, S, D), dims, launch.pdl)


def check(
    method: H1B, queries: Tensor, kv: H1BKV, layer: LayerCalibration, positions: Tensor, pages: Tensor | None
) -> None:
    """Refuse what the kernel does not serve.

    Raises:
        BackendError: in one sentence.
    """
    H, D = layer.shape.num_kv_heads, layer.shape.head_dim
    check_queries(queries, H, D)
    check_counts(kv._asdict(), positions, pages, len(queries))
    for name, stored, widths in (
        ("key_pages", kv.key_pages, [1] * packing.groups(method.sketch_bits * D)),
        ("value_pages", kv.value_pages, [method.v_bits] * packing.groups(D)),
    ):
        check_stored(name, stored, queries, H, torch.uint8, packing.page_bytes(widths))
        check_pages(name, stored)
    if method.score == "cosine":
        check_stored("key_norms", kv.key_norms, queries, H, torch.float16, packing.PAGE)
        if kv.key_norms.stride(-1) != 1:
            refuse("key_norms", "contiguous pages", f"strides {kv.key_norms.stride()}")
    for name, stored in (("value_scales", kv.value_scales), ("value_minima", kv.value_minima)):
        check_stored(name, stored, queries, H, torch.float16, 1, packing.PAGE)
    if kv.value_scales.stride() != kv.value_minima.stride() or kv.value_scales.stride(-1) != 1:
        found = f"{kv.value_scales.stride()} and {kv.value_minima.stride()}"
        refuse("values' ranges", "contiguous rows, minima lying as scales do", found)
