"""rabitq on the kernels: its codes are a uniform grid on packed pages, its sketch says what exact attention reads."""

import torch
from torch import Tensor

from kvtool.attention import Attended
from kvtool.kernels.launch import default_launch, remembered
from kvtool.kernels.mean import mean_bias
from kvtool.kernels.packed import Codec, Packed, attend_packed
from kvtool.kernels.sparse import Reader, Sketched, Trace, attend_sparse
from kvtool.methods import rabitq_code as code
from kvtool.methods.base import LayerCalibration
from kvtool.methods.rabitq import RaBitQ, RaBitQKV, SketchKV
from kvtool.packing import groups
from kvtool.sparse import Selection


def refuses(method: RaBitQ, *, gluon: bool = False) -> str | None:
    """Why these options have no kernel; None if they have one."""
    if method.mode == "topp":
        if gluon:
            return "rabitq in mode topp reads single rows, which only the triton back end does"
        if not method.rescore:
            return "rabitq with rescore false trusts the estimate, and the kernels rescore"
        return None if method.query_bits else "rabitq with query_bits 0 has no integer query"
    if {method.k_bits, method.v_bits} & {5, 6, 7}:
        return "rabitq at 5, 6 or 7 bits lies in pages of 8, whose zero the kernels take to be in the middle"
    return None


def attend(
    method: RaBitQ,
    queries: Tensor,
    kv: RaBitQKV | SketchKV,
    layer: LayerCalibration,
    *,
    positions: Tensor,
    scale: float,
    softcap: float | None = None,
    gluon: bool | None = None,
    pages: Tensor | None = None,
) -> Attended:
    """As ``RaBitQ.attend``, over the first ``pages`` [B] of every head; ``gluon`` is a choice for codes alone."""
    if isinstance(kv, SketchKV):
        return attend_top_p(method, queries, kv, layer, positions=positions, scale=scale, softcap=softcap, pages=pages)[
            0
        ]
    bias, unit = _bias(method, queries, layer, positions, scale)
    packed = Packed(kv.key_pages, kv.key_scales, kv.value_pages, kv.value_scales)
    launch = default_launch(queries.device, gluon)
    codec = codec_of(method, layer)
    return attend_packed(
        queries, packed, codec, scale=scale, softcap=softcap, pages=pages, bias=bias, bias_unit=unit, launch=launch
    )


def attend_top_p(
    method: RaBitQ,
    queries: Tensor,
    kv: SketchKV,
    layer: LayerCalibration,
    *,
    positions: Tensor,
    scale: float,
    softcap: float | None = None,
    pages: Tensor | None = None,
) -> tuple[Attended, Trace]:
    """:func:`attend` in mode ``topp``, and what it looked at."""
    bias, unit = _bias(method, queries, layer, positions, scale)
    sketched, reader = Sketched(*kv), reader_of(method, layer)
    return attend_sparse(
        queries, sketched, reader, scale=scale, softcap=softcap, pages=pages, bias=bias, bias_unit=unit
    )


def reads(
    method: RaBitQ,
    queries: Tensor,
    kv: RaBitQKV | SketchKV,
    layer: LayerCalibration,
    *,
    positions: Tensor,
    scale: float,
    softcap: float | None = None,
) -> Selection | None:
    """As ``RaBitQ.reads``, of what :func:`attend` reads: for the host, not for a step."""
    if not isinstance(kv, SketchKV):
        return None
    _, trace = attend_top_p(method, queries, kv, layer, positions=positions, scale=scale, softcap=softcap)
    B, HQ, S, _ = queries.shape
    H, T = kv.keys.shape[1:3]
    masks = trace.selection((B, H, HQ // H * S, T))
    return Selection(*(mask.unflatten(2, (-1, S)).to(queries.device) for mask in masks))


def reader_of(method: RaBitQ, layer: LayerCalibration) -> Reader:
    """How a layer's sketch is read."""

    def make() -> Reader:
        matrix = code.rotation_matrix(layer["key_rotation"])
        P = matrix.shape[-1]
        return Reader(
            matrix[:, :, : layer.shape.head_dim].mT.contiguous(),
            layer["query_mean"].float().contiguous() if method.query_mean else None,
            method.query_bits,
            # as RaBitQ.noise, of a logit in units of log2
            P / 4 * (1 - code.COSINE**2) / (P - 1),
            method.p,
            max(method.candidates, method.p) if method.candidates else 1 - (1 - method.p) / 5,
        )

    return remembered((method, layer.index), layer["key_rotation"], make)


def _bias(
    method: RaBitQ, queries: Tensor, layer: LayerCalibration, positions: Tensor, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    if method.mean == "none":
        return None, None
    rope = layer.rope if method.mean == "rotated" else None
    return mean_bias(queries, layer["key_mean"], rope, positions, scale)


def codec_of(method: RaBitQ, layer: LayerCalibration) -> Codec:
    """The codec of a layer."""

    def make() -> Codec:
        D = layer.shape.head_dim
        key_map = code.rotation_matrix(layer["key_rotation"])[:, :, :D].mT
        value_map = code.rotation_matrix(layer["value_rotation"])[:, :, :D]
        # the grid's half integers, twice: odd, as tables want them
        levels = {bits: (2 * torch.arange(1 << bits) - (1 << bits) + 1).to(torch.int8) for bits in (2, 3, 4)}
        worth = [1.0 if bits == 8 else 0.5 for bits in (method.k_bits, method.v_bits)]
        widths = [(bits,) * groups(D) for bits in (method.k_bits, method.v_bits)]
        return Codec(*widths, key_map * worth[0], value_map * worth[1], levels, levels)

    return remembered((method, layer.index), layer["key_rotation"], make)
