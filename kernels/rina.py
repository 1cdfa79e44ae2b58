"""rina on the kernels: stages are pages of signs, what was fitted to the first one goes into the linear maps."""

from dataclasses import dataclass
from math import gcd, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool import packing, rotation
from kvtool.attention import Attended
from kvtool.kernels import decode_rina, transform
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
    remembered,
    square_map,
    tiles_of,
)
from kvtool.kernels.mean import mean_bias
from kvtool.kernels.packed import LOG2E, bias_rows
from kvtool.kernels.query import prepare_levels
from kvtool.methods.base import LayerCalibration
from kvtool.methods.rina import RINA, RINAKV
from kvtool.methods.transform import TransformKV
from kvtool.rina.code import HALF_UNIT


@dataclass(frozen=True)
class Levels:
    """What was fitted to a layer, in the kernels' terms; C channels are padded to whole groups.

    query_map: float32 [H, D, C].  probes: float32 [H, 4, C], see ``query.prepare_levels``.  kappa: float32 [HQ].
    key_ratios: float32 [H, k_stages + 1, m], of the stages to the first.  value_ratios: float32 [H, v_stages, m].
    value_mids: float32 [H, C].  output_map: float32 [H, C, D].
    """

    query_map: Tensor
    probes: Tensor
    kappa: Tensor
    key_ratios: Tensor
    value_ratios: Tensor
    value_mids: Tensor
    output_map: Tensor


def refuses(method: RINA, *, gluon: bool = False) -> str | None:
    """Why these options have no kernel; None if they have one."""
    if method.variant == "published":
        return "rina as published has levels of tiles, and the kernels read levels of tokens"
    if method.target_bits is not None:
        return transform.refuses(method.placed, gluon=gluon)
    return "rina has levels per sub-space, which only the triton back end reads" if gluon else None


