"""turboquant on the kernels: rotations become the linear maps, the calibrated mean becomes a bias of the logits."""

import torch.nn.functional as F
from torch import Tensor

from kvtool import packing, rotation
from kvtool.attention import Attended
from kvtool.kernels.encode import Encoder, encode, encoder
from kvtool.kernels.launch import default_launch, remembered
from kvtool.kernels.mean import mean_bias
from kvtool.kernels.packed import Codec, Packed, attend_packed
from kvtool.methods.base import LayerCalibration
from kvtool.methods.finite import require_finite
from kvtool.methods.turboquant import TurboQuant, TurboQuantKV

FIRST_IS_WHOLE = True  # see backends.Kernel


def refuses(method: TurboQuant, *, gluon: bool = False) -> str | None:
    """Why these options have no kernel; None if they have one."""
    if method.k_bits % 1 or method.v_bits % 1:
        return "turboquant at 2.5 or 3.5 bits has two scales a token, and the kernels read one"
    if method.qjl != "none":
        return "turboquant with qjl sketches the residual, and the kernels read codes only"
    return None


def attend(
    method: TurboQuant,
    queries: Tensor,
    kv: TurboQuantKV,
    layer: LayerCalibration,
    *,
    positions: Tensor,
    scale: float,
    softcap: float | None = None,
    gluon: bool | None = None,
    pages: Tensor | None = None,
    page_table: Tensor | None = None,
) -> Attended:
    """As ``TurboQuant.attend``; ``gluon`` chooses one of the two kernels, ``pages`` [B] are in use.

    page_table: int32 [B, N], where they are in fields [1, H, ...].
    """
    codec = codec_of(method, layer)
    bias = unit = None
    if method.mean != "none":
        bias, unit = mean_bias(
            queries, layer["key_mean"], layer.rope if method.mean == "rotated" else None, positions, scale
        )
    packed = Packed(kv.key_pages, kv.key_scales, kv.value_pages, kv.value_scales)
    launch = default_launch(queries.device, gluon)
    return attend_packed(
        queries,
        packed,
        codec,
        scale=scale,
        softcap=softcap,
        pages=pages,
        page_table=page_table,
        bias=bias,
        bias_unit=unit,
        launch=launch,
    )


def codec_of(method: TurboQuant, layer: LayerCalibration) -> Codec:
    """The codec of a layer."""

    def make() -> Codec:
        key_widths, value_widths = method.widths(layer.shape.head_dim)
        key_pi = rotation.matrix(layer["key_rotation"])
        value_pi = rotation.matrix(layer["value_rotation"])
        missing = packing.GROUP * len(key_widths) - layer.shape.head_dim
        return Codec(
            tuple(key_widths),
            tuple(value_widths),
            F.pad(key_pi.mT, (0, missing)),
            F.pad(value_pi, (0, 0, 0, missing)),
            {key_widths[0]: layer["key_levels"]},
            {value_widths[0]: layer["value_levels"]},
        )

    return remembered((method, layer.index), layer["key_rotation"], make)


def compress(
    method: TurboQuant, keys: Tensor, values: Tensor, layer: LayerCalibration, *, positions: Tensor
) -> TurboQuantKV:
    """As ``TurboQuant.compress``, one kernel a side: nothing of the size of the cache is kept in between."""
    key_encoder, value_encoder = encoders(method, layer)
    mean = None if method.mean == "none" else layer["key_mean"]
    rope = layer.rope if method.mean == "rotated" else None
    key_pages, key_scales = encode(keys, key_encoder, mean=mean, rope=rope, positions=positions)
    value_pages, value_scales = encode(values, value_encoder)
    empty = key_pages[..., :0]
    kv = TurboQuantKV(key_pages, key_scales, value_pages, value_scales, empty, empty.half())
    require_finite(kv, layer.index)
    return kv


def encoders(method: TurboQuant, layer: LayerCalibration) -> tuple[Encoder, Encoder]:
    """How keys and values of a layer are encoded."""

    def make() -> tuple[Encoder, Encoder]:
        both = []
        for side, widths in zip(("key", "value"), method.widths(layer.shape.head_dim), strict=True):
            missing = packing.GROUP * len(widths) - layer.shape.head_dim
            matrix = F.pad(rotation.matrix(layer[f"{side}_rotation"]).mT, (0, missing))
            levels, step = layer[f"{side}_levels"], float(layer[f"{side}_step"])
            both.append(encoder(widths, matrix, levels, step, method.scale, keys=side == "key"))
        return both[0], both[1]

    return remembered(("encode", method, layer.index), layer["key_rotation"], make)
