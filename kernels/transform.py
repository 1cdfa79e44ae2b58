"""transform on the kernels: the decoders become the linear maps, the bases of the gains go into them as well.

    q . k' = q . R(n) mu + sum_s 2^(code/2) (q A_s^T 2^base_s) . c_s
    o' = sum_s (sum_t p_t 2^(code/2) c_s) 2^base_s A_s

Pages outside the calibrated statistics lie in a plain rotation, keys and values apart, so there are four kinds of
pages and four pairs of maps, each kind a part of its own. Almost always there is one; the host looks, unless the step
is being captured in a CUDA graph, which must serve pages to come: then all four are launched, three with nothing to do.
"""

import torch
from torch import Tensor

from kvtool import attention, packing
from kvtool.attention import Attended
from kvtool.kernels.encode_stages import Stages, encode_stages, stages
from kvtool.kernels.launch import check_counts, default_launch, remembered
from kvtool.kernels.mean import mean_bias
from kvtool.kernels.packed import Codec, Packed, attend_packed
from kvtool.methods.base import LayerCalibration
from kvtool.methods.finite import require_finite_tokens
from kvtool.methods.transform import Transform, TransformKV, code_of, maps, plain_code
from kvtool.transform import code as chain


def refuses(method: Transform, *, gluon: bool = False) -> str | None:
    """Why there is no kernel; None if there is one."""
    if method.evicts:
        return f"transform at {method.bits:g} bits evicts tokens, for which there is no kernel"
    return "transform has gains per group, which only the triton back end reads" if gluon else None


def attend(
    method: Transform,
    queries: Tensor,
    kv: TransformKV,
    layer: LayerCalibration,
    *,
    positions: Tensor,
    scale: float,
    softcap: float | None = None,
    gluon: bool = False,
    pages: Tensor | None = None,
) -> Attended:
    """As ``Transform.attend``, over the first ``pages`` [B] of every head."""
    check_counts({"outside": kv.outside}, positions, pages, len(queries))
    bias, unit = mean_bias(queries, layer["key_mean"], layer.rope, positions, scale)
    packed = Packed(*_side(kv.key_pages, kv.key_gains), *_side(kv.value_pages, kv.value_gains))
    launch = default_launch(queries.device, gluon)
    codecs = [codec_of(method, layer, kind) for kind in range(4)]
    # a step with its lengths on the device may be captured next, and nothing can be compiled then
    if pages is None and not _capturing(queries) and not bool(kv.outside.any()):
        return attend_packed(
            queries, packed, codecs[0], scale=scale, softcap=softcap, bias=bias, bias_unit=unit, launch=launch
        )
    B, _, N = kv.outside.shape
    # of a kind that a sequence does not have, it reads no page at all
    kinds = torch.arange(4, dtype=torch.uint8, device=kv.outside.device)
    lengths = (kv.outside.reshape(1, B, -1) == kinds[:, None, None]).any(-1) * (N if pages is None else pages)
    parts = []
    for kind, (codec, length) in enumerate(zip(codecs, lengths.to(torch.int32), strict=True)):
        part = attend_packed(
            queries,
            packed,
            codec,
            scale=scale,
            softcap=softcap,
            pages=length,
            bias=bias,
            bias_unit=unit,
            kinds=kv.outside,
            kind=kind,
            launch=launch,
        )
        parts.append(part)
    return attention.merge(*parts)


def compress(
    method: Transform, keys: Tensor, values: Tensor, layer: LayerCalibration, *, positions: Tensor
) -> TransformKV:
    """As ``Transform.compress``, two kernels a side and nothing of the size of the cache in between."""
    key_pages, key_gains, key_flags = encode_stages(
        keys,
        *encoders(method, layer, "key"),
        method.guard,
        mean=layer["key_mean"],
        rope=layer.rope,
        positions=positions,
    )
    value_pages, value_gains, value_flags = encode_stages(values, *encoders(method, layer, "value"), method.guard)
    if not _capturing(keys) and bool(((key_flags | value_flags) > 1).any()):
        require_finite_tokens(keys, values, layer.index)
        # finite, but beyond the fp16 of the products
        kv, _ = method.compress(keys, values, layer, positions=positions)
        assert isinstance(kv, TransformKV)
        return kv
    return TransformKV(key_pages, key_gains, value_pages, value_gains, (key_flags & 1) | ((value_flags & 1) << 1))


def encoders(method: Transform, layer: LayerCalibration, side: str) -> tuple[Stages, Stages]:
    """How a side is encoded: as fitted, and in the plain rotation."""

    def make() -> tuple[Stages, Stages]:
        return stages(code_of(layer, side), side == "key"), stages(plain_code(layer, side), side == "key")

    return remembered(("stages", method, layer.index, side), layer["key_basis"], make)


def codec_of(method: Transform, layer: LayerCalibration, kind: int = 0) -> Codec:
    """The codec of a layer's pages of one ``kind``, the bits of ``TransformKV.outside``."""

    def make() -> Codec:
        key_widths, key_map = _map(layer, "key", bool(kind & 1))
        value_widths, value_map = _map(layer, "value", bool(kind & 2))
        levels = {width: chain.table(width, torch.device("cpu"))[0].to(torch.int8) for width in (2, 3, 4)}
        return Codec(key_widths, value_widths, key_map.mT, value_map, levels, levels)

    return remembered((method, layer.index, kind), layer["key_basis"], make)


def _capturing(queries: Tensor) -> bool:
    return queries.is_cuda and torch.cuda.is_current_stream_capturing()


def _map(layer: LayerCalibration, side: str, plain: bool) -> tuple[tuple[int, ...], Tensor]:
    """Widths, and the map [H, 32 S, D] from levels times 2^(code/2) to the channels of the model."""
    code = plain_code(layer, side) if plain else code_of(layer, side)
    decoder = chain.decoder(code) if plain else maps(layer, side)
    if not code.widths:
        return (0,), decoder.new_zeros(len(decoder), packing.GROUP, decoder.shape[-1])
    return code.widths, decoder * torch.exp2(code.gain_base).repeat_interleave(packing.GROUP, 1)[..., None]


def _side(pages: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    if gains.shape[-1]:
        return pages, gains
    # a side without bits: one group that no page stores
    nothing = gains.new_zeros(*gains.shape[:-1], packing.GROUP)
    return nothing, nothing