def attend(
    method: RINA,
    queries: Tensor,
    kv: RINAKV | TransformKV,
    layer: LayerCalibration,
    *,
    positions: Tensor,
    scale: float,
    softcap: float | None = None,
    gluon: bool = False,
    pages: Tensor | None = None,
    launch: Launch | None = None,
) -> Attended:
    """As ``RINA.attend``; ``pages`` [B] are in use, ``launch`` cuts it up otherwise."""
    if isinstance(kv, TransformKV):
        return transform.attend(
            method.placed, queries, kv, layer, positions=positions, scale=scale, softcap=softcap, pages=pages
        )
    B, HQ, S, D = queries.shape
    H, N = kv.key_pages.shape[1:3]
    check(method, queries, kv, layer, positions, pages)
    device = queries.device
    launch = launch or default_launch(device, gluon=False)
    levels = levels_of(method, layer)
    groups, width = packing.groups(D), gcd(D, method.subspace)  # channels of a sub-space
    tiles = tiles_of(queries, H)
    used, rows, blocks, programs, dims = tiles
    # programs of a multiprocessor at once: not measured, from what the compiler reports
    few = rows == 8 and groups <= 4 and width >= packing.GROUP and not method.extra
    resident, limit = (3, {"maxnreg": 168}) if few else (2, {})
    splits = launch.splits_of(tiles, N, resident, device)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    flag = {"PDL": launch.pdl}
    query = new(programs, groups, 2 * rows, 32, dtype=torch.int8)
    query_scale, query_mid, query_noise = new(programs, rows), new(programs, 2, rows), new(programs, 2, rows)
    prepare_levels[(programs, rows)](
        queries,
        levels.query_map,
        levels.probes,
        levels.kappa,
        query,
        query_scale,
        query_mid,
        query_noise,
        used,
        *queries.stride()[:3],
        levels.query_map.stride(0),
        scale * LOG2E,
        scale**2 * LOG2E,
        S=S,
        TILE=2 * rows,
        **dims,
        **square_map(D, 32 * groups),
        **flag,
        # a captured step's tail.py reads the queries early: they must be complete before anything here begins
        **(launch.dependent if pages is None else {}),
    )
    biased = method.mean != "none"
    bias = unit = query_scale
    if biased:
        rope = layer.rope if method.mean == "rotated" else None
        bias, unit = bias_rows(*mean_bias(queries, layer["key_mean"], rope, positions, scale), H, blocks * rows)
    out, lse = new(programs, splits, rows, 32 * groups), new(programs, splits, rows)
    words = [x.view(torch.int32) for x in (kv.key_pages, kv.value_pages)]
    norms = [x.view(torch.int32) for x in (kv.key_norms, kv.value_norms)]
    halves = [x.view(torch.int32) for x in (kv.key_halves, kv.value_halves)]
    extra = kv.extra_index, kv.extra_bits, kv.extra_halves
    decode_rina.decode[(programs, splits)](
        query,
        query_scale,
        query_mid,
        query_noise,
        *words,
        *norms,
        *halves,
        *extra,
        levels.key_ratios,
        levels.value_ratios,
        levels.value_mids,
        full(B, N, device) if pages is None else pages,
        bias,
        unit,
        out,
        lse,
        splits,
        *(stride for tensor in (*words, norms[0], *halves, *extra) for stride in tensor.stride()[:3]),
        method.extra,
        bias.shape[-1],
        (softcap or 0.0) * LOG2E,
        D=D,
        GROUPS=groups,
        SPACES=D // width,
        SPAN=max(1, width // packing.GROUP),
        PARTS=max(1, packing.GROUP // width),
        KEY_STAGES=method.k_stages,
        VALUE_STAGES=method.v_stages,
        EXTRA=32 if method.extra else 0,
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
    return merged(out, lse, levels.output_map, (B, HQ, S, D), dims, launch.pdl)


def levels_of(method: RINA, layer: LayerCalibration) -> Levels:
    """The levels of a layer."""

    def make() -> Levels:
        D = layer.shape.head_dim
        J, width = method.k_stages, gcd(D, method.subspace)
        missing = packing.GROUP * packing.groups(D) - D

        def channels(x: Tensor) -> Tensor:
            """Numbers of sub-spaces [..., m] for every channel, [..., C]."""
            return F.pad(x.repeat_interleave(width, -1), (0, missing))

        # of the first stage, [H, m]; levels are read as eighths
        key_unit, value_unit = (8 / HALF_UNIT * layer[f"{side}_halves"][..., 0] for side in ("key", "value"))
        mids = layer["key_mids"] / key_unit[..., None]
        noise = layer["key_noise"] / (2 * key_unit[..., None].square())
        probes = [mids[..., :J].sum(-1), mids[..., J], noise[..., J - 1], noise[..., J] - noise[..., J - 1]]
        turn, back = (
            F.pad(x, (0, 0, 0, missing)) for x in (rotation.matrix(layer["key_rotation"]), layer["value_decoder"])
        )
        key_halves, value_halves = layer["key_halves"], layer["value_halves"]
        kappa = layer["kappa"] if method.correction else torch.zeros_like(layer["kappa"])
        return Levels(
            (turn.mT * channels(key_unit)[:, None] / sqrt(D)).contiguous(),
            channels(torch.stack(probes, 1)).contiguous(),
            kappa.contiguous(),
            (key_halves / key_halves[..., :1]).mT.contiguous(),
            (value_halves / value_halves[..., :1]).mT.contiguous(),
            channels(layer["value_mids"].sum(-1) / value_unit).contiguous(),
            (back * channels(value_unit)[..., None] / sqrt(D)).contiguous(),
        )

    return remembered((method, layer.index), layer["key_rotation"], make)


def check(
    method: RINA, queries: Tensor, kv: RINAKV, layer: LayerCalibration, positions: Tensor, pages: Tensor | None
) -> None:
    """Refuse what the kernel does not serve.

    Raises:
        BackendError: in one sentence.
    """
    H, D = layer.shape.num_kv_heads, layer.shape.head_dim
    check_queries(queries, H, D)
    check_counts(kv._asdict(), positions, pages, len(queries))
    spaces = D // gcd(D, method.subspace)
    for side, stages in (("key", method.k_stages), ("value", method.v_stages)):
        widths = {
            "pages": stages * packing.page_bytes([1] * packing.groups(D)),
            "norms": packing.PAGE,
            "halves": packing.PAGE // 2 * stages * spaces,
        }
        for field, size in widths.items():
            stored = getattr(kv, f"{side}_{field}")
            check_stored(f"{side}_{field}", stored, queries, H, torch.uint8, size)
            check_pages(f"{side}_{field}", stored)
    if kv.key_norms.stride() != kv.value_norms.stride():
        refuse("norms", "values' lying as keys' do", f"{kv.key_norms.stride()} and {kv.value_norms.stride()}")
    n = method.extra
    for name, dims in (("extra_index", (n,)), ("extra_bits", (n, D // 8)), ("extra_halves", (n, spaces))):
        stored = getattr(kv, name)
        check_stored(name, stored, queries, H, torch.uint8, *dims)
        if not stored[0, 0, :1].is_contiguous():
            refuse(name, f"contiguous in the last {len(dims)} dimensions", f"strides {stored.stride()}")
